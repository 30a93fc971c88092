// The CUDA scan as the bindings call it. Every function launches on `stream` (a cudaStream_t) of
// the current device and returns null, or the CUDA runtime's message when a launch failed.
#pragma once

#include "../params.h"

namespace mamba {

// Chunk states are kept every so many steps: chunk_size must be this, or cover the whole length.
constexpr int64_t kCudaChunk = 64;

// What fits the shared memory of every supported GPU.
constexpr int64_t kCudaMaxStates = 1024;

// What seq_idx says about each step, (b, l) each; null without seq_idx.
struct CudaScanEvents {
  static constexpr int kNothing = -1, kPadding = -2, kFreshStart = -3;
  // kPadding; kFreshStart: restart from zero; >= 0: restart from that initial state; else kNothing.
  const int* before = nullptr;
  const int* after = nullptr;       // >= 0: the state after this step is that final state
  const long long* last = nullptr;  // (S,) the last step b * length + t of each sequence, or -1
};

// Fills the three arrays from p.seq_idx. A number that is not below p.num_states stops the kernel
// with a device assertion.
const char* scan_events_cuda(const ScanParams& p, int* before, int* after, long long* last,
                             void* stream);

// to[s] = from[s] (0 without from) for the states (S, d, n) that no step belongs to.
const char* fill_unused_states_cuda(const ScanParams& p, const CudaScanEvents& events,
                                    const float* from, float* to, void* stream);

// `scratch`: as many floats as scan_forward_scratch says.
int64_t scan_forward_scratch(const ScanParams& p, const CudaScanEvents& events);
const char* scan_forward_cuda(const ScanParams& p, const CudaScanEvents& events, float* scratch,
                              void* stream);

}  // namespace mamba
