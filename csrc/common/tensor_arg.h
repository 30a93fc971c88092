// Plain descriptions of tensors, passed from the bindings to the kernels. No framework headers
// here.
#pragma once

#include <cstdint>

namespace mamba {

enum class DType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// A strided view of at most four dimensions. Strides count elements and may be 0. `data` is null
// for an optional tensor that was not given.
struct TensorArg {
  void* data = nullptr;
  int64_t stride[4] = {0, 0, 0, 0};
  DType dtype = DType::kFloat32;
};

}  // namespace mamba
