// The causal convolution on the GPU. Every function launches on `stream` (a cudaStream_t) of the
// current device and returns null, or the CUDA runtime's message when a launch failed.
#pragma once

#include "../params.h"

namespace mamba {

// What seq_idx makes of the steps of a batch, (b, l) each; all null without seq_idx.
struct ConvLinks {
  static constexpr int kNone = -1, kPadding = -2;
  const int* ids = nullptr;         // contiguous sequence numbers
  const int* previous = nullptr;    // the step before in the same run; kNone: the run starts here
  const int* following = nullptr;   // the step after in the same run, or kNone
  const long long* last = nullptr;  // (S,) the last step b * length + t of each state, or -1
};

struct CudaConvParams {
  ConvParams p;
  ConvLinks links;
  float* gradient = nullptr;  // general backward: (b, l, d) or (b, d, l), as x lies
  float* partial = nullptr;   // (groups, channels * (width + 1)): shares of dweight, then of dbias
  float* dweight = nullptr;   // (channels, width)
  float* dbias = nullptr;     // (channels,), optional
};

const char* conv_links_cuda(const ConvParams& p, const int* ids, int* previous, int* following,
                            long long* last, void* stream);
const char* conv_fwd_cuda(const CudaConvParams& c, void* stream);

// The rows of `partial`, and whether the backward needs `gradient`.
int64_t conv_groups_cuda(const CudaConvParams& c);
bool conv_needs_gradient_cuda(const CudaConvParams& c);
const char* conv_bwd_cuda(const CudaConvParams& c, void* stream);

struct CudaConvUpdateParams {
  ConvUpdateParams p;  // without rows and start
  int64_t state_rows = 0;
  const void *rows = nullptr, *start = nullptr;  // (batch,) integers, optional
  int rows_bytes = 0, start_bytes = 0;           // of each integer
  int64_t rows_stride = 0, start_stride = 0;
};
const char* conv_update_cuda(const CudaConvUpdateParams& c, void* stream);

}  // namespace mamba
