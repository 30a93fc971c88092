// Checks and conversions shared by the CPU and CUDA bindings. Only the bindings include this: the
// kernels never see torch. Everything here is part of torch's stable ABI (2.10 and later).
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "common/tensor_arg.h"
#include "state_update/params.h"

namespace mamba {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Borrowed sizes or strides: what every call builds and compares must not cost an allocation.
struct Shape {
  const int64_t* data = nullptr;
  size_t count = 0;

  Shape(const int64_t* from, size_t size) : data(from), count(size) {}
  Shape(const std::vector<int64_t>& from) : data(from.data()), count(from.size()) {}
  // To be used within the expression that has the list.
  Shape(std::initializer_list<int64_t> from) { data = from.begin(), count = from.size(); }

  size_t size() const { return count; }
  int64_t operator[](size_t i) const { return data[i]; }
  bool operator==(const Shape& other) const {
    return count == other.count && std::equal(data, data + count, other.data);
  }
};

inline std::string shape_text(const Shape& sizes) {
  std::string text = "(";
  for (size_t i = 0; i < sizes.size(); ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + ")";
}

inline Shape shape_of(const Tensor& t) {
  int64_t* sizes = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(t.get(), &sizes));
  return {sizes, static_cast<size_t>(t.dim())};
}

inline Shape strides_of(const Tensor& t) {
  int64_t* strides = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(t.get(), &strides));
  return {strides, static_cast<size_t>(t.dim())};
}

inline std::vector<int64_t> sizes_of(const Tensor& t) {
  std::vector<int64_t> sizes(static_cast<size_t>(t.dim()));
  for (size_t i = 0; i < sizes.size(); ++i) sizes[i] = t.size(static_cast<int64_t>(i));
  return sizes;
}

inline void check_dim(const char* op, const char* name, const Tensor& t, int64_t dim,
                      const char* meaning) {
  STD_TORCH_CHECK(t.dim() == dim, op, ": ", name, " must have ", dim, " dimensions ", meaning,
                  ", got shape ", shape_text(sizes_of(t)));
}

inline DType dtype_of(const char* op, const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      STD_TORCH_CHECK(false, op, ": ", name, " must be float32, float16 or bfloat16, got ",
                      torch::headeronly::toString(t.scalar_type()));
  }
}

// Checks shape, dtype and device (that of `like`) and describes the tensor for a kernel.
inline TensorArg tensor_arg(const char* op, const char* name, const Tensor& t, const Shape& shape,
                            const Tensor& like) {
  const Shape sizes = shape_of(t), strides = strides_of(t);
  STD_TORCH_CHECK(sizes == shape, op, ": ", name, " must have shape ", shape_text(shape), ", got ",
                  shape_text(sizes));
  STD_TORCH_CHECK(t.is_cuda() == like.is_cuda() && t.get_device_index() == like.get_device_index(),
                  op, ": ", name, " must be on the same device as the state");
  TensorArg arg;
  arg.dtype = dtype_of(op, name, t);
  arg.data = t.numel() ? t.data_ptr() : nullptr;
  for (size_t i = 0; i < strides.size(); ++i) arg.stride[i] = strides[i];
  return arg;
}

inline TensorArg tensor_arg(const char* op, const char* name, const OptionalTensor& t,
                            const Shape& shape, const Tensor& like) {
  return t.has_value() ? tensor_arg(op, name, *t, shape, like) : TensorArg{};
}

// Fresh memory on the device of `like`, in its dtype unless another is wanted. Past the dispatcher,
// which costs the host more than the allocation does.
inline Tensor fresh_strided(const Tensor& like, const Shape& sizes, const Shape& strides,
                            std::optional<ScalarType> dtype = std::nullopt) {
  int32_t type = 0, device_type = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  if (dtype.has_value()) {
    type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(*dtype));
  } else {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &type));
  }
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data, strides.data, type,
                               device_type, like.get_device_index(), &handle));
  return Tensor(handle);
}

inline Tensor fresh(const Tensor& like, const Shape& sizes,
                    std::optional<ScalarType> dtype = std::nullopt) {
  constexpr size_t kMostDims = 4;
  STD_TORCH_CHECK(sizes.size() <= kMostDims, "more than ", kMostDims, " dimensions");
  int64_t strides[kMostDims], step = 1;
  for (size_t i = sizes.size(); i-- > 0;) strides[i] = step, step *= std::max<int64_t>(sizes[i], 1);
  return fresh_strided(like, sizes, {strides, sizes.size()}, dtype);
}

inline Tensor new_floats(const Tensor& like, const Shape& sizes) {
  return fresh(like, sizes, ScalarType::Float);
}

inline Tensor contiguous_of(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

// What stands for a result that does not exist.
inline Tensor absent(const Tensor& like) { return fresh(like, {0}); }

inline float* floats_of(const Tensor& t) {
  return t.numel() ? static_cast<float*>(t.data_ptr()) : nullptr;
}

// Validates a call of mamba_ssm::_state_update before anything is allocated or written.
inline StateUpdateParams state_update_params(const Tensor& state, const Tensor& x, const Tensor& dt,
                                             const Tensor& A, const Tensor& B, const Tensor& C,
                                             const OptionalTensor& D, const OptionalTensor& z,
                                             const OptionalTensor& dt_bias, bool dt_softplus,
                                             const OptionalTensor& indices) {
  const char* op = "_state_update";
  check_dim(op, "state", state, 4, "(rows, heads, head_dim, state_dim)");
  check_dim(op, "x", x, 3, "(batch, heads, head_dim)");
  check_dim(op, "B", B, 3, "(batch, groups, state_dim)");
  StateUpdateParams p;
  p.state_rows = state.size(0);
  p.batch = x.size(0);
  p.heads = state.size(1);
  p.head_dim = state.size(2);
  p.state_dim = state.size(3);
  p.groups = B.size(1);
  p.dt_softplus = dt_softplus;
  const int64_t b = p.batch, h = p.heads, d = p.head_dim, n = p.state_dim, g = p.groups;
  STD_TORCH_CHECK(g > 0 && h % g == 0, op, ": the number of heads, ", h,
                  ", must be a multiple of the number of groups of B and C, ", g);
  p.state = tensor_arg(op, "state", state, {p.state_rows, h, d, n}, state);
  p.x = tensor_arg(op, "x", x, {b, h, d}, state);
  p.dt = tensor_arg(op, "dt", dt, {b, h, d}, state);
  p.A = tensor_arg(op, "A", A, {h, d, n}, state);
  p.B = tensor_arg(op, "B", B, {b, g, n}, state);
  p.C = tensor_arg(op, "C", C, {b, g, n}, state);
  p.D = tensor_arg(op, "D", D, {h, d}, state);
  p.z = tensor_arg(op, "z", z, {b, h, d}, state);
  p.dt_bias = tensor_arg(op, "dt_bias", dt_bias, {h, d}, state);
  for (int64_t i = 0; i < 4; ++i) {
    STD_TORCH_CHECK(state.size(i) < 2 || state.stride(i) != 0, op,
                    ": state is written in place, so it must not be expanded (dimension ", i,
                    " has stride 0); pass state.clone()");
  }
  if (indices.has_value()) {
    const auto sizes = sizes_of(*indices);
    STD_TORCH_CHECK(indices->scalar_type() == ScalarType::Int, op,
                    ": state_batch_indices must be int32, got ",
                    torch::headeronly::toString(indices->scalar_type()));
    STD_TORCH_CHECK(sizes == std::vector<int64_t>{b}, op, ": state_batch_indices must have shape ",
                    shape_text({b}), ", got ", shape_text(sizes));
    STD_TORCH_CHECK(indices->is_cuda() == state.is_cuda() &&
                        indices->get_device_index() == state.get_device_index(),
                    op, ": state_batch_indices must be on the same device as the state");
    p.indices = static_cast<const int32_t*>(indices->data_ptr());
    p.indices_stride = indices->stride(0);
  } else {
    STD_TORCH_CHECK(p.state_rows == b, op, ": state has ", p.state_rows, " rows but x has ", b,
                    "; they must be equal unless state_batch_indices is given");
  }
  return p;
}

// The output of mamba_ssm::_state_update: (batch, heads, head_dim), contiguous, in x's dtype.
inline Tensor allocate_state_update_out(StateUpdateParams& p, const Tensor& x) {
  const std::vector<int64_t> sizes{p.batch, p.heads, p.head_dim};
  Tensor out = fresh(x, sizes);
  p.out = tensor_arg("_state_update", "out", out, sizes, x);
  return out;
}

}  // namespace mamba
