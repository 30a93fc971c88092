// A block takes a row: 16-bit rows of up to kHeld vectors a thread are read once and stay in
// registers, packed as they came; others are read again for the second pass, mostly from the cache.
#include <cuda_runtime.h>

#include <cassert>

#include "../../common/cuda_math.cuh"
#include "../../common/cuda_vector.cuh"
#include "cross_entropy.h"

namespace mamba {
namespace {

constexpr int kThreads = 1024, kWarps = kThreads / 32;
constexpr int kHeld = 7;
constexpr float kLog2e = 1.4426950408889634f;

// e^(v - largest): the difference first, because it is exact where it matters.
__device__ __forceinline__ float term(float v, float largest) {
  return fast_exp2((v - largest) * kLog2e);
}

// The largest value so far and the sum of e^(v - largest).
struct Softmax {
  float largest = -INFINITY, sum = 0.0f;

  __device__ __forceinline__ void merge(float other_largest, float other_sum) {
    const float top = fmaxf(largest, other_largest);
    if (top == -INFINITY) return;
    sum = sum * term(largest, top) + other_sum * term(other_largest, top);
    largest = top;
  }
};

__device__ __forceinline__ Softmax over_block(Softmax s) {
  __shared__ float largest[kWarps], sums[kWarps];
#pragma unroll
  for (int o = 16; o > 0; o /= 2) {
    const float top = __shfl_xor_sync(0xffffffffu, s.largest, o);
    s.merge(top, __shfl_xor_sync(0xffffffffu, s.sum, o));
  }
  const int lane = threadIdx.x % 32;
  if (lane == 0) largest[threadIdx.x / 32] = s.largest, sums[threadIdx.x / 32] = s.sum;
  __syncthreads();
  // Every warp adds up all of them, in the same order.
  Softmax all;
  all.largest = largest[lane], all.sum = sums[lane];
#pragma unroll
  for (int o = 16; o > 0; o /= 2) {
    const float top = __shfl_xor_sync(0xffffffffu, all.largest, o);
    all.merge(top, __shfl_xor_sync(0xffffffffu, all.sum, o));
  }
  return all;
}

template <bool kBf16>
__device__ __forceinline__ void unpack(float (&v)[kVector], const uint4& words) {
  const uint32_t all[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 two = halves_to_floats(all[i], kBf16);
    v[2 * i] = two.x, v[2 * i + 1] = two.y;
  }
}

__device__ __forceinline__ int64_t checked_target(const CrossEntropyParams& p, int64_t row) {
  const int64_t target = p.targets[row];
  assert(target == p.ignored ||
         (target >= 0 && target < p.size) && "a target is outside the vocabulary");
  return target;
}

template <bool kBf16>
__global__ void __launch_bounds__(kThreads, 1)
    held_kernel(const __grid_constant__ CrossEntropyParams p) {
  const int vectors = static_cast<int>(p.size / kVector);
  const int64_t row = blockIdx.x;
  auto* const logits = static_cast<uint16_t*>(p.logits.data) + row * p.logits.stride[0];
  uint4* const packed = reinterpret_cast<uint4*>(logits);
  const int64_t target = checked_target(p, row);
  if (target == p.ignored) {
#pragma unroll 1
    for (int i = threadIdx.x; i < vectors; i += kThreads) packed[i] = make_uint4(0, 0, 0, 0);
    if (threadIdx.x == 0) p.losses[row] = 0.0f;
    return;
  }
  uint4 held[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int at = threadIdx.x + i * kThreads;
    if (at < vectors) held[i] = packed[at];
  }
  const float chosen = load_float(logits, p.logits.dtype, target);
  float top = -INFINITY;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    if (threadIdx.x + i * kThreads >= vectors) continue;
    float v[kVector];
    unpack<kBf16>(v, held[i]);
#pragma unroll
    for (int k = 0; k < kVector; ++k) top = fmaxf(top, v[k]);
  }
  Softmax s;
  s.largest = top;
  // Of a thread that has nothing but -inf every term is 0.
  const float base = s.largest == -INFINITY ? 0.0f : s.largest;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    if (threadIdx.x + i * kThreads >= vectors) continue;
    float v[kVector];
    unpack<kBf16>(v, held[i]);
#pragma unroll
    for (int k = 0; k < kVector; ++k) s.sum += term(v[k], base);
  }
  s = over_block(s);  // no thread writes before all have read
  const float loss = s.largest - chosen + logf(s.sum), shift = log2f(s.sum);
  const float own = expm1f(-loss);  // with the digits of a probability near 1
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int at = threadIdx.x + i * kThreads;
    if (at >= vectors) continue;
    float v[kVector];
    unpack<kBf16>(v, held[i]);
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      v[k] = at * kVector + k == target ? own : fast_exp2(fmaf(v[k] - s.largest, kLog2e, -shift));
    }
    packed[at] =
        make_uint4(floats_to_halves(v[0], v[1], kBf16), floats_to_halves(v[2], v[3], kBf16),
                   floats_to_halves(v[4], v[5], kBf16), floats_to_halves(v[6], v[7], kBf16));
  }
  if (threadIdx.x == 0) p.losses[row] = loss;
}

__global__ void __launch_bounds__(kThreads, 1)
    any_kernel(const __grid_constant__ CrossEntropyParams p) {
  const int64_t row = blockIdx.x, start = row * p.logits.stride[0];
  const int64_t target = checked_target(p, row);
  if (target == p.ignored) {
    for (int64_t j = threadIdx.x; j < p.size; j += kThreads) {
      store_float(p.logits.data, p.logits.dtype, start + j, 0.0f);
    }
    if (threadIdx.x == 0) p.losses[row] = 0.0f;
    return;
  }
  const float chosen = load_float(p.logits.data, p.logits.dtype, start + target);
  Softmax s;
  for (int64_t j = threadIdx.x; j < p.size; j += kThreads) {
    s.merge(load_float(p.logits.data, p.logits.dtype, start + j), 1.0f);
  }
  s = over_block(s);
  const float loss = s.largest - chosen + logf(s.sum), own = expm1f(-loss);
  const float shift = log2f(s.sum);
  for (int64_t j = threadIdx.x; j < p.size; j += kThreads) {
    const float v = load_float(p.logits.data, p.logits.dtype, start + j);
    const float gradient = j == target ? own : fast_exp2(fmaf(v - s.largest, kLog2e, -shift));
    store_float(p.logits.data, p.logits.dtype, start + j, gradient);
  }
  if (threadIdx.x == 0) p.losses[row] = loss;
}

}  // namespace

const char* cross_entropy_cuda(const CrossEntropyParams& p, void* stream_handle) {
  if (p.rows == 0) return nullptr;
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  const auto blocks = static_cast<unsigned>(p.rows);
  const bool held = p.logits.dtype != DType::kFloat32 && p.size % kVector == 0 &&
                    p.size <= int64_t{kHeld} * kThreads * kVector &&
                    vectors_fit(p.logits.data, p.logits.dtype, kVector, p.logits.stride, 1);
  if (!held) {
    any_kernel<<<blocks, kThreads, 0, stream>>>(p);
  } else if (p.logits.dtype == DType::kBFloat16) {
    held_kernel<true><<<blocks, kThreads, 0, stream>>>(p);
  } else {
    held_kernel<false><<<blocks, kThreads, 0, stream>>>(p);
  }
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace mamba
