// The convolution with steps innermost: a lane has eight neighbouring steps, and its neighbours in
// the warp the steps before and after them.
#pragma once

#include "conv.cuh"

namespace mamba {

// Element k of a vector that may reach past the end of its row; 0 there.
template <typename T>
__device__ __forceinline__ Packed<T, kVector> load_steps(const T* from, int64_t start,
                                                         int64_t length) {
  if (start + kVector <= length) return load_packed<T, kVector>(from + start);
  Packed<T, kVector> packed = {};
#pragma unroll
  for (int k = 0; k < kVector; ++k) {
    if (start + k < length) packed.v[k] = from[start + k];
  }
  return packed;
}

template <typename T>
__device__ __forceinline__ void store_steps(const float (&v)[kVector], T* to, int64_t start,
                                            int64_t length) {
  if (start + kVector <= length) {
    store_packed<T, kVector>(v, to + start);
    return;
  }
#pragma unroll
  for (int k = 0; k < kVector; ++k) {
    if (start + k < length) to[start + k] = from_float<T>(v[k]);
  }
}

// i as (i / n, i % n), in 32 bits where they are enough: a 64-bit division costs as much as a
// vector's convolution.
__device__ __forceinline__ int64_t divide(int64_t i, int64_t n, int64_t* rest) {
  if (i < int64_t{1} << 32 && n < int64_t{1} << 32) {
    const uint32_t q = static_cast<uint32_t>(i) / static_cast<uint32_t>(n);
    *rest = static_cast<uint32_t>(i) - q * static_cast<uint32_t>(n);
    return q;
  }
  *rest = i % n;
  return i / n;
}

// The inputs before a lane's steps: the last of its left neighbour's, unless it is `alone`.
template <int W, typename T>
__device__ __forceinline__ void load_left(const ConvParams& p, int64_t row, int64_t channel,
                                          const T* x, int64_t start, bool alone,
                                          float (&window)[W - 1 + kVector]) {
#pragma unroll
  for (int k = 0; k + 1 < W; ++k) {
    window[k] = __shfl_up_sync(0xffffffffu, window[kVector + k], 1);
    if (alone) {
      const int64_t t = start - W + 1 + k;
      window[k] = t >= 0 ? to_float(x[t]) : conv_initial(p, row, channel, -t);
    }
  }
}

// A thread: eight neighbouring steps of one channel.
template <int W, typename T, bool kSilu>
__global__ void __launch_bounds__(kConvThreads)
    forward_steps_kernel(const __grid_constant__ ConvParams p) {
  const int64_t vectors = (p.length + kVector - 1) / kVector,
                count = vectors * p.channels * p.batch;
  const int64_t i = int64_t{blockIdx.x} * kConvThreads + threadIdx.x;
  // Threads past the end work on the last vector and store nothing: the shuffles need whole warps.
  int64_t vector, channel;
  const int64_t row = divide(divide(min(i, count - 1), vectors, &vector), p.channels, &channel);
  const int64_t start = vector * kVector;
  const T* const x =
      static_cast<const T*>(p.x.data) + row * p.x.stride[0] + channel * p.x.stride[1];
  const auto fresh = load_steps<T>(x, start, p.length);
  float window[W - 1 + kVector], out[kVector], weight[W];
  load_strided<W>(weight, p.weight.data, p.weight.dtype, channel * p.weight.stride[0],
                  p.weight.stride[1]);
  const float bias = conv_bias(p, channel);
#pragma unroll
  for (int k = 0; k < kVector; ++k) window[W - 1 + k] = to_float(fresh.v[k]);
  load_left<W>(p, row, channel, x, start, threadIdx.x % 32 == 0 || start == 0 || i >= count,
               window);
#pragma unroll
  for (int k = 0; k < kVector; ++k) {
    out[k] = bias;
#pragma unroll
    for (int j = W - 1; j >= 0; --j) out[k] = fmaf(weight[j], window[k + j], out[k]);
    if constexpr (kSilu) out[k] = conv_silu(out[k]);
  }
  if (i >= count) return;
  store_steps<T>(out,
                 static_cast<T*>(p.out.data) + row * p.out.stride[0] + channel * p.out.stride[1],
                 start, p.length);
}

// The steps of a segment, so many that a grid's y holds all segments.
__host__ __device__ __forceinline__ int64_t segment_steps(int64_t length) {
  constexpr int64_t kUsual = 4096, kMost = 65535;
  return length <= kUsual * kMost ? kUsual : (length / kMost + kUsual) / kUsual * kUsual;
}
inline int64_t segments_of(const ConvParams& p) {
  return (p.length + segment_steps(p.length) - 1) / segment_steps(p.length);
}

// A warp: a segment of one channel of one row, 256 steps at a time from the last to the first; the
// next ones' loads are out while it works on some. Segments are added up in fp64: one fp32 sum of a
// long row would lose digits.
template <int W, typename T, bool kSilu>
__global__ void __launch_bounds__(kConvThreads, 5)
    backward_steps_kernel(const __grid_constant__ CudaConvParams c) {
  constexpr unsigned kAll = 0xffffffffu;
  constexpr int kStretch = 32 * kVector;
  const ConvParams& p = c.p;
  const int64_t i = int64_t{blockIdx.x} * (kConvThreads / 32) + threadIdx.x / 32;
  if (i >= p.batch * p.channels) return;
  const int lane = threadIdx.x % 32;
  const int64_t row = i / p.channels, channel = i % p.channels;
  const int64_t begin = blockIdx.y * segment_steps(p.length);
  const int64_t end = min(begin + segment_steps(p.length), p.length);
  const T* const x =
      static_cast<const T*>(p.x.data) + row * p.x.stride[0] + channel * p.x.stride[1];
  const T* const dout =
      static_cast<const T*>(p.dout.data) + row * p.dout.stride[0] + channel * p.dout.stride[1];
  T* const dx = static_cast<T*>(p.dx.data) + row * p.dx.stride[0] + channel * p.dx.stride[1];
  float weight[W], dweight[W] = {}, dbias = 0.0f, later[W - 1] = {};
  load_strided<W>(weight, p.weight.data, p.weight.dtype, channel * p.weight.stride[0],
                  p.weight.stride[1]);
  const float bias = conv_bias(p, channel);
  if (end < p.length) {  // the gradients of the next segment's first sums, a lane each
    const int64_t t = min(end + min(lane, W - 2), p.length - 1);
    float g = end + lane < p.length ? to_float(dout[t]) : 0.0f;
    if constexpr (kSilu) {
      float sum = bias;
#pragma unroll
      for (int j = W - 1; j >= 0; --j) sum = fmaf(weight[j], to_float(x[t - (W - 1) + j]), sum);
      g *= conv_dsilu(sum);
    }
#pragma unroll
    for (int k = 0; k + 1 < W; ++k) later[k] = __shfl_sync(kAll, g, k);
  }
  const int64_t first = (end - 1) / kStretch * kStretch + lane * kVector;
  auto next_x = load_steps<T>(x, first, p.length), next_dout = load_steps<T>(dout, first, p.length);
  for (int64_t start = first; start >= begin; start -= kStretch) {
    float window[W - 1 + kVector], g[kVector + W - 1];
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      window[W - 1 + k] = to_float(next_x.v[k]), g[k] = to_float(next_dout.v[k]);
    }
    if (start >= begin + kStretch) {
      next_x = load_steps<T>(x, start - kStretch, p.length);
      next_dout = load_steps<T>(dout, start - kStretch, p.length);
    }
    load_left<W>(p, row, channel, x, start, lane == 0, window);
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      if constexpr (kSilu) {
        float sum = bias;
#pragma unroll
        for (int j = W - 1; j >= 0; --j) sum = fmaf(weight[j], window[k + j], sum);
        g[k] *= conv_dsilu(sum);
      }
      if (start + k >= p.length) g[k] = 0.0f;
      dbias += g[k];
#pragma unroll
      for (int j = 0; j < W; ++j) dweight[j] = fmaf(g[k], window[k + j], dweight[j]);
    }
#pragma unroll
    for (int k = 0; k + 1 < W; ++k) {
      const float right = __shfl_down_sync(kAll, g[k], 1);
      g[kVector + k] = lane == 31 ? later[k] : right;
      later[k] = __shfl_sync(kAll, g[k], 0);
    }
    float out[kVector];
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      out[k] = 0.0f;
#pragma unroll
      for (int j = 0; j < W; ++j) out[k] = fmaf(weight[W - 1 - j], g[k + j], out[k]);
    }
    if (p.dfinal.data && start + kVector > p.length - (W - 1)) {
#pragma unroll
      for (int k = 0; k < kVector; ++k) {
        const int64_t column = start + k - (p.length - (W - 1));
        if (column >= 0 && column < W - 1) out[k] += load_at(p.dfinal, row, channel, column);
      }
    }
    store_steps<T>(out, dx, start, p.length);
  }
#pragma unroll
  for (int o = 16; o > 0; o /= 2) {
#pragma unroll
    for (int k = 0; k < W; ++k) dweight[k] += __shfl_xor_sync(kAll, dweight[k], o);
    dbias += __shfl_xor_sync(kAll, dbias, o);
  }
  if (lane != 0) return;
  float* const share = c.partial + (row * gridDim.y + blockIdx.y) * p.channels * (W + 1);
#pragma unroll
  for (int k = 0; k < W; ++k) share[channel * W + k] = dweight[k];
  share[p.channels * W + channel] = dbias;
}

}  // namespace mamba
