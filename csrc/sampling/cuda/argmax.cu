// Where the largest number of each row stands: the first one among equals, or the first NaN.
#include "argmax.h"

#include <cuda_runtime.h>

#include <type_traits>

#include "../../common/cuda_vector.cuh"

namespace mamba {
namespace {

constexpr int kThreads = 1024;
constexpr int kAtOnce = 4;  // loads of a thread that are out together

__device__ __forceinline__ float larger(float a, float b) {
  float c;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
}
__device__ __forceinline__ bool equals(float v, float largest) {
  return v == largest || (v != v && largest != largest);
}

// 16 bytes of a row as floats.
template <typename T>
struct Piece {
  static constexpr int kNumbers = 16 / static_cast<int>(sizeof(T));
  uint4 bits;

  __device__ __forceinline__ void floats(float (&v)[kNumbers]) const {
    const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(T) == 4) {
        v[i] = __uint_as_float(words[i]);
      } else {
        const float2 two = halves_to_floats(words[i], std::is_same_v<T, __nv_bfloat16>);
        v[2 * i] = two.x, v[2 * i + 1] = two.y;
      }
    }
  }
};

// A thread's part of a row: pieces of 16 bytes, where rows start at multiples of them, and of what
// is left numbers.
template <typename T>
struct Part {
  const T* row;
  uint32_t size, pieces;

  __device__ __forceinline__ float largest() const {
    using P = Piece<T>;
    float best = -INFINITY;
    for (uint32_t base = threadIdx.x; base < pieces; base += kThreads * kAtOnce) {
      P piece[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        piece[i].bits =
            __ldg(reinterpret_cast<const uint4*>(row) + min(base + i * kThreads, pieces - 1));
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        float v[P::kNumbers];
        piece[i].floats(v);
#pragma unroll
        for (int k = 0; k < P::kNumbers; ++k) best = larger(best, v[k]);
      }
    }
    for (uint32_t at = pieces * P::kNumbers + threadIdx.x; at < size; at += kThreads) {
      best = larger(best, to_float(row[at]));
    }
    return best;
  }
  // The first place of a number that the part has.
  __device__ __forceinline__ uint32_t place_of(float number) const {
    using P = Piece<T>;
    for (uint32_t i = threadIdx.x; i < pieces; i += kThreads) {
      const P piece{__ldg(reinterpret_cast<const uint4*>(row) + i)};
      float v[P::kNumbers];
      piece.floats(v);
#pragma unroll
      for (int k = 0; k < P::kNumbers; ++k) {
        if (equals(v[k], number)) return i * P::kNumbers + k;
      }
    }
    for (uint32_t at = pieces * P::kNumbers + threadIdx.x; at < size; at += kThreads) {
      if (equals(to_float(row[at]), number)) return at;
    }
    return size;
  }
};

template <typename T>
__global__ void __launch_bounds__(kThreads)
    argmax_kernel(const __grid_constant__ ArgmaxParams p, bool whole_pieces) {
  __shared__ float warps[kThreads / 32];
  __shared__ uint32_t place;
  const T* const row = static_cast<const T*>(p.values.data) + blockIdx.x * p.values.stride[0];
  const auto size = static_cast<uint32_t>(p.size);
  const Part<T> part{row, size, whole_pieces ? size / Piece<T>::kNumbers : 0};
  const float mine = part.largest();
  float largest = mine;
#pragma unroll
  for (int o = 16; o > 0; o /= 2) largest = larger(largest, __shfl_xor_sync(~0u, largest, o));
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = largest;
  if (threadIdx.x == 0) place = size;
  __syncthreads();
  largest = warps[threadIdx.x % 32];
#pragma unroll
  for (int o = 16; o > 0; o /= 2) largest = larger(largest, __shfl_xor_sync(~0u, largest, o));
  // Few threads have it.
  if (equals(mine, largest)) atomicMin(&place, part.place_of(largest));
  __syncthreads();
  if (threadIdx.x == 0) p.places[blockIdx.x] = place;
}

}  // namespace

const char* argmax_cuda(const ArgmaxParams& p, void* stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  const int64_t size = element_size(p.values.dtype);
  const bool whole =
      reinterpret_cast<uintptr_t>(p.values.data) % 16 == 0 && p.values.stride[0] * size % 16 == 0;
  const auto kernel = p.values.dtype == DType::kFloat32   ? argmax_kernel<float>
                      : p.values.dtype == DType::kFloat16 ? argmax_kernel<__half>
                                                          : argmax_kernel<__nv_bfloat16>;
  kernel<<<static_cast<unsigned>(p.rows), kThreads, 0, stream>>>(p, whole);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace mamba
