#pragma once

#include "../params.h"

namespace mamba {

// Null if the kernels serve the call, else why they do not.
const char* mixer_step_refusal(const MixerStepParams& p);

// Whether the convolution's step and x_proj are one kernel: on GPUs with clusters of blocks, where
// it is faster than two.
bool step_project_serves(const MixerStepParams& p);

// These launch on `stream` (a cudaStream_t) of the current device and return null, or the CUDA
// runtime's message. The batch must not be empty.
const char* step_project_cuda(const MixerStepParams& p, void* stream);
const char* step_update_cuda(const MixerStepParams& p, void* stream);

}  // namespace mamba
