// The CPU kernels as torch operators. Schemas live in mamba_ssm/ops/schema.py.
#include <algorithm>

#include "bindings_common.h"
#include "bindings_threads.h"
#include "state_update/cpu/state_update.h"

namespace mamba {
namespace {

// Two batch entries on one row of the state would race; the CPU can afford to look.
void check_indices(const StateUpdateParams& p) {
  std::vector<int32_t> used;
  for (int64_t i = 0; i < p.batch; ++i) {
    const int32_t slot = p.indices[i * p.indices_stride];
    STD_TORCH_CHECK(slot < p.state_rows, "_state_update: state_batch_indices[", i, "] is ", slot,
                    " but the state has ", p.state_rows, " rows");
    if (slot >= 0) used.push_back(slot);
  }
  std::sort(used.begin(), used.end());
  const auto twice = std::adjacent_find(used.begin(), used.end());
  STD_TORCH_CHECK(twice == used.end(), "_state_update: state_batch_indices names row ", *twice,
                  " more than once; non-negative indices must be distinct");
}

Tensor state_update(Tensor state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C,
                    OptionalTensor D, OptionalTensor z, OptionalTensor dt_bias, bool dt_softplus,
                    OptionalTensor state_batch_indices) {
  StateUpdateParams p =
      state_update_params(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices);
  if (p.indices) check_indices(p);
  Tensor out = allocate_state_update_out(p, x);
  const int64_t rows = p.batch * p.heads * p.head_dim;
  // About 16k state elements (some 20 microseconds) make waking another thread worth it.
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, p.state_dim));
  parallel_for(0, rows, grain,
               [&p](int64_t begin, int64_t end) { state_update_cpu(p, begin, end); });
  return out;
}

}  // namespace
}  // namespace mamba

STABLE_TORCH_LIBRARY_IMPL(mamba_ssm, CPU, m) {
  m.impl("_state_update", TORCH_BOX(&mamba::state_update));
}
