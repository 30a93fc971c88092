// Add and norm on the CPU as torch operators. Schemas live in mamba_ssm/ops/schema.py.
#include <algorithm>

#include "bindings_norm.h"
#include "bindings_threads.h"
#include "common/reduce_rows.h"
#include "norm/cpu/norm.h"

namespace mamba {
namespace {

constexpr int64_t kGrain = 16384;  // elements that make waking another thread worth it

int64_t grain_of(int64_t elements) {
  return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, elements));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_norm_fwd_op(
    Tensor x, OptionalTensor residual, Tensor weight, OptionalTensor bias, double eps,
    bool is_rms_norm, std::optional<ScalarType> residual_dtype) {
  const char* op = "_add_norm_fwd";
  NormParams p = norm_params(op, x, residual, weight, bias, is_rms_norm);
  p.eps = static_cast<float>(eps);
  NormResults r = allocate_norm_results(op, p, x, residual, residual_dtype);
  parallel_for(0, p.rows, grain_of(p.size), [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(static_cast<size_t>(norm_scratch_size(p)));
    add_norm_fwd(p, begin, end, scratch.data());
  });
  return {r.y, r.residual_out, r.mean, r.rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_norm_bwd_op(
    Tensor dy, OptionalTensor dresidual_out, Tensor x, OptionalTensor residual, Tensor weight,
    OptionalTensor bias, Tensor mean, Tensor rstd, bool is_rms_norm,
    std::optional<ScalarType> dx_dtype, std::optional<ScalarType> other_dtype) {
  const char* op = "_add_norm_bwd";
  NormParams p =
      norm_bwd_params(op, dy, dresidual_out, x, residual, weight, bias, mean, rstd, is_rms_norm);
  NormGradients g = allocate_norm_gradients(op, p, dy, dx_dtype, other_dtype);
  Tensor dweight = new_floats(x, {p.size});
  Tensor dbias = new_floats(x, {bias.has_value() ? p.size : 0});
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
  return {g.dx, g.other, dweight, dbias};
}

}  // namespace
}  // namespace mamba

STABLE_TORCH_LIBRARY_IMPL(mamba_ssm, CPU, m) {
  m.impl("_add_norm_fwd", TORCH_BOX(&mamba::add_norm_fwd_op));
  m.impl("_add_norm_bwd", TORCH_BOX(&mamba::add_norm_bwd_op));
}
