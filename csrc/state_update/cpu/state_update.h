#pragma once

#include "../params.h"

namespace mamba {

// Updates the rows [begin, end) of the flattened (batch, heads, head_dim); safe to call from
// several threads on disjoint ranges when no two batch entries name the same row of the state.
void state_update_cpu(const StateUpdateParams& p, int64_t begin, int64_t end);

}  // namespace mamba
