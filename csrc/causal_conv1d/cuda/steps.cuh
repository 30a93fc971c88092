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

// The W - 1 inputs before step `start`.
template <int W, typename T>
__device__ __forceinline__ void load_left(const ConvParams& p, int64_t row, int64_t channel,
                                          const T* x, int64_t start, float (&left)[W - 1]) {
#pragma unroll
  for (int k = 0; k + 1 < W; ++k) {
    const int64_t t = start - W + 1 + k;
    left[k] = t >= 0 ? to_float(x[t]) : conv_initial(p, row, channel, -t);
  }
}

// The window of a lane's steps begins with the last of its left neighbour's, or with `left` where
// it is `alone`.
template <int W>
__device__ __forceinline__ void join_left(bool alone, const float (&left)[W - 1],
                                          float (&window)[W - 1 + kVector]) {
#pragma unroll
  for (int k = 0; k + 1 < W; ++k) {
    const float neighbour = __shfl_up_sync(0xffffffffu, window[kVector + k], 1);
    window[k] = alone ? left[k] : neighbour;
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
  float window[W - 1 + kVector], out[kVector], weight[W], left[W - 1] = {};
  const bool alone = threadIdx.x % 32 == 0 || start == 0 || i >= count;
  if (alone) load_left<W>(p, row, channel, x, start, left);
  load_strided<W>(weight, p.weight.data, p.weight.dtype, channel * p.weight.stride[0],
                  p.weight.stride[1]);
  const float bias = conv_bias(p, channel);
#pragma unroll
  for (int k = 0; k < kVector; ++k) window[W - 1 + k] = to_float(fresh.v[k]);
  join_left<W>(alone, left, window);
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

// What a lane of the backward reads, far ahead: a vector of x and of dout a stage.
template <typename T>
struct StepsRing {
  static constexpr int kStages = 4, kBytes = 16, kCopies = kVector * sizeof(T) / kBytes;
  uint4 values[kStages][2][kCopies][kConvThreads];

  // Steps from `start` on; zeros past the row's end and where `there` is false.
  __device__ __forceinline__ void copy(int stage, int which, const T* from, int64_t start,
                                       int64_t length, bool there) {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      constexpr int kSteps = kBytes / sizeof(T);
      const int64_t t = start + i * kSteps;
      const int steps =
          there ? static_cast<int>(max(min(length - t, int64_t{kSteps}), int64_t{0})) : 0;
      copy_ahead<kBytes>(&values[stage][which][i][threadIdx.x], steps > 0 ? from + t : from,
                         steps * static_cast<int>(sizeof(T)));
    }
  }
  __device__ __forceinline__ Packed<T, kVector> read(int stage, int which) const {
    Packed<T, kVector> v;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      reinterpret_cast<uint4*>(&v)[i] = values[stage][which][i][threadIdx.x];
    }
    return v;
  }
};

// A warp: a segment of one channel of one row, 256 steps at a time from the last to the first.
// Segments are added up in fp64: one fp32 sum of a long row would lose digits.
template <int W, typename T, bool kSilu>
__global__ void __launch_bounds__(kConvThreads, 5)
    backward_steps_kernel(const __grid_constant__ CudaConvParams c) {
  using Ring = StepsRing<T>;
  constexpr unsigned kAll = 0xffffffffu;
  constexpr int kStretch = 32 * kVector;
  __shared__ Ring ring;
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
  // Stretches are numbered from the last one of the segment.
  const int stretches = static_cast<int>((end - begin + kStretch - 1) / kStretch);
  const int64_t first = (end - 1) / kStretch * kStretch + lane * kVector;
  const auto copy = [&](int k) {
    const int64_t start = first - int64_t{k} * kStretch;
    ring.copy(k % Ring::kStages, 0, x, start, p.length, k < stretches);
    ring.copy(k % Ring::kStages, 1, dout, start, p.length, k < stretches);
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
#pragma unroll
  for (int k = 0; k + 1 < Ring::kStages; ++k) copy(k);
  float weight[W], dweight[W] = {}, dbias = 0.0f, later[W - 1] = {}, before[W - 1];
  load_strided<W>(weight, p.weight.data, p.weight.dtype, channel * p.weight.stride[0],
                  p.weight.stride[1]);
  const float bias = conv_bias(p, channel);
  load_left<W>(p, row, channel, x, begin, before);
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
  asm volatile("cp.async.wait_group %0;" ::"n"(Ring::kStages - 2) : "memory");
  auto next_x = ring.read(0, 0);
  for (int stretch = 0; stretch < stretches; ++stretch) {
    const int64_t start = first - int64_t{stretch} * kStretch;
    const auto now_x = next_x, now_dout = ring.read(stretch % Ring::kStages, 1);
    // Also the stretch before this one in time, which holds the first lane's window.
    asm volatile("cp.async.wait_group %0;" ::"n"(Ring::kStages - 3) : "memory");
    next_x = ring.read((stretch + 1) % Ring::kStages, 0);
    copy(stretch + Ring::kStages - 1);
    float window[W - 1 + kVector], g[kVector + W - 1], left[W - 1];
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      window[W - 1 + k] = to_float(now_x.v[k]), g[k] = to_float(now_dout.v[k]);
    }
#pragma unroll
    for (int k = 0; k + 1 < W; ++k) {
      left[k] = __shfl_sync(kAll, to_float(next_x.v[kVector - (W - 1) + k]), 31);
      if (stretch + 1 == stretches) left[k] = before[k];
    }
    join_left<W>(lane == 0, left, window);
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
