// The CUDA kernels as torch operators. Schemas live in mamba_ssm/ops/schema.py.
#include "bindings_cuda.h"
#include "state_update/cuda/state_update.h"

namespace mamba {
namespace {

Tensor state_update(Tensor state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C,
                    OptionalTensor D, OptionalTensor z, OptionalTensor dt_bias, bool dt_softplus,
                    OptionalTensor state_batch_indices) {
  StateUpdateParams p =
      state_update_params(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices);
  const torch::stable::accelerator::DeviceGuard guard(state.get_device_index());
  Tensor out = allocate_state_update_out(p, x);
  check_launch("_state_update", state_update_cuda(p, current_stream(state)));
  return out;
}

}  // namespace
}  // namespace mamba

// The architectures compiled in, such as "8.0;9.0+PTX"; mamba_ssm/ops/native.py reads it.
extern "C" __attribute__((visibility("default"))) const char* mamba_ssm_cuda_archs() {
  return MAMBA_CUDA_ARCHS;
}

STABLE_TORCH_LIBRARY_IMPL(mamba_ssm, CUDA, m) {
  m.impl("_state_update", TORCH_BOX(&mamba::state_update));
}
