#pragma once

#include <cuda_runtime.h>

#include "params.h"

namespace mamba {

// Whether a single row's kernel, which needs compute capability 9.0, serves these sizes on a device
// with `shared` bytes of shared memory for a block; completes the plan, whose blocks are set.
bool decode_row_plan(const DecodeCudaSizes& size, int device, int shared, DecodePlan& plan);

cudaError_t decode_row(const DecodeCudaParams& p, cudaStream_t stream);

}  // namespace mamba
