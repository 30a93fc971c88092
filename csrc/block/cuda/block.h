// On the GPU. Every function launches on `stream` (a cudaStream_t) of the current device and
// returns null, or the CUDA runtime's message when a launch failed.
#pragma once

#include "../params.h"

namespace mamba {

// Makes the current device this thread's, which a kernel does by itself: torch warns where a
// thread's first work on a GPU is a matrix product.
const char* enter_device_cuda();
const char* convert_cuda(const Conversions& c, void* stream);
const char* block_states_cuda(const BlockStates& s, void* stream);

}  // namespace mamba
