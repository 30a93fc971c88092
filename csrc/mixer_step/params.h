// One token of the Mamba mixer between its two large projections (arXiv 2312.00752, figure 3):
//   x = silu(conv(x));  dt, B, C = x_proj x;  the recurrence's step with softplus(dt_proj dt +
//   bias); y = (C . s + D x) * silu(z)
#pragma once

#include "../common/tensor_arg.h"

namespace mamba {

struct MixerStepParams {
  // Sizes: rows, channels, rank of dt, outputs of x_proj.
  int64_t batch = 0, channels = 0, rank = 0, projected = 0;
  DType dtype = DType::kFloat16;  // of every matrix and of what follows from them
  DType state_dtype = DType::kFloat16;

  const void* xz = nullptr;                      // (batch, 2 channels)
  const void* x_proj = nullptr;                  // (projected, channels)
  const void* dt_proj = nullptr;                 // (channels, rank)
  TensorArg conv_weight, conv_bias, dt_bias;     // (channels, 4), (channels,); biases optional
  TensorArg A_log, D;                            // (channels, 16), (channels,)
  void *conv_state = nullptr, *state = nullptr;  // (batch, channels, 4), (batch, channels, 16)
  void *x = nullptr, *selected = nullptr;        // scratch (batch, channels), (batch, projected)
  void* y = nullptr;                             // (batch, channels)
};

}  // namespace mamba
