#pragma once

#include <cuda_runtime.h>

#include "params.h"

namespace mamba {

// Whether a single row's kernel serves these sizes with `shared` bytes of shared memory for a
// block; completes the plan, whose blocks are set.
bool decode_row_plan(const DecodeCudaSizes& size, int shared, DecodePlan& plan);

cudaError_t decode_row(const DecodeCudaParams& p, cudaStream_t stream);

}  // namespace mamba
