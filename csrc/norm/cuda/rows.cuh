// What add and norm's kernels share: rows as threads hold them, sums over a block, launches.
#pragma once

#include <cuda_runtime.h>

#include "../../common/cuda_vector.cuh"
#include "norm.h"

namespace mamba {

constexpr int kMaxThreads = 512;
constexpr int kMaxWarps = kMaxThreads / 32;

// A row's vectors as the threads of a block hold them: vector i of a thread starts at column
// (threadIdx.x + i * blockDim.x) * kVector.
__device__ __forceinline__ int64_t column_of(int i) {
  return (int64_t{i} * blockDim.x + threadIdx.x) * kVector;
}

struct RowArg {
  TensorArg t;
  bool vectors;  // rows can be read 16 bytes at once

  __device__ __forceinline__ bool whole(int64_t column, int64_t size) const {
    return vectors && column + kVector <= size;
  }
};

// A vector as it lies in memory, or as floats where its elements were loaded one by one: nothing
// waits for it before `unpack`.
struct RawVector {
  uint4 low, high;

  __device__ __forceinline__ void load(const RowArg& a, int64_t row, int64_t column, int64_t size) {
    if (!a.t.data) return;
    const int64_t start = row * a.t.stride[0] + column * a.t.stride[1];
    if (a.whole(column, size)) {
      if (a.t.dtype == DType::kFloat32) {
        const auto* from =
            reinterpret_cast<const uint4*>(static_cast<const float*>(a.t.data) + start);
        low = __ldg(from), high = __ldg(from + 1);
      } else {
        const auto* from = static_cast<const uint16_t*>(a.t.data) + start;
        low = __ldg(reinterpret_cast<const uint4*>(from));
      }
      return;
    }
    float v[kVector];
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      v[k] = column + k < size ? load_float(a.t.data, a.t.dtype, start + k * a.t.stride[1]) : 0.0f;
    }
    low = make_uint4(__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]),
                     __float_as_uint(v[3]));
    high = make_uint4(__float_as_uint(v[4]), __float_as_uint(v[5]), __float_as_uint(v[6]),
                      __float_as_uint(v[7]));
  }

  __device__ __forceinline__ void unpack(float (&v)[kVector], const RowArg& a, int64_t column,
                                         int64_t size) const {
    const uint32_t words[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    if (a.t.dtype == DType::kFloat32 || !a.whole(column, size)) {
#pragma unroll
      for (int k = 0; k < kVector; ++k) v[k] = __uint_as_float(words[k]);
      return;
    }
    const bool bf16 = a.t.dtype == DType::kBFloat16;
#pragma unroll
    for (int i = 0; i < kVector / 2; ++i) {
      const float2 two = halves_to_floats(words[i], bf16);
      v[2 * i] = two.x, v[2 * i + 1] = two.y;
    }
  }
};

__device__ __forceinline__ void store_row(const float (&v)[kVector], const RowArg& a, int64_t row,
                                          int64_t column, int64_t size) {
  const int64_t start = row * a.t.stride[0] + column * a.t.stride[1];
  if (a.whole(column, size)) {
    store_aligned<kVector>(v, a.t.data, a.t.dtype, start);
    return;
  }
  for (int k = 0; k < kVector; ++k) {
    if (column + k < size) {
      store_float(a.t.data, a.t.dtype, start + k * a.t.stride[1], v[k]);
    }
  }
}

// Columns of (size,) parameters; fp32 gradients come and go the same way.
__device__ __forceinline__ void load_columns(float (&v)[kVector], const TensorArg& t,
                                             int64_t column, int64_t size, float absent) {
  if (t.data && t.stride[0] == 1 && column + kVector <= size &&
      reinterpret_cast<uintptr_t>(t.data) % 16 == 0) {
    load_aligned<kVector>(v, t.data, t.dtype, column);
    return;
  }
#pragma unroll
  for (int k = 0; k < kVector; ++k) {
    const bool exists = t.data && column + k < size;
    v[k] = exists ? load_float(t.data, t.dtype, (column + k) * t.stride[0]) : absent;
  }
}

// Sums of two values over the block, in an order that depends on its size only. Two buffers, used
// in turns, save a barrier.
struct BlockSums {
  float parts[2][3][kMaxWarps];
  // `third`: whether c counts; the same for the whole block.
  __device__ __forceinline__ float3 sum(float a, float b, float c, bool third, int turn) {
#pragma unroll
    for (int o = 16; o > 0; o /= 2) {
      a += __shfl_xor_sync(0xffffffffu, a, o);
      b += __shfl_xor_sync(0xffffffffu, b, o);
      if (third) c += __shfl_xor_sync(0xffffffffu, c, o);
    }
    const int warps = blockDim.x / 32;
    if (warps == 1) return {a, b, c};
    if (threadIdx.x % 32 == 0) {
      parts[turn][0][threadIdx.x / 32] = a;
      parts[turn][1][threadIdx.x / 32] = b;
      parts[turn][2][threadIdx.x / 32] = c;
    }
    __syncthreads();
    a = b = c = 0.0f;
    for (int w = 0; w < warps; ++w) {
      a += parts[turn][0][w], b += parts[turn][1][w], c += parts[turn][2][w];
    }
    return {a, b, c};
  }
};

struct NormArgs {
  NormParams p;
  RowArg x, residual, y, residual_out, dy, dresidual_out, dx, other;
};

// x and residual of a thread's vector. kSummed: there is no residual.
template <bool kSummed>
struct RawSum {
  RawVector x, residual;

  __device__ __forceinline__ void load(const NormArgs& a, int64_t row, int64_t column) {
    x.load(a.x, row, column, a.p.size);
    if constexpr (!kSummed) residual.load(a.residual, row, column, a.p.size);
  }
  __device__ __forceinline__ void unpack(float (&s)[kVector], const NormArgs& a,
                                         int64_t column) const {
    x.unpack(s, a.x, column, a.p.size);
    if (kSummed || !a.residual.t.data) return;
    float r[kVector];
    residual.unpack(r, a.residual, column, a.p.size);
#pragma unroll
    for (int k = 0; k < kVector; ++k) s[k] += r[k];
  }
};

__device__ __forceinline__ void load_sum(float (&s)[kVector], const NormArgs& a, int64_t row,
                                         int64_t column) {
  RawSum<false> raw;
  raw.load(a, row, column);
  raw.unpack(s, a, column);
}

inline RowArg row_arg(const TensorArg& t) {
  RowArg a;
  a.t = t;
  a.vectors = t.data && t.stride[1] == 1 && vectors_fit(t.data, t.dtype, kVector, t.stride, 1);
  return a;
}

inline NormArgs norm_args(const NormParams& p) {
  NormArgs a;
  a.p = p;
  a.x = row_arg(p.x), a.residual = row_arg(p.residual);
  a.y = row_arg(p.y), a.residual_out = row_arg(p.residual_out);
  a.dy = row_arg(p.dy), a.dresidual_out = row_arg(p.dresidual_out);
  a.dx = row_arg(p.dx), a.other = row_arg(p.other);
  return a;
}

struct NormLaunch {
  int threads, count;  // count vectors a thread
};

inline NormLaunch norm_launch(const NormParams& p) {
  const int64_t vectors = (p.size + kVector - 1) / kVector;
  int64_t threads = (vectors + 31) / 32 * 32;
  int64_t count = 1;
  if (threads > kMaxThreads) {
    count = (vectors + kMaxThreads - 1) / kMaxThreads;
    threads = ((vectors + count - 1) / count + 31) / 32 * 32;
  }
  return {static_cast<int>(threads), static_cast<int>(count)};
}

// As many blocks as the GPU holds at once, each with several rows: more would work on theirs when
// the others have ended.
template <typename Kernel>
int64_t norm_blocks(const NormParams& p, Kernel kernel) {
  int device = 0, processors = 0, resident = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, norm_launch(p).threads, 0);
  const int64_t at_once = int64_t{processors} * (resident > 0 ? resident : 1);
  return p.rows < at_once ? p.rows : at_once;
}

inline const char* norm_launched() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace mamba
