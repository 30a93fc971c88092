// Add and norm on the GPU. Every function launches on `stream` (a cudaStream_t) of the current
// device and returns null, or the CUDA runtime's message when a launch failed.
#pragma once

#include "../params.h"

namespace mamba {

// How many blocks share the rows of the backward: the rows of `partial` (groups, ...). It
// depends on the device and the shape only.
int64_t norm_groups_cuda(const NormParams& p);

const char* add_norm_fwd_cuda(const NormParams& p, void* stream);

// Also sums the shares into dweight and, if it is not null, dbias.
const char* add_norm_bwd_cuda(const NormParams& p, int64_t groups, float* dweight, float* dbias,
                              void* stream);

}  // namespace mamba
