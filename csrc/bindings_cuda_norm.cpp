// Add and norm on the GPU as torch operators. Schemas live in mamba_ssm/ops/schema.py.
#include "bindings_cuda_parts.h"
#include "bindings_norm.h"
#include "norm/cuda/norm.h"

namespace mamba {

void block_add_norm(const char* op, const Tensor& x, const OptionalTensor& residual,
                    const Tensor& weight, const OptionalTensor& bias, double eps, bool is_rms_norm,
                    const OptionalTensor& residual_out, const Tensor& y) {
  NormParams p = norm_params(op, x, residual, weight, bias, is_rms_norm);
  p.eps = static_cast<float>(eps);
  p.y = tensor_arg(op, "y", y, {p.rows, p.size}, x);
  p.residual_out = tensor_arg(op, "residual_out", residual_out, {p.rows, p.size}, x);
  check_launch(op, add_norm_fwd_cuda(p, current_stream(x)));
}

namespace {

FourTensors add_norm_fwd_op(Tensor x, OptionalTensor residual, Tensor weight, OptionalTensor bias,
                            double eps, bool is_rms_norm,
                            std::optional<ScalarType> residual_dtype) {
  const char* op = "_add_norm_fwd";
  NormParams p = norm_params(op, x, residual, weight, bias, is_rms_norm);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  p.eps = static_cast<float>(eps);
  NormResults r = allocate_norm_results(op, p, x, residual, residual_dtype);
  check_launch(op, add_norm_fwd_cuda(p, current_stream(x)));
  return {r.y, r.residual_out, r.mean, r.rstd};
}

FourTensors add_norm_bwd_op(Tensor dy, OptionalTensor dresidual_out, Tensor x,
                            OptionalTensor residual, Tensor weight, OptionalTensor bias,
                            Tensor mean, Tensor rstd, bool is_rms_norm,
                            std::optional<ScalarType> dx_dtype,
                            std::optional<ScalarType> other_dtype) {
  const char* op = "_add_norm_bwd";
  NormParams p =
      norm_bwd_params(op, dy, dresidual_out, x, residual, weight, bias, mean, rstd, is_rms_norm);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  NormGradients g = allocate_norm_gradients(op, p, dy, dx_dtype, other_dtype);
  Tensor dweight = new_floats(x, {p.size});
  Tensor dbias = bias.has_value() ? new_floats(x, {p.size}) : absent(dy);
  const int64_t groups = norm_groups_cuda(p);
  Tensor partial = new_floats(x, {groups, bias.has_value() ? 2 : 1, p.size});
  p.partial = floats_of(partial);
  check_launch(op,
               add_norm_bwd_cuda(p, groups, floats_of(dweight),
                                 bias.has_value() ? floats_of(dbias) : nullptr, current_stream(x)));
  return {g.dx, g.other, dweight, dbias};
}

}  // namespace
}  // namespace mamba

STABLE_TORCH_LIBRARY_IMPL(mamba_ssm, CUDA, m) {
  m.impl("_add_norm_fwd", TORCH_BOX(&mamba::add_norm_fwd_op));
  m.impl("_add_norm_bwd", TORCH_BOX(&mamba::add_norm_bwd_op));
}
