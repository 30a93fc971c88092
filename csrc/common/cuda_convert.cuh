// Loads and stores of fp32, fp16 and bf16 through fp32 on the GPU, by static type or by run-time
// code.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "tensor_arg.h"

namespace mamba {

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

__device__ __forceinline__ float load_float(const void* data, DType dtype, int64_t offset) {
  switch (dtype) {
    case DType::kFloat16:
      return to_float(static_cast<const __half*>(data)[offset]);
    case DType::kBFloat16:
      return to_float(static_cast<const __nv_bfloat16*>(data)[offset]);
    default:
      return static_cast<const float*>(data)[offset];
  }
}

__device__ __forceinline__ void store_float(void* data, DType dtype, int64_t offset, float value) {
  switch (dtype) {
    case DType::kFloat16:
      static_cast<__half*>(data)[offset] = from_float<__half>(value);
      break;
    case DType::kBFloat16:
      static_cast<__nv_bfloat16*>(data)[offset] = from_float<__nv_bfloat16>(value);
      break;
    default:
      static_cast<float*>(data)[offset] = value;
  }
}

__device__ __forceinline__ float load_at(const TensorArg& t, int64_t i, int64_t j, int64_t k) {
  return load_float(t.data, t.dtype, i * t.stride[0] + j * t.stride[1] + k * t.stride[2]);
}

__device__ __forceinline__ float load_at(const TensorArg& t, int64_t i, int64_t j) {
  return load_float(t.data, t.dtype, i * t.stride[0] + j * t.stride[1]);
}

}  // namespace mamba
