// Eight neighbouring elements of a row as floats, 16 bytes an access where the row allows it.
#pragma once

#include <type_traits>

#include "cuda_convert.cuh"

namespace mamba {

constexpr int kVector = 8;

__device__ __forceinline__ float2 halves_to_floats(uint32_t word, bool bf16) {
  if (bf16) return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
  return __half22float2(*reinterpret_cast<const __half2*>(&word));
}

__device__ __forceinline__ uint32_t floats_to_halves(float low, float high, bool bf16) {
  if (bf16) {
    const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&v);
  }
  const __half2 v = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&v);
}

// N (2, 4 or 8) elements from an aligned address of memory that the kernel does not write.
template <int N>
__device__ __forceinline__ void load_aligned(float (&v)[N], const void* data, DType dtype,
                                             int64_t offset) {
  static_assert(N == 2 || N == 4 || N == 8, "a vector holds two, four or eight elements");
  if (N == 2 && dtype == DType::kFloat32) {
    const float2 two =
        __ldg(reinterpret_cast<const float2*>(static_cast<const float*>(data) + offset));
    v[0] = two.x, v[1] = two.y;
    return;
  }
  if (dtype == DType::kFloat32) {
    const float4* from = reinterpret_cast<const float4*>(static_cast<const float*>(data) + offset);
#pragma unroll
    for (int i = 0; i < N / 4; ++i) {
      const float4 four = __ldg(from + i);
      v[4 * i] = four.x, v[4 * i + 1] = four.y, v[4 * i + 2] = four.z, v[4 * i + 3] = four.w;
    }
    return;
  }
  const bool bf16 = dtype == DType::kBFloat16;
  const uint16_t* from = static_cast<const uint16_t*>(data) + offset;
  uint32_t words[N / 2];
  if constexpr (N == 8) {
    const uint4 eight = __ldg(reinterpret_cast<const uint4*>(from));
    words[0] = eight.x, words[1] = eight.y, words[2] = eight.z, words[3] = eight.w;
  } else if constexpr (N == 2) {
    words[0] = __ldg(reinterpret_cast<const uint32_t*>(from));
  } else {
    const uint2 four = __ldg(reinterpret_cast<const uint2*>(from));
    words[0] = four.x, words[1] = four.y;
  }
#pragma unroll
  for (int i = 0; i < N / 2; ++i) {
    const float2 two = halves_to_floats(words[i], bf16);
    v[2 * i] = two.x, v[2 * i + 1] = two.y;
  }
}

// The same in two steps: what is loaded is on its way until `floats` asks for it.
template <int N>
struct RawFloats {
  static_assert(N == 2 || N == 8, "a vector holds two or eight elements");
  uint32_t words[N];

  __device__ __forceinline__ void load(const void* data, DType dtype, int64_t offset) {
    using Vector = std::conditional_t<N == 2, uint32_t, uint4>;  // N halves
    constexpr int kWords = sizeof(Vector) / 4;
    const bool wide = dtype == DType::kFloat32;
    const auto* from =
        reinterpret_cast<const Vector*>(static_cast<const char*>(data) + offset * (wide ? 4 : 2));
    *reinterpret_cast<Vector*>(words) = __ldg(from);
    if (wide) *reinterpret_cast<Vector*>(words + kWords) = __ldg(from + 1);
  }
  __device__ __forceinline__ void floats(float (&v)[N], DType dtype) const {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float2 two = halves_to_floats(words[i / 2], dtype == DType::kBFloat16);
      v[i] = dtype == DType::kFloat32 ? __uint_as_float(words[i]) : i % 2 ? two.y : two.x;
    }
  }
};

template <int N>
__device__ __forceinline__ void store_aligned(const float (&v)[N], void* data, DType dtype,
                                              int64_t offset) {
  static_assert(N == 2 || N == 4 || N == 8, "a vector holds two, four or eight elements");
  if (N == 2 && dtype == DType::kFloat32) {
    *reinterpret_cast<float2*>(static_cast<float*>(data) + offset) = make_float2(v[0], v[1]);
    return;
  }
  if (dtype == DType::kFloat32) {
    float4* to = reinterpret_cast<float4*>(static_cast<float*>(data) + offset);
#pragma unroll
    for (int i = 0; i < N / 4; ++i) {
      to[i] = make_float4(v[4 * i], v[4 * i + 1], v[4 * i + 2], v[4 * i + 3]);
    }
    return;
  }
  const bool bf16 = dtype == DType::kBFloat16;
  uint16_t* to = static_cast<uint16_t*>(data) + offset;
  uint32_t words[N / 2];
#pragma unroll
  for (int i = 0; i < N / 2; ++i) words[i] = floats_to_halves(v[2 * i], v[2 * i + 1], bf16);
  if constexpr (N == 8) {
    *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
  } else if constexpr (N == 2) {
    *reinterpret_cast<uint32_t*>(to) = words[0];
  } else {
    *reinterpret_cast<uint2*>(to) = make_uint2(words[0], words[1]);
  }
}

inline int element_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Whether N neighbouring elements can be accessed at once at every multiple of N, when each of the
// other strides moves by whole vectors.
inline bool vectors_fit(const void* data, DType dtype, int n, const int64_t* strides, int count) {
  const int64_t size = element_size(dtype);
  const int64_t bytes = n * size < 16 ? n * size : 16;
  if (reinterpret_cast<uintptr_t>(data) % bytes != 0) return false;
  for (int i = 0; i < count; ++i) {
    if (strides[i] * size % bytes != 0) return false;
  }
  return true;
}

}  // namespace mamba
