// The selective scan's arguments as the kernels see them: pointers, strides and sizes.
#pragma once

#include <cstdint>

#include "../common/tensor_arg.h"

namespace mamba {

// Strides are those of the tensors: (b, d, l) for u, delta, z, out and their gradients; (d, n) for
// A and for constant B and C; (b, g, n, l) for variable ones; (d,) for D and delta_bias; (b, l) for
// seq_idx. States are contiguous fp32: initial and final (S, d, n), chunk states (b, k, d, n).
struct ScanParams {
  int64_t batch = 0, channels = 0, length = 0, state_dim = 0;
  int64_t groups = 1, num_states = 0, chunk_size = 1, chunks = 0;
  bool delta_softplus = false, constant_B = false, constant_C = false;
  TensorArg u, delta, A, B, C, D, z, delta_bias, out;
  const float* initial_state = nullptr;
  float* final_state = nullptr;
  float* chunk_states = nullptr;  // written by the forward, read by the backward
  const int32_t* seq_idx = nullptr;
  int64_t seq_idx_stride[2] = {0, 0};

  int64_t group_channels() const { return channels / groups; }
};

struct ScanGradients {
  ScanParams forward;
  TensorArg dout, du, ddelta, dz;
  const float* dfinal_state = nullptr;  // (S, d, n)
  float* dinitial_state = nullptr;      // (S, d, n), zeroed
  float* dA = nullptr;                  // per batch row, or segment of it: (b, d, n)
  float* dD = nullptr;                  // (b, d)
  float* ddelta_bias = nullptr;         // (b, d)
  // Sums over the channels of one slice: (b, slices, n, l), or for a constant per batch row (b, d,
  // n).
  float* dB = nullptr;
  float* dC = nullptr;
};

}  // namespace mamba
