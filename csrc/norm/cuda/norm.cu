// Add and norm: a block walks over rows, each thread keeping its columns' weights (and, backward,
// their gradients) in registers.
#include <cuda_runtime.h>

#include "../../common/cuda_reduce.h"
#include "../../common/cuda_vector.cuh"
#include "norm.h"

namespace mamba {
namespace {

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
};

__device__ __forceinline__ void load_row(float (&v)[kVector], const RowArg& a, int64_t row,
                                         int64_t column, int64_t size) {
  const int64_t start = row * a.t.stride[0] + column * a.t.stride[1];
  if (a.vectors && column + kVector <= size) {
    load_aligned<kVector>(v, a.t.data, a.t.dtype, start);
    return;
  }
#pragma unroll
  for (int k = 0; k < kVector; ++k) {
    v[k] = column + k < size ? load_float(a.t.data, a.t.dtype, start + k * a.t.stride[1]) : 0.0f;
  }
}

__device__ __forceinline__ void store_row(const float (&v)[kVector], const RowArg& a, int64_t row,
                                          int64_t column, int64_t size) {
  const int64_t start = row * a.t.stride[0] + column * a.t.stride[1];
  if (a.vectors && column + kVector <= size) {
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
  RowArg x, residual, y, residual_out, dy, dresidual_out, dx;
};

// x + residual of a thread's vector.
__device__ __forceinline__ void load_sum(float (&s)[kVector], const NormArgs& a, int64_t row,
                                         int64_t column) {
  load_row(s, a.x, row, column, a.p.size);
  if (!a.residual.t.data) return;
  float r[kVector];
  load_row(r, a.residual, row, column, a.p.size);
#pragma unroll
  for (int k = 0; k < kVector; ++k) s[k] += r[k];
}

// kCount vectors a thread; 0: any number, read again for every pass.
template <int kCount>
__global__ void __launch_bounds__(kMaxThreads)
    add_norm_fwd_kernel(const __grid_constant__ NormArgs a, int count) {
  __shared__ BlockSums sums;
  constexpr int kHeld = kCount ? kCount : 1;
  const int vectors = kCount ? kCount : count;
  const int64_t size = a.p.size;
  float weight[kHeld][kVector], bias[kHeld][kVector];
  if constexpr (kCount > 0) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      load_columns(weight[i], a.p.weight, column_of(i), size, 0.0f);
      load_columns(bias[i], a.p.bias, column_of(i), size, 0.0f);
    }
  }
  int turn = 0;
  for (int64_t row = blockIdx.x; row < a.p.rows; row += gridDim.x) {
    float s[kHeld][kVector];
    float total = 0.0f, squares = 0.0f;
#pragma unroll
    for (int i = 0; i < vectors; ++i) {
      float (&v)[kVector] = s[kCount ? i : 0];
      load_sum(v, a, row, column_of(i));
#pragma unroll
      for (int k = 0; k < kVector; ++k) total += v[k], squares = fmaf(v[k], v[k], squares);
      if (a.residual_out.t.data) store_row(v, a.residual_out, row, column_of(i), size);
    }
    float mean = 0.0f, variance;
    const float3 first = sums.sum(total, squares, 0.0f, false, turn);
    turn ^= 1;
    if (a.p.is_rms) {
      variance = first.y / static_cast<float>(size);
    } else {
      // The second pass keeps the digits that a difference of squares would lose.
      mean = first.x / static_cast<float>(size);
      squares = total = 0.0f;
#pragma unroll
      for (int i = 0; i < vectors; ++i) {
        float (&v)[kVector] = s[kCount ? i : 0];
        if constexpr (kCount == 0) load_sum(v, a, row, column_of(i));
#pragma unroll
        for (int k = 0; k < kVector; ++k) {
          const float centred = column_of(i) + k < size ? v[k] - mean : 0.0f;
          total += centred, squares = fmaf(centred, centred, squares);
        }
      }
      // What the centred values still sum to is the rounding error of the mean.
      const float3 second = sums.sum(total, squares, 0.0f, false, turn);
      const float error = second.x / static_cast<float>(size);
      mean += error;
      variance = fmaxf(second.y / static_cast<float>(size) - error * error, 0.0f);
      turn ^= 1;
    }
    const float rstd = rsqrtf(variance + a.p.eps);
    if (threadIdx.x == 0) {
      a.p.rstd[row] = rstd;
      if (a.p.mean) a.p.mean[row] = mean;
    }
#pragma unroll
    for (int i = 0; i < vectors; ++i) {
      float (&v)[kVector] = s[kCount ? i : 0];
      const int h = kCount ? i : 0;
      if constexpr (kCount == 0) {
        load_sum(v, a, row, column_of(i));
        load_columns(weight[0], a.p.weight, column_of(i), size, 0.0f);
        load_columns(bias[0], a.p.bias, column_of(i), size, 0.0f);
      }
#pragma unroll
      for (int k = 0; k < kVector; ++k) v[k] = fmaf((v[k] - mean) * rstd, weight[h][k], bias[h][k]);
      store_row(v, a.y, row, column_of(i), size);
    }
  }
}

// The part of the backward that a thread does for one of its vectors: normed values and weighted
// gradients.
__device__ __forceinline__ void load_normed(float (&xhat)[kVector], float (&dy)[kVector],
                                            const NormArgs& a, int64_t row, int64_t column,
                                            float mean, float rstd) {
  load_sum(xhat, a, row, column);
  load_row(dy, a.dy, row, column, a.p.size);
#pragma unroll
  for (int k = 0; k < kVector; ++k)
    xhat[k] = column + k < a.p.size ? (xhat[k] - mean) * rstd : 0.0f;
}

__device__ __forceinline__ void store_dx(const float (&xhat)[kVector], const float (&dy)[kVector],
                                         const float (&weight)[kVector], const NormArgs& a,
                                         int64_t row, int64_t column, float2 means, float rstd) {
  float dx[kVector] = {};
  if (a.dresidual_out.t.data) load_row(dx, a.dresidual_out, row, column, a.p.size);
#pragma unroll
  for (int k = 0; k < kVector; ++k) {
    dx[k] += (dy[k] * weight[k] - means.x - xhat[k] * means.y) * rstd;
  }
  store_row(dx, a.dx, row, column, a.p.size);
}

template <int kCount>
__global__ void __launch_bounds__(kMaxThreads)
    add_norm_bwd_kernel(const __grid_constant__ NormArgs a, int count) {
  __shared__ BlockSums sums;
  constexpr int kHeld = kCount ? kCount : 1;
  const int vectors = kCount ? kCount : count;
  const int64_t size = a.p.size;
  float weight[kHeld][kVector], dweight[kHeld][kVector] = {}, dbias[kHeld][kVector] = {};
  float* const share = a.p.partial + int64_t{blockIdx.x} * 2 * size;
  if constexpr (kCount > 0) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) load_columns(weight[i], a.p.weight, column_of(i), size, 0.0f);
  } else {
    for (int64_t i = threadIdx.x; i < 2 * size; i += blockDim.x) share[i] = 0.0f;
    __syncthreads();
  }
  int turn = 0;
  for (int64_t row = blockIdx.x; row < a.p.rows; row += gridDim.x) {
    const float mean = a.p.is_rms ? 0.0f : a.p.mean[row * a.p.mean_stride];
    const float rstd = a.p.rstd[row * a.p.rstd_stride];
    float xhat[kHeld][kVector], dy[kHeld][kVector];
    float plain = 0.0f, along = 0.0f, centred = 0.0f;
#pragma unroll
    for (int i = 0; i < vectors; ++i) {
      const int h = kCount ? i : 0;
      load_normed(xhat[h], dy[h], a, row, column_of(i), mean, rstd);
      if constexpr (kCount == 0) load_columns(weight[0], a.p.weight, column_of(i), size, 0.0f);
#pragma unroll
      for (int k = 0; k < kVector; ++k) {
        const float weighted = dy[h][k] * weight[h][k];
        plain += weighted, along = fmaf(weighted, xhat[h][k], along), centred += xhat[h][k];
        if constexpr (kCount > 0) {
          dweight[h][k] = fmaf(dy[h][k], xhat[h][k], dweight[h][k]);
          dbias[h][k] += dy[h][k];
        }
      }
    }
    const float3 total = sums.sum(plain, along, centred, !a.p.is_rms, turn);
    turn ^= 1;
    // What the normed values of a layer norm still sum to is the rounding error of the mean.
    const float error = a.p.is_rms ? 0.0f : total.z / static_cast<float>(size);
    const float2 means = {a.p.is_rms ? 0.0f : total.x / static_cast<float>(size),
                          (total.y - error * total.x) / static_cast<float>(size)};
#pragma unroll
    for (int i = 0; i < vectors; ++i) {
      const int h = kCount ? i : 0;
      if constexpr (kCount == 0) {
        load_normed(xhat[0], dy[0], a, row, column_of(i), mean, rstd);
        load_columns(weight[0], a.p.weight, column_of(i), size, 0.0f);
      }
#pragma unroll
      for (int k = 0; k < kVector; ++k) {
        if (!a.p.is_rms) xhat[h][k] -= error;
        if constexpr (kCount > 0) {
          if (!a.p.is_rms) dweight[h][k] = fmaf(dy[h][k], -error, dweight[h][k]);
        } else if (column_of(i) + k < size) {
          share[column_of(i) + k] += dy[h][k] * xhat[h][k];
          share[size + column_of(i) + k] += dy[h][k];
        }
      }
      store_dx(xhat[h], dy[h], weight[h], a, row, column_of(i), means, rstd);
    }
  }
  if constexpr (kCount > 0) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
#pragma unroll
      for (int k = 0; k < kVector; ++k) {
        if (column_of(i) + k >= size) continue;
        share[column_of(i) + k] = dweight[i][k];
        share[size + column_of(i) + k] = dbias[i][k];
      }
    }
  }
}

RowArg row_arg(const TensorArg& t) {
  RowArg a;
  a.t = t;
  a.vectors = t.data && t.stride[1] == 1 && vectors_fit(t.data, t.dtype, kVector, t.stride, 1);
  return a;
}

TensorArg floats(float* data, int64_t size) {
  TensorArg t;
  t.data = data;
  t.stride[0] = size, t.stride[1] = 1;
  return t;
}

NormArgs norm_args(const NormParams& p) {
  NormArgs a;
  a.p = p;
  a.x = row_arg(p.x), a.residual = row_arg(p.residual);
  a.y = row_arg(p.y), a.residual_out = row_arg(p.residual_out);
  a.dy = row_arg(p.dy), a.dresidual_out = row_arg(p.dresidual_out);
  a.dx = row_arg(floats(p.dx, p.size));
  return a;
}

struct Launch {
  int threads, count;  // count vectors a thread
};

Launch launch_of(const NormParams& p) {
  const int64_t vectors = (p.size + kVector - 1) / kVector;
  int64_t threads = (vectors + 31) / 32 * 32;
  int64_t count = 1;
  if (threads > kMaxThreads) {
    count = (vectors + kMaxThreads - 1) / kMaxThreads;
    threads = ((vectors + count - 1) / count + 31) / 32 * 32;
  }
  return {static_cast<int>(threads), static_cast<int>(count)};
}

// Enough blocks to fill the GPU, each with several rows.
int64_t blocks_of(const NormParams& p, int threads_per_processor) {
  int device = 0, processors = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  const int64_t at_once = int64_t{processors} * (threads_per_processor / launch_of(p).threads);
  return p.rows < at_once ? p.rows : at_once;
}

const char* launched() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

constexpr int kForwardThreads = 2048, kBackwardThreads = 1024;  // resident on a multiprocessor

}  // namespace

int64_t norm_groups_cuda(const NormParams& p) { return blocks_of(p, kBackwardThreads); }

const char* add_norm_fwd_cuda(const NormParams& p, void* stream_handle) {
  if (p.rows * p.size == 0) return nullptr;
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  const NormArgs a = norm_args(p);
  const Launch l = launch_of(p);
  const auto blocks = static_cast<unsigned>(blocks_of(p, kForwardThreads));
  if (l.count == 1) {
    add_norm_fwd_kernel<1><<<blocks, l.threads, 0, stream>>>(a, 1);
  } else if (l.count == 2) {
    add_norm_fwd_kernel<2><<<blocks, l.threads, 0, stream>>>(a, 2);
  } else {
    add_norm_fwd_kernel<0><<<blocks, l.threads, 0, stream>>>(a, l.count);
  }
  return launched();
}

const char* add_norm_bwd_cuda(const NormParams& p, int64_t groups, float* dweight, float* dbias,
                              void* stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  if (p.size == 0) return nullptr;
  if (p.rows > 0) {
    const NormArgs a = norm_args(p);
    const Launch l = launch_of(p);
    const auto blocks = static_cast<unsigned>(groups);
    if (l.count == 1) {
      add_norm_bwd_kernel<1><<<blocks, l.threads, 0, stream>>>(a, 1);
    } else if (l.count == 2) {
      add_norm_bwd_kernel<2><<<blocks, l.threads, 0, stream>>>(a, 2);
    } else {
      add_norm_bwd_kernel<0><<<blocks, l.threads, 0, stream>>>(a, l.count);
    }
    if (const char* error = launched()) return error;
  }
  return sum_rows_cuda(p.partial, groups, 2 * p.size, p.size, dweight, p.size, dbias, stream);
}

}  // namespace mamba
