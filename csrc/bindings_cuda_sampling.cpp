// The choice of tokens on the GPU as a torch operator. Schemas live in mamba_ssm/ops/schema.py.
#include "bindings_cuda.h"
#include "sampling/cuda/argmax.h"

namespace mamba {
namespace {

constexpr const char* kOp = "_argmax_rows";

void argmax_rows(Tensor values, Tensor places) {
  check_dim(kOp, "values", values, 2, "(rows, size)");
  ArgmaxParams p;
  p.rows = values.size(0), p.size = values.size(1);
  STD_TORCH_CHECK(p.size > 0 && p.size < int64_t{1} << 31 && p.rows < int64_t{1} << 31, kOp,
                  ": values must have from 1 to 2^31 - 1 columns, got ", p.size);
  p.values = tensor_arg(kOp, "values", values, {p.rows, p.size}, values);
  STD_TORCH_CHECK(values.stride(1) == 1, kOp, ": the numbers of a row must be neighbours");
  STD_TORCH_CHECK(places.scalar_type() == ScalarType::Long && places.is_contiguous() &&
                      sizes_of(places) == std::vector<int64_t>{p.rows} && places.is_cuda() &&
                      places.get_device_index() == values.get_device_index(),
                  kOp, ": places must be contiguous int64 (", p.rows, ",) on the values' device");
  p.places = static_cast<int64_t*>(places.data_ptr());
  if (p.rows == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(values.get_device_index());
  check_launch(kOp, argmax_cuda(p, current_stream(values)));
}

}  // namespace
}  // namespace mamba

STABLE_TORCH_LIBRARY_IMPL(mamba_ssm, CUDA, m) {
  m.impl("_argmax_rows", TORCH_BOX(&mamba::argmax_rows));
}
