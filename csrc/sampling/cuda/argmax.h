#pragma once

#include "../../common/tensor_arg.h"

namespace mamba {

struct ArgmaxParams {
  int64_t rows = 0, size = 0;
  TensorArg values;           // (rows, size), elements of a row next to each other
  int64_t* places = nullptr;  // (rows,)
};

// Launches on `stream` (a cudaStream_t) of the current device; null, or the CUDA runtime's message.
const char* argmax_cuda(const ArgmaxParams& p, void* stream);

}  // namespace mamba
