// The causal convolution on the GPU as torch operators. Schemas live in mamba_ssm/ops/schema.py.
#include "bindings_conv.h"
#include "bindings_cuda_parts.h"
#include "causal_conv1d/cuda/conv.h"

namespace mamba {
namespace {

using Sizes = std::vector<int64_t>;

// What seq_idx means, and the memory that holds it.
struct Links {
  ConvLinks links;
  std::vector<Tensor> kept;

  Links(const char* op, const ConvParams& p, const Tensor& x, const OptionalTensor& seq_idx,
        void* stream) {
    if (!seq_idx.has_value()) return;
    kept.push_back(contiguous_of(*seq_idx));
    links.ids = static_cast<const int*>(kept.back().data_ptr());
    const auto integers = [&](const Sizes& sizes, ScalarType type) {
      kept.push_back(fresh(x, sizes, type));
      return kept.back().data_ptr();
    };
    // At least one element: a null pointer would mean that nothing is packed.
    const int64_t steps = std::max<int64_t>(1, p.batch * p.length);
    auto* previous = static_cast<int*>(integers({steps}, ScalarType::Int));
    auto* following = static_cast<int*>(integers({steps}, ScalarType::Int));
    auto* last =
        static_cast<long long*>(integers({std::max<int64_t>(1, p.states)}, ScalarType::Long));
    check_launch(op, conv_links_cuda(p, links.ids, previous, following, last, stream));
    links.previous = previous, links.following = following, links.last = last;
  }
};

std::tuple<Tensor, Tensor> conv_fwd(Tensor x, Tensor weight, OptionalTensor bias,
                                    OptionalTensor initial_states, OptionalTensor seq_idx,
                                    int64_t num_states, bool silu) {
  const char* op = "_causal_conv1d_fwd";
  CudaConvParams c;
  ConvParams& p = c.p;
  p = conv_params(op, x, weight, bias, initial_states, seq_idx, num_states, silu);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  void* const stream = current_stream(x);
  const Sizes state_sizes{num_states, p.channels, p.width - 1};
  Tensor out = empty_like_layout(x), final = fresh(x, state_sizes);
  p.out = tensor_arg(op, "out", out, sizes_of(x), x);
  p.final = tensor_arg(op, "final_states", final, state_sizes, x);
  const Links links(op, p, x, seq_idx, stream);
  c.links = links.links;
  check_launch(op, conv_fwd_cuda(c, stream));
  return {out, final};
}

// dout in the memory order of x, which the fast kernels need.
Tensor laid_out_like(const Tensor& dout, const Tensor& x) {
  const bool channel_last = is_channel_last(x);
  if (dout.stride(channel_last ? 1 : 2) == 1) return dout;
  Tensor copy = empty_like_layout(x);
  torch::stable::copy_(copy, dout);
  return copy;
}

}  // namespace

void block_conv_forward(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                        const Tensor& out) {
  const char* op = "_causal_conv1d_fwd";
  CudaConvParams c;
  c.p = conv_params(op, x, weight, bias, std::nullopt, std::nullopt, x.size(0), true);
  c.p.out = tensor_arg(op, "out", out, shape_of(x), x);
  check_launch(op, conv_fwd_cuda(c, current_stream(x)));
}

FourTensors conv_backward(Tensor dout, OptionalTensor dfinal_states, Tensor x, Tensor weight,
                          OptionalTensor bias, OptionalTensor initial_states,
                          OptionalTensor seq_idx, int64_t num_states, bool silu,
                          OptionalTensor dx_into) {
  const char* op = "_causal_conv1d_bwd";
  CudaConvParams c;
  ConvParams& p = c.p;
  p = conv_params(op, x, weight, bias, initial_states, seq_idx, num_states, silu);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  void* const stream = current_stream(x);
  const int64_t d = p.channels;
  const Sizes state_sizes{num_states, d, p.width - 1};
  p.dout = tensor_arg(op, "dout", dout, sizes_of(x), x);
  p.dfinal = tensor_arg(op, "dfinal_states", dfinal_states, state_sizes, x);
  if (p.dout.dtype == p.x.dtype) {
    dout = laid_out_like(dout, x);
    p.dout = tensor_arg(op, "dout", dout, sizes_of(x), x);
  }
  Tensor dx = dx_into.has_value() ? *dx_into : empty_like_layout(x);
  Tensor dweight = new_floats(x, {d, p.width});
  Tensor dbias = bias.has_value() ? new_floats(x, {d}) : Tensor();
  p.dx = tensor_arg(op, "dx", dx, sizes_of(x), x);
  const Links links(op, p, x, seq_idx, stream);
  c.links = links.links;
  Tensor gradient;
  if (conv_needs_gradient_cuda(c)) {
    gradient = new_floats(x, {p.batch, d, p.length});
    c.gradient = floats_of(gradient);
  }
  Tensor partial = new_floats(x, {conv_groups_cuda(c), d, p.width + 1});
  c.partial = floats_of(partial);
  c.dweight = floats_of(dweight);
  c.dbias = bias.has_value() ? floats_of(dbias) : nullptr;
  Tensor dinitial = initial_states.has_value() ? new_floats(x, state_sizes) : Tensor();
  p.dinitial = initial_states.has_value() ? floats_of(dinitial) : nullptr;
  check_launch(op, conv_bwd_cuda(c, stream));
  if (initial_states.has_value() && p.x.dtype != DType::kFloat32) {
    dinitial = torch::stable::to(dinitial, std::make_optional(x.scalar_type()));
  }
  return {dx, dweight, dbias, dinitial};
}

namespace {

FourTensors conv_bwd(Tensor dout, OptionalTensor dfinal_states, Tensor x, Tensor weight,
                     OptionalTensor bias, OptionalTensor initial_states, OptionalTensor seq_idx,
                     int64_t num_states, bool silu) {
  FourTensors all = conv_backward(dout, dfinal_states, x, weight, bias, initial_states, seq_idx,
                                  num_states, silu, std::nullopt);
  for (Tensor* t : {&std::get<2>(all), &std::get<3>(all)}) {
    if (!t->defined()) *t = absent(x);
  }
  return all;
}

// Integers (count,) on the GPU as the kernel reads them; bytes is 0 for uint8.
const void* integers(const char* op, const char* name, const OptionalTensor& t, int64_t count,
                     const Tensor& x, int* bytes, int64_t* stride) {
  if (!t.has_value()) return nullptr;
  STD_TORCH_CHECK(
      sizes_of(*t) == Sizes{count} && t->is_cuda() && t->get_device_index() == x.get_device_index(),
      op, ": ", name, " must have shape ", shape_text({count}), " on the device of x, got ",
      shape_text(sizes_of(*t)));
  switch (t->scalar_type()) {
    case ScalarType::Long:
      *bytes = 8;
      break;
    case ScalarType::Int:
      *bytes = 4;
      break;
    case ScalarType::Short:
      *bytes = 2;
      break;
    case ScalarType::Char:
      *bytes = 1;
      break;
    case ScalarType::Byte:
      *bytes = 0;
      break;
    default:
      STD_TORCH_CHECK(false, op, ": ", name, " must hold integers, got ",
                      torch::headeronly::toString(t->scalar_type()));
  }
  *stride = t->stride(0);
  return t->data_ptr();
}

Tensor conv_update_op(Tensor x, Tensor conv_state, Tensor weight, OptionalTensor bias, bool silu,
                      OptionalTensor cache_seqlens, OptionalTensor conv_state_indices) {
  const char* op = "_causal_conv1d_update";
  CudaConvUpdateParams c;
  c.p = conv_update_params(op, x, conv_state, weight, bias, silu);
  c.state_rows = conv_state.size(0);
  STD_TORCH_CHECK(conv_state_indices.has_value() || c.state_rows == c.p.batch, op,
                  ": conv_state has ", c.state_rows, " rows but x has ", c.p.batch,
                  "; they must be equal unless conv_state_indices is given");
  c.rows = integers(op, "conv_state_indices", conv_state_indices, c.p.batch, x, &c.rows_bytes,
                    &c.rows_stride);
  c.start =
      integers(op, "cache_seqlens", cache_seqlens, c.p.batch, x, &c.start_bytes, &c.start_stride);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor out = fresh(x, sizes_of(x));
  c.p.out = tensor_arg(op, "out", out, sizes_of(x), x);
  check_launch(op, conv_update_cuda(c, current_stream(x)));
  return out;
}

}  // namespace

Tensor conv_step(const Tensor& x, const Tensor& conv_state, const Tensor& weight,
                 const OptionalTensor& bias) {
  return conv_update_op(x, conv_state, weight, bias, true, std::nullopt, std::nullopt);
}

}  // namespace mamba

STABLE_TORCH_LIBRARY_IMPL(mamba_ssm, CUDA, m) {
  m.impl("_causal_conv1d_fwd", TORCH_BOX(&mamba::conv_fwd));
  m.impl("_causal_conv1d_bwd", TORCH_BOX(&mamba::conv_bwd));
  m.impl("_causal_conv1d_update", TORCH_BOX(&mamba::conv_update_op));
}
