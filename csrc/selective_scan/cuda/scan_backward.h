// The backward of the CUDA scan as the bindings call it: a plan, which says how much memory the
// partial sums take; the kernel, which fills them; and their sums in a fixed order.
#pragma once

#include "scan.h"

namespace mamba {

// What kernels are compiled for: one dtype and one memory order of all (b, d, l) tensors, or any.
enum class BackwardKind {
  kAny,
  kBFloat16Channel,
  kBFloat16Time,
  kFloat16Channel,
  kFloat16Time,
  kFloat32Channel,
  kFloat32Time
};

struct BackwardPlan {
  BackwardKind kind = BackwardKind::kAny;
  int warps = 0;                 // of a block
  int stages = 1;                // 2: the next tile's inputs arrive while one is worked on
  int64_t blocks_per_group = 1;  // blocks that share the channels of a group
  int64_t slices = 1;            // of a row: groups * blocks_per_group
  int64_t segments = 1;          // stretches of a row that run side by side
  int64_t segment_tiles = 1;     // their length, in tiles of kCudaChunk steps
  int64_t padded_length = 0;     // of the partial sums of dB and dC
};

// For the current device. Of g, the inputs and the gradients in their shape count, not the sums.
// `warps` is 0 where a state does not fit the GPU's shared memory.
BackwardPlan backward_plan(const ScanGradients& g, const CudaScanEvents& events);

// What else the kernel needs; pointers may be null where the remark says so.
struct BackwardScratch {
  int* shared_starts = nullptr;  // one int; null without seq_idx or initial_state
  int* starts = nullptr;         // (S,), the same
  // (b, segments, d, n) each, null with one segment.
  float* adjoint = nullptr;
  float* decay = nullptr;
};

// g.dA, g.dD, g.ddelta_bias and constant g.dB, g.dC get a row of sums for each batch row and
// segment, (b * segments, ...); variable g.dB and g.dC one for each slice, (b, slices, n,
// padded_length). p.chunk_states are those of chunks of kCudaChunk steps.
const char* scan_backward_cuda(const ScanGradients& g, const CudaScanEvents& events,
                               const BackwardPlan& plan, const BackwardScratch& scratch,
                               void* stream);

// to[i] = the sum over the parts of from, (parts, size), in order, times `factor` (size,) if given;
// `to` is contiguous.
struct PartialSum {
  const float* from = nullptr;
  const float* factor = nullptr;
  TensorArg to;
  int64_t size = 0;
};

// Sums (b, slices, n, padded_length) over the slices of a group into (b, g, n, l).
struct SliceSum {
  const float* from = nullptr;
  TensorArg to;
};

// All sums of a backward, in one launch.
struct BackwardSums {
  static constexpr int kMostParts = 5, kMostSlices = 2;
  PartialSum parts[kMostParts];
  SliceSum slices[kMostSlices];
  int part_sums = 0, slice_sums = 0;
  int64_t part_count = 0;
};
const char* sum_backward_cuda(const BackwardSums& sums, const ScanParams& p,
                              const BackwardPlan& plan, void* stream);

}  // namespace mamba
