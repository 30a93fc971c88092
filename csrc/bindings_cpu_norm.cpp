// Add and norm on the CPU as torch operators. Schemas live in mamba_ssm/ops/schema.py.
#include <algorithm>

#include "bindings_common.h"
#include "common/reduce_rows.h"
#include "norm/cpu/norm.h"

namespace mamba {
namespace {

using torch::stable::parallel_for;

constexpr int64_t kGrain = 16384;  // elements that make waking another thread worth it

int64_t grain_of(int64_t elements) {
  return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, elements));
}

Tensor new_floats(const Tensor& like, std::vector<int64_t> sizes) {
  return torch::stable::new_empty(like, sizes, ScalarType::Float);
}

Tensor absent(const Tensor& like) {
  return torch::stable::new_empty(like, std::vector<int64_t>{0});
}

float* floats_of(const Tensor& t) {
  return t.numel() ? static_cast<float*>(t.data_ptr()) : nullptr;
}

NormParams norm_params(const char* op, const Tensor& x, const OptionalTensor& residual,
                       const Tensor& weight, const OptionalTensor& bias, bool is_rms_norm) {
  check_dim(op, "x", x, 2, "(rows, channels)");
  NormParams p;
  p.rows = x.size(0);
  p.size = x.size(1);
  p.is_rms = is_rms_norm;
  p.x = tensor_arg(op, "x", x, {p.rows, p.size}, x);
  p.residual = tensor_arg(op, "residual", residual, {p.rows, p.size}, x);
  p.weight = tensor_arg(op, "weight", weight, {p.size}, x);
  p.bias = tensor_arg(op, "bias", bias, {p.size}, x);
  return p;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_norm_fwd_op(
    Tensor x, OptionalTensor residual, Tensor weight, OptionalTensor bias, double eps,
    bool is_rms_norm, std::optional<ScalarType> residual_dtype) {
  const char* op = "_add_norm_fwd";
  NormParams p = norm_params(op, x, residual, weight, bias, is_rms_norm);
  p.eps = static_cast<float>(eps);
  const ScalarType wanted = residual_dtype.value_or(x.scalar_type());
  STD_TORCH_CHECK(
      wanted == ScalarType::Float || wanted == ScalarType::Half || wanted == ScalarType::BFloat16,
      op, ": residual_dtype must be float32, float16 or bfloat16, got ",
      torch::headeronly::toString(wanted));
  const std::vector<int64_t> sizes{p.rows, p.size};
  Tensor y = torch::stable::new_empty(x, sizes), total = absent(x);
  p.y = tensor_arg(op, "y", y, sizes, x);
  if (residual.has_value() || wanted != x.scalar_type()) {
    total = torch::stable::new_empty(x, sizes, wanted);
    p.residual_out = tensor_arg(op, "residual_out", total, sizes, x);
  }
  Tensor mean = new_floats(x, {is_rms_norm ? 0 : p.rows}), rstd = new_floats(x, {p.rows});
  p.mean = floats_of(mean);
  p.rstd = floats_of(rstd);
  parallel_for(0, p.rows, grain_of(p.size), [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(static_cast<size_t>(norm_scratch_size(p)));
    add_norm_fwd(p, begin, end, scratch.data());
  });
  return {y, total, mean, rstd};
}

// A statistic of the forward pass (rows,), which must be fp32.
float* statistic(const char* op, const char* name, const Tensor& t, int64_t rows, const Tensor& x,
                 int64_t* stride) {
  const TensorArg arg = tensor_arg(op, name, t, {rows}, x);
  STD_TORCH_CHECK(arg.dtype == DType::kFloat32, op, ": ", name, " must be float32, got ",
                  torch::headeronly::toString(t.scalar_type()));
  *stride = arg.stride[0];
  return static_cast<float*>(arg.data);
}

std::tuple<Tensor, Tensor, Tensor> add_norm_bwd_op(Tensor dy, OptionalTensor dresidual_out,
                                                   Tensor x, OptionalTensor residual, Tensor weight,
                                                   OptionalTensor bias, Tensor mean, Tensor rstd,
                                                   bool is_rms_norm) {
  const char* op = "_add_norm_bwd";
  NormParams p = norm_params(op, x, residual, weight, bias, is_rms_norm);
  const std::vector<int64_t> sizes{p.rows, p.size};
  p.dy = tensor_arg(op, "dy", dy, sizes, x);
  p.dresidual_out = tensor_arg(op, "dresidual_out", dresidual_out, sizes, x);
  if (!is_rms_norm) p.mean = statistic(op, "mean", mean, p.rows, x, &p.mean_stride);
  p.rstd = statistic(op, "rstd", rstd, p.rows, x, &p.rstd_stride);
  Tensor dx = new_floats(x, sizes), dweight = new_floats(x, {p.size});
  Tensor dbias = new_floats(x, {bias.has_value() ? p.size : 0});
  p.dx = floats_of(dx);
  const int64_t groups = (p.rows + kNormGroup - 1) / kNormGroup;
  Tensor partial = new_floats(x, {groups, 2, p.size});
  p.partial = floats_of(partial);
  parallel_for(0, groups, grain_of(kNormGroup * p.size), [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(static_cast<size_t>(norm_scratch_size(p)));
    add_norm_bwd(p, begin, end, scratch.data());
  });
  float* const to_weight = floats_of(dweight);
  float* const to_bias = floats_of(dbias);
  const int64_t n = p.size;
  parallel_for(0, n, grain_of(2 * groups), [&](int64_t begin, int64_t end) {
    reduce_rows(p.partial, groups, 2 * n, begin, end);
    if (to_bias) reduce_rows(p.partial, groups, 2 * n, n + begin, n + end);
    for (int64_t i = begin; i < end; ++i) {
      to_weight[i] = groups > 0 ? p.partial[i] : 0.0f;
      if (to_bias) to_bias[i] = groups > 0 ? p.partial[n + i] : 0.0f;
    }
  });
  if (!bias.has_value()) dbias = absent(dy);
  return {dx, dweight, dbias};
}

}  // namespace
}  // namespace mamba

STABLE_TORCH_LIBRARY_IMPL(mamba_ssm, CPU, m) {
  m.impl("_add_norm_fwd", TORCH_BOX(&mamba::add_norm_fwd_op));
  m.impl("_add_norm_bwd", TORCH_BOX(&mamba::add_norm_bwd_op));
}
