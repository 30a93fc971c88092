// The CUDA operators as fused ones call them: what they return may be written into memory that the
// caller brings.
#pragma once

#include <tuple>

#include "bindings_cuda.h"

namespace mamba {

using ThreeTensors = std::tuple<Tensor, Tensor, Tensor>;
using FourTensors = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using NineTensors =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

ThreeTensors selective_scan_fwd(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C,
                                OptionalTensor D, OptionalTensor z, OptionalTensor delta_bias,
                                bool delta_softplus, OptionalTensor initial_state,
                                OptionalTensor seq_idx, int64_t num_states, int64_t chunk_size);

// dz_into: (b, d, l) of any strides for dz. ddelta_in_place: delta is overwritten by its gradient.
NineTensors scan_backward(Tensor dout, OptionalTensor dfinal_state, Tensor u, Tensor delta,
                          Tensor A, Tensor B, Tensor C, OptionalTensor D, OptionalTensor z,
                          OptionalTensor delta_bias, bool delta_softplus,
                          OptionalTensor initial_state, OptionalTensor seq_idx, int64_t num_states,
                          int64_t chunk_size, Tensor chunk_states, OptionalTensor dz_into,
                          bool ddelta_in_place);

// The convolution with SiLU of one sequence a batch row, without its final states.
Tensor block_conv_forward(const Tensor& x, const Tensor& weight, const OptionalTensor& bias);

// The convolution with SiLU of the next inputs (b, d, l), whose states are moved on in place.
Tensor conv_step(const Tensor& x, const Tensor& conv_state, const Tensor& weight,
                 const OptionalTensor& bias);

// dx_into: (b, d, l) of any strides for dx.
FourTensors conv_backward(Tensor dout, OptionalTensor dfinal_states, Tensor x, Tensor weight,
                          OptionalTensor bias, OptionalTensor initial_states,
                          OptionalTensor seq_idx, int64_t num_states, bool silu,
                          OptionalTensor dx_into);

// The sum of x and the residual (rows, channels) and its norm: (y, residual_out, mean, rstd);
// residual_out is absent where it would be x. On the current device.
FourTensors add_norm_forward(const char* op, const Tensor& x, const OptionalTensor& residual,
                             const Tensor& weight, const OptionalTensor& bias, double eps,
                             bool is_rms_norm, std::optional<ScalarType> residual_dtype);

}  // namespace mamba
