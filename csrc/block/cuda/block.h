// On the GPU. Every function launches on `stream` (a cudaStream_t) of the current device and
// returns null, or the CUDA runtime's message when a launch failed.
#pragma once

#include "../params.h"

namespace mamba {

const char* convert_cuda(const Conversions& c, void* stream);
const char* block_columns_cuda(const BlockColumns& c, void* stream);
const char* block_states_cuda(const BlockStates& s, void* stream);

}  // namespace mamba
