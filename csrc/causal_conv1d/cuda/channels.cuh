// The convolution with channels innermost. A warp takes 32 vectors of V neighbouring channels and S
// steps, the warps of a block neighbouring stretches of S steps; windows stay in registers.
#pragma once

#include <initializer_list>

#include "conv.cuh"

namespace mamba {

constexpr int kChannelsWarps = 4, kChannelsThreads = 32 * kChannelsWarps;

// V, S, and the steps whose loads go out together, by measurement.
template <int V, int S, int U>
struct ChannelsTile {
  static constexpr int kChannels = V, kSteps = S, kAtOnce = U;
};
template <typename T>
using ForwardTile = ChannelsTile<2, 32, 8>;

// The blocks that share a row where a warp takes `steps` steps.
__host__ __device__ __forceinline__ int64_t channels_groups(const ConvParams& p, int64_t steps) {
  return (p.length + kChannelsWarps * steps - 1) / (kChannelsWarps * steps);
}

// Where a warp works; `groups` stretches of kChannelsWarps * steps make a row.
struct ChannelsPlace {
  int64_t channel, row, group, groups, start, end;
  bool works;

  template <int V>
  static __device__ __forceinline__ ChannelsPlace of(const ConvParams& p, int64_t steps) {
    // A grid has fewer than 2^31 blocks, and 32-bit divisions cost less.
    const auto tiles = static_cast<unsigned>((p.channels / V + 31) / 32);
    const auto groups = static_cast<unsigned>(channels_groups(p, steps));
    const unsigned tile = blockIdx.x % tiles, stretch = blockIdx.x / tiles;
    ChannelsPlace at;
    at.channel = (int64_t{tile} * 32 + threadIdx.x % 32) * V;
    at.group = stretch % groups, at.groups = groups;
    at.row = stretch / groups;
    at.start = (at.group * kChannelsWarps + threadIdx.x / 32) * steps;
    at.end = min(at.start + steps, p.length);
    at.works = at.channel < p.channels && at.start < p.length;
    return at;
  }
};

inline unsigned channels_blocks(const ConvParams& p, int channels, int64_t steps) {
  const int64_t tiles = (p.channels / channels + 31) / 32;
  return static_cast<unsigned>(tiles * channels_groups(p, steps) * p.batch);
}

// Whether these (b, d, l) tensors can be accessed a vector of channels at a time.
inline bool fits_channels(const ConvParams& p, std::initializer_list<TensorArg> tensors) {
  constexpr int kMost = 4;  // channels of any tile
  if (p.channels % kMost != 0) return false;
  for (const TensorArg& t : tensors) {
    if (!conv_channel_vectors(t, kMost)) return false;
  }
  return true;
}

// The inputs of the W - 1 steps before `start`.
template <int W, int V, typename T>
__device__ __forceinline__ void load_before(const ConvParams& p, const ChannelsPlace& at,
                                            const T* x, float (&window)[W - 1][V]) {
#pragma unroll
  for (int k = 0; k < W - 1; ++k) {
    const int64_t t = at.start - (W - 1) + k;
    if (t >= 0) {
      const auto packed = load_packed<T, V>(x + t * p.x.stride[2]);
#pragma unroll
      for (int v = 0; v < V; ++v) window[k][v] = to_float(packed.v[v]);
    } else {
#pragma unroll
      for (int v = 0; v < V; ++v) window[k][v] = conv_initial(p, at.row, at.channel + v, -t);
    }
  }
}

// Inputs of the last W - 1 steps, which the last stretch of a row holds at its end, as the state.
template <int W, int V>
__device__ __forceinline__ void store_final(const ConvParams& p, const ChannelsPlace& at,
                                            const float (&window)[W - 1][V]) {
#pragma unroll
  for (int k = 0; k < W - 1; ++k) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      store_float(
          p.final.data, p.final.dtype,
          at.row * p.final.stride[0] + (at.channel + v) * p.final.stride[1] + k * p.final.stride[2],
          window[k][v]);
    }
  }
}

// Steps whose loads go out together: U.
template <int W, typename T, bool kSilu, int V, int S, int U>
__global__ void __launch_bounds__(kChannelsThreads)
    forward_channels_kernel(const __grid_constant__ ConvParams p) {
  const auto at = ChannelsPlace::of<V>(p, S);
  if (!at.works) return;
  const T* const x = static_cast<const T*>(p.x.data) + at.row * p.x.stride[0] + at.channel;
  T* const out = static_cast<T*>(p.out.data) + at.row * p.out.stride[0] + at.channel;
  float weight[W][V], bias[V], window[W - 1][V];
  const auto step = [&](const Packed<T, V>& packed, T* to) {
    float sum[V];
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const float fresh = to_float(packed.v[v]);
      sum[v] = fmaf(weight[W - 1][v], fresh, bias[v]);
#pragma unroll
      for (int k = W - 2; k >= 0; --k) sum[v] = fmaf(weight[k][v], window[k][v], sum[v]);
      if constexpr (kSilu) sum[v] = conv_silu(sum[v]);
#pragma unroll
      for (int k = 0; k + 2 < W; ++k) window[k][v] = window[k + 1][v];
      window[W - 2][v] = fresh;
    }
    store_packed<T, V>(sum, to);
  };
  const int64_t pitch = p.x.stride[2];
  const T* from = x + at.start * pitch;
  T* to = out + at.start * p.out.stride[2];
  Packed<T, V> packed[U];
  const auto load = [&] {
#pragma unroll
    for (int k = 0; k < U; ++k, from += pitch) packed[k] = load_packed<T, V>(from);
  };
  int64_t left = at.end - at.start;
  if (left >= U) load();
  load_before<W, V>(p, at, x, window);
  load_weights<W, V>(p, at.channel, weight, bias);
#pragma unroll 1
  for (; left >= U; left -= U) {
    Packed<T, V> now[U];
#pragma unroll
    for (int k = 0; k < U; ++k) now[k] = packed[k];
    if (left >= 2 * U) load();  // the next steps' loads are out while these are worked on
#pragma unroll
    for (int k = 0; k < U; ++k, to += p.out.stride[2]) step(now[k], to);
  }
#pragma unroll 1
  for (; left > 0; --left, from += pitch, to += p.out.stride[2]) {
    step(load_packed<T, V>(from), to);
  }
  if (at.end == p.length && p.final.data) store_final<W, V>(p, at, window);
}

}  // namespace mamba
