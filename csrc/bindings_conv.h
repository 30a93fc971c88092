// Checks and descriptions of the convolution's arguments, shared by the CPU and CUDA bindings.
#pragma once

#include <algorithm>
#include <tuple>

#include "bindings_layout.h"
#include "causal_conv1d/params.h"

namespace mamba {

inline ConvParams conv_params(const char* op, const Tensor& x, const Tensor& weight,
                              const OptionalTensor& bias, const OptionalTensor& initial,
                              const OptionalTensor& seq_idx, int64_t num_states, bool silu) {
  check_dim(op, "x", x, 3, "(batch, channels, length)");
  check_dim(op, "weight", weight, 2, "(channels, width)");
  ConvParams p;
  p.batch = x.size(0);
  p.channels = x.size(1);
  p.length = x.size(2);
  p.width = weight.size(1);
  p.states = num_states;
  p.silu = silu;
  const int64_t b = p.batch, d = p.channels, l = p.length;
  STD_TORCH_CHECK(p.width > 0, op, ": weight must have a width of at least 1, got shape ",
                  shape_text(sizes_of(weight)));
  STD_TORCH_CHECK(num_states >= 0 && (seq_idx.has_value() || num_states == b), op,
                  ": num_states must be the batch size ", b, " unless seq_idx is given, got ",
                  num_states);
  p.x = tensor_arg(op, "x", x, {b, d, l}, x);
  p.weight = tensor_arg(op, "weight", weight, {d, p.width}, x);
  p.bias = tensor_arg(op, "bias", bias, {d}, x);
  p.initial = tensor_arg(op, "initial_states", initial, {num_states, d, p.width - 1}, x);
  if (seq_idx.has_value()) {
    const auto sizes = sizes_of(*seq_idx);
    STD_TORCH_CHECK(seq_idx->scalar_type() == ScalarType::Int &&
                        seq_idx->is_cuda() == x.is_cuda() &&
                        seq_idx->get_device_index() == x.get_device_index(),
                    op, ": seq_idx must be int32 on the device of x, got ",
                    torch::headeronly::toString(seq_idx->scalar_type()));
    STD_TORCH_CHECK(sizes == std::vector<int64_t>({b, l}), op, ": seq_idx must have shape ",
                    shape_text({b, l}), ", got ", shape_text(sizes));
  }
  return p;
}

inline ConvUpdateParams conv_update_params(const char* op, const Tensor& x,
                                           const Tensor& conv_state, const Tensor& weight,
                                           const OptionalTensor& bias, bool silu) {
  check_dim(op, "x", x, 3, "(batch, channels, length)");
  check_dim(op, "conv_state", conv_state, 3, "(rows, channels, columns)");
  check_dim(op, "weight", weight, 2, "(channels, width)");
  ConvUpdateParams p;
  p.batch = x.size(0);
  p.channels = x.size(1);
  p.length = x.size(2);
  p.width = weight.size(1);
  p.columns = conv_state.size(2);
  p.silu = silu;
  const int64_t d = p.channels, rows = conv_state.size(0);
  STD_TORCH_CHECK(p.width > 0 && p.columns >= p.width - 1, op, ": conv_state has ", p.columns,
                  " columns, but a convolution of width ", p.width, " needs at least ",
                  std::max<int64_t>(p.width - 1, 0), " and a width of at least 1");
  p.x = tensor_arg(op, "x", x, sizes_of(x), x);
  p.state = tensor_arg(op, "conv_state", conv_state, {rows, d, p.columns}, x);
  p.weight = tensor_arg(op, "weight", weight, {d, p.width}, x);
  p.bias = tensor_arg(op, "bias", bias, {d}, x);
  for (int64_t i = 0; i < 3; ++i) {
    STD_TORCH_CHECK(conv_state.size(i) < 2 || conv_state.stride(i) != 0, op,
                    ": conv_state is written in place, so it must not be expanded (dimension ", i,
                    " has stride 0); pass conv_state.clone()");
  }
  return p;
}

}  // namespace mamba
