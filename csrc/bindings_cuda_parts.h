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

// The scan of one sequence a batch row from zero states, with softplus, into `out` of u's layout
// and contiguous fp32 states (b, d, n) and (b, chunks, d, n), on the current device.
void block_scan_forward(const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B,
                        const Tensor& C, const Tensor& D, const Tensor& z,
                        const OptionalTensor& delta_bias, int64_t chunk_size, const Tensor& out,
                        const Tensor& final_state, const Tensor& chunk_states);

// Where a fused backward wants results.
struct ScanGradientsInto {
  // In dout's dtype; ddelta may be delta itself, the others have any strides.
  Tensor ddelta, dz, dB, dC;
  bool dA_times_A = false;  // dA comes multiplied by A, which is contiguous fp32
};
// What was not asked for stays undefined.
NineTensors scan_backward(Tensor dout, OptionalTensor dfinal_state, Tensor u, Tensor delta,
                          Tensor A, Tensor B, Tensor C, OptionalTensor D, OptionalTensor z,
                          OptionalTensor delta_bias, bool delta_softplus,
                          OptionalTensor initial_state, OptionalTensor seq_idx, int64_t num_states,
                          int64_t chunk_size, Tensor chunk_states, const ScanGradientsInto& into);

// The convolution with SiLU of one sequence a batch row, without its final states, into `out`, on
// the current device.
void block_conv_forward(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                        const Tensor& out);

// The convolution with SiLU of the next inputs (b, d, l), whose states are moved on in place.
Tensor conv_step(const Tensor& x, const Tensor& conv_state, const Tensor& weight,
                 const OptionalTensor& bias);

// dx_into: (b, d, l) of any strides for dx. What was not asked for stays undefined.
FourTensors conv_backward(Tensor dout, OptionalTensor dfinal_states, Tensor x, Tensor weight,
                          OptionalTensor bias, OptionalTensor initial_states,
                          OptionalTensor seq_idx, int64_t num_states, bool silu,
                          OptionalTensor dx_into);

// The sum of x and the residual (rows, channels) into residual_out, if given, and its norm into y,
// on the current device.
void block_add_norm(const char* op, const Tensor& x, const OptionalTensor& residual,
                    const Tensor& weight, const OptionalTensor& bias, double eps, bool is_rms_norm,
                    const OptionalTensor& residual_out, const Tensor& y);

}  // namespace mamba
