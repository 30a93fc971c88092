// The cross-entropy on the GPU as a torch operator. Schemas live in mamba_ssm/ops/schema.py.
#include "bindings_cuda.h"
#include "cross_entropy/cuda/cross_entropy.h"

namespace mamba {
namespace {

Tensor cross_entropy_op(Tensor logits, Tensor targets, int64_t ignore_index) {
  const char* op = "_cross_entropy";
  check_dim(op, "logits", logits, 2, "(tokens, vocabulary)");
  CrossEntropyParams p;
  p.rows = logits.size(0), p.size = logits.size(1), p.ignored = ignore_index;
  p.logits = tensor_arg(op, "logits", logits, {p.rows, p.size}, logits);
  STD_TORCH_CHECK(p.rows * p.size == 0 || logits.stride(1) == 1, op,
                  ": logits must have contiguous rows, got a stride of ", logits.stride(1));
  STD_TORCH_CHECK(p.rows < 2 || logits.stride(0) >= p.size, op,
                  ": the rows of logits are written in place, so they must not overlap");
  STD_TORCH_CHECK(p.rows == 0 || p.size > 0, op, ": logits must have at least one column");
  STD_TORCH_CHECK(targets.scalar_type() == ScalarType::Long &&
                      sizes_of(targets) == std::vector<int64_t>{p.rows} && targets.is_cuda() &&
                      targets.get_device_index() == logits.get_device_index(),
                  op, ": targets must be int64 of shape ", shape_text({p.rows}),
                  " on the device of logits, got ",
                  torch::headeronly::toString(targets.scalar_type()), " ",
                  shape_text(sizes_of(targets)));
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  const Tensor contiguous = contiguous_of(targets);
  p.targets = static_cast<const int64_t*>(contiguous.data_ptr());
  Tensor losses = new_floats(logits, {p.rows});
  p.losses = floats_of(losses);
  check_launch(op, cross_entropy_cuda(p, current_stream(logits)));
  return losses;
}

}  // namespace
}  // namespace mamba

STABLE_TORCH_LIBRARY_IMPL(mamba_ssm, CUDA, m) {
  m.impl("_cross_entropy", TORCH_BOX(&mamba::cross_entropy_op));
}
