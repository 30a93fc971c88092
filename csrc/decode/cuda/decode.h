#pragma once

#include <string>

#include "params.h"

namespace mamba {

// Chooses how the current device works on these sizes; empty, or why it does not.
std::string decode_plan(const DecodeCudaSizes& size, int device, DecodePlan& plan);

// Launches the step on `stream` (a cudaStream_t) of the current device. Returns null, or the CUDA
// runtime's message when the launch failed.
const char* decode_step_cuda(const DecodeCudaParams& p, void* stream);

}  // namespace mamba
