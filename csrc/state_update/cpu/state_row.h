// One row of the recurrence's step, compiled per instruction set.
#pragma once

#include <cstdint>

#include "../../common/cpu_isa.h"

namespace mamba {

// s = s * exp(dt * A) + B * input over n states, in place; returns the sum of s * C. With a null A,
// `shared_A` is A at every state.
using AdvanceStateRow = float (*)(float* s, const float* A, float shared_A, const float* B,
                                  const float* C, float dt, float input, int64_t n);

MAMBA_DECLARE_ISA(AdvanceStateRow advance_state_row_function())

// The one for the instruction set in use.
inline AdvanceStateRow advance_state_row_function() { MAMBA_FOR_ISA(advance_state_row_function) }

}  // namespace mamba
