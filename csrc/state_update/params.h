// One decode step of the selective state space (Mamba, arXiv 2312.00752, equation 2):
//   dt = softplus(dt + dt_bias);  s = s * exp(dt * A) + dt * B * x;  y = (C . s + D x) * silu(z)
#pragma once

#include "../common/tensor_arg.h"

namespace mamba {

struct StateUpdateParams {
  // Sizes: rows of the state, batch, heads, head size, state size, groups of heads sharing B and C.
  int64_t state_rows = 0, batch = 0, heads = 0, head_dim = 0, state_dim = 0, groups = 0;
  bool dt_softplus = false;

  TensorArg state;                   // (state_rows, heads, head_dim, state_dim), read and written
  TensorArg x, dt, z;                // (batch, heads, head_dim); z optional
  TensorArg A;                       // (heads, head_dim, state_dim)
  TensorArg B, C;                    // (batch, groups, state_dim)
  TensorArg D, dt_bias;              // (heads, head_dim), optional
  TensorArg out;                     // (batch, heads, head_dim), contiguous
  const int32_t* indices = nullptr;  // (batch,): the state's row; null: row i; negative: skip
  int64_t indices_stride = 0;
};

}  // namespace mamba
