#pragma once

#include "../params.h"

namespace mamba {

// Launches the update of every row on `stream` (a cudaStream_t) of the current device. Returns
// null, or the CUDA runtime's message when the launch failed.
const char* state_update_cuda(const StateUpdateParams& p, void* stream);

}  // namespace mamba
