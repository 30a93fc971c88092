// The cross-entropy on the GPU.
#pragma once

#include "../params.h"

namespace mamba {

// Launches on `stream` (a cudaStream_t) of the current device. Returns null, or the CUDA runtime's
// message when the launch failed.
const char* cross_entropy_cuda(const CrossEntropyParams& p, void* stream);

}  // namespace mamba
