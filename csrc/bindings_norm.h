// Checks and descriptions of add and norm's arguments, shared by the CPU and CUDA bindings.
#pragma once

#include "bindings_common.h"
#include "norm/params.h"

namespace mamba {

inline NormParams norm_params(const char* op, const Tensor& x, const OptionalTensor& residual,
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

// The results of the forward; residual_out and mean are absent where the schema says so.
struct NormResults {
  Tensor y, residual_out, mean, rstd;
};

inline NormResults allocate_norm_results(const char* op, NormParams& p, const Tensor& x,
                                         const OptionalTensor& residual,
                                         std::optional<ScalarType> residual_dtype) {
  const ScalarType wanted = residual_dtype.value_or(x.scalar_type());
  STD_TORCH_CHECK(
      wanted == ScalarType::Float || wanted == ScalarType::Half || wanted == ScalarType::BFloat16,
      op, ": residual_dtype must be float32, float16 or bfloat16, got ",
      torch::headeronly::toString(wanted));
  const std::vector<int64_t> sizes{p.rows, p.size};
  NormResults r{fresh(x, sizes), absent(x), new_floats(x, {p.is_rms ? 0 : p.rows}),
                new_floats(x, {p.rows})};
  p.y = tensor_arg(op, "y", r.y, sizes, x);
  if (residual.has_value() || wanted != x.scalar_type()) {
    r.residual_out = fresh(x, sizes, wanted);
    p.residual_out = tensor_arg(op, "residual_out", r.residual_out, sizes, x);
  }
  p.mean = floats_of(r.mean);
  p.rstd = floats_of(r.rstd);
  return r;
}

// A statistic of the forward pass (rows,), which must be fp32.
inline float* statistic(const char* op, const char* name, const Tensor& t, int64_t rows,
                        const Tensor& x, int64_t* stride) {
  const TensorArg arg = tensor_arg(op, name, t, {rows}, x);
  STD_TORCH_CHECK(arg.dtype == DType::kFloat32, op, ": ", name, " must be float32, got ",
                  torch::headeronly::toString(t.scalar_type()));
  *stride = arg.stride[0];
  return static_cast<float*>(arg.data);
}

inline NormParams norm_bwd_params(const char* op, const Tensor& dy,
                                  const OptionalTensor& dresidual_out, const Tensor& x,
                                  const OptionalTensor& residual, const Tensor& weight,
                                  const OptionalTensor& bias, const Tensor& mean,
                                  const Tensor& rstd, bool is_rms_norm) {
  NormParams p = norm_params(op, x, residual, weight, bias, is_rms_norm);
  const std::vector<int64_t> sizes{p.rows, p.size};
  p.dy = tensor_arg(op, "dy", dy, sizes, x);
  p.dresidual_out = tensor_arg(op, "dresidual_out", dresidual_out, sizes, x);
  if (!is_rms_norm) p.mean = statistic(op, "mean", mean, p.rows, x, &p.mean_stride);
  p.rstd = statistic(op, "rstd", rstd, p.rows, x, &p.rstd_stride);
  return p;
}

struct NormGradients {
  Tensor dx, other;  // `other` is absent unless its dtype is given
};

inline NormGradients allocate_norm_gradients(const char* op, NormParams& p, const Tensor& dy,
                                             std::optional<ScalarType> dx_dtype,
                                             std::optional<ScalarType> other_dtype) {
  const std::vector<int64_t> sizes{p.rows, p.size};
  NormGradients g{fresh(dy, sizes, dx_dtype.value_or(ScalarType::Float)), absent(dy)};
  p.dx = tensor_arg(op, "dx", g.dx, sizes, dy);
  if (other_dtype.has_value()) {
    g.other = fresh(dy, sizes, *other_dtype);
    p.other = tensor_arg(op, "other", g.other, sizes, dy);
  }
  return g;
}

}  // namespace mamba
