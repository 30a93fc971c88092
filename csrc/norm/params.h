// Residual addition followed by RMS norm or layer norm, on rows:
//   s = x + residual;  y = (s - mean) * rstd * weight + bias,  mean only for layer norm
#pragma once

#include "../common/tensor_arg.h"

namespace mamba {

struct NormParams {
  int64_t rows = 0, size = 0;
  float eps = 0.0f;
  bool is_rms = false;

  TensorArg x, residual;      // (rows, size); residual optional
  TensorArg weight, bias;     // (size,); bias optional
  TensorArg y, residual_out;  // (rows, size), contiguous; residual_out optional
  float* mean = nullptr;      // (rows,), null for RMS norm
  float* rstd = nullptr;      // (rows,); null where only a forward follows

  // Backward; mean and rstd are read, with these strides.
  int64_t mean_stride = 1, rstd_stride = 1;
  TensorArg dy, dresidual_out;  // (rows, size); dresidual_out optional
  TensorArg dx, other;          // (rows, size), contiguous: one gradient in two dtypes, if asked
  float* partial =
      nullptr;  // (groups, size), or (groups, 2, size) with a bias: shares of dweight, dbias
};

}  // namespace mamba
