// One token of the Mamba mixer between its two large projections. Schemas live in
// mamba_ssm/ops/schema.py.
#include "bindings_cuda_parts.h"
#include "bindings_cuda_views.h"
#include "mixer_step/cuda/mixer_step.h"

namespace mamba {
namespace {

constexpr const char* kOp = "_mixer_step";
constexpr int64_t kWidth = 4, kStates = 16;

// A contiguous tensor at an address that vectors can be read from.
TensorArg step_arg(const char* name, const Tensor& t, const std::vector<int64_t>& shape,
                   const Tensor& like) {
  const TensorArg arg = tensor_arg(kOp, name, t, shape, like);
  STD_TORCH_CHECK(t.is_contiguous() && reinterpret_cast<uintptr_t>(arg.data) % 16 == 0, kOp, ": ",
                  name, " must be contiguous and start at a multiple of 16 bytes");
  return arg;
}

TensorArg step_arg(const char* name, const OptionalTensor& t, const std::vector<int64_t>& shape,
                   const Tensor& like) {
  return t.has_value() ? step_arg(name, *t, shape, like) : TensorArg{};
}

// One of the matrices and vectors that share a dtype of 16 bits.
void* of_dtype(const char* name, const Tensor& t, const std::vector<int64_t>& shape,
               const Tensor& like) {
  const TensorArg arg = step_arg(name, t, shape, like);
  STD_TORCH_CHECK(t.scalar_type() == like.scalar_type(), kOp, ": ", name, " must be ",
                  torch::headeronly::toString(like.scalar_type()), ", got ",
                  torch::headeronly::toString(t.scalar_type()));
  return arg.data;
}

Tensor mixer_step(Tensor xz, Tensor conv_weight, OptionalTensor conv_bias, Tensor x_proj,
                  Tensor dt_proj, OptionalTensor dt_bias, Tensor A_log, Tensor D, Tensor conv_state,
                  Tensor ssm_state) {
  check_dim(kOp, "xz", xz, 2, "(batch, 2 channels)");
  check_dim(kOp, "x_proj", x_proj, 2, "(rank + 2 states, channels)");
  check_dim(kOp, "dt_proj", dt_proj, 2, "(channels, rank)");
  MixerStepParams p;
  p.batch = xz.size(0), p.channels = dt_proj.size(0), p.rank = dt_proj.size(1);
  p.projected = p.rank + 2 * kStates;
  p.dtype = dtype_of(kOp, "xz", xz);
  STD_TORCH_CHECK(p.dtype != DType::kFloat32, kOp, ": xz must be float16 or bfloat16");
  const int64_t b = p.batch, d = p.channels;
  p.xz = of_dtype("xz", xz, {b, 2 * d}, xz);
  p.x_proj = of_dtype("x_proj", x_proj, {p.projected, d}, xz);
  p.dt_proj = of_dtype("dt_proj", dt_proj, {d, p.rank}, xz);
  p.conv_state = of_dtype("conv_state", conv_state, {b, d, kWidth}, xz);
  p.conv_weight = step_arg("conv_weight", conv_weight, {d, kWidth}, xz);
  p.conv_bias = step_arg("conv_bias", conv_bias, {d}, xz);
  p.dt_bias = step_arg("dt_bias", dt_bias, {d}, xz);
  p.A_log = step_arg("A_log", A_log, {d, kStates}, xz);
  p.D = step_arg("D", D, {d}, xz);
  const TensorArg state = step_arg("ssm_state", ssm_state, {b, d, kStates}, xz);
  p.state = state.data, p.state_dtype = state.dtype;
  STD_TORCH_CHECK(p.state_dtype == DType::kFloat32 || p.state_dtype == p.dtype, kOp,
                  ": ssm_state must be float32 or xz's dtype");
  const torch::stable::accelerator::DeviceGuard guard(xz.get_device_index());
  const char* const refusal = mixer_step_refusal(p);
  STD_TORCH_CHECK(refusal == nullptr, kOp,
                  ": the kernel does not serve this call: ", refusal ? refusal : "");
  Tensor y = fresh(xz, {b, d});
  if (b == 0) return y;
  void* const stream = current_stream(xz);
  const Tensor selected = fresh(xz, {b, p.projected});
  p.selected = selected.data_ptr();
  const bool at_once = step_project_serves(p);
  const Tensor x =
      at_once ? fresh(xz, {b, d})
              : conv_step(view(xz, {b, d, 1}, {2 * d, 1, 1}), conv_state, conv_weight, conv_bias);
  p.x = x.data_ptr();
  if (at_once) {
    check_launch(kOp, step_project_cuda(p, stream));
  } else {
    multiply_into(selected, view(x, {b, d}, {d, 1}), transposed(x_proj));
  }
  p.y = y.data_ptr();
  check_launch(kOp, step_update_cuda(p, stream));
  return y;
}

}  // namespace
}  // namespace mamba

STABLE_TORCH_LIBRARY_IMPL(mamba_ssm, CUDA, m) {
  m.impl("_mixer_step", TORCH_BOX(&mamba::mixer_step));
}
