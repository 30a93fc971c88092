// What every CUDA binding needs: the current stream and the report of a failed launch.
#pragma once

#include "bindings_common.h"

#ifndef MAMBA_CUDA_ARCHS
#error "the builder defines MAMBA_CUDA_ARCHS, the list of GPU architectures in this library"
#endif

namespace mamba {

inline void* current_stream(const Tensor& t) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return stream;
}

// `error` is null or the CUDA runtime's message.
inline void check_launch(const char* op, const char* error) {
  STD_TORCH_CHECK(error == nullptr, op,
                  ": the CUDA kernel could not be launched: ", error ? error : "",
                  " (this library holds code for ", MAMBA_CUDA_ARCHS,
                  "; `python -m mamba_ssm build` compiles for the GPU of this machine)");
}

}  // namespace mamba
