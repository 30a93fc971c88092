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
template <typename T>
using BackwardTile = ChannelsTile<4, 64, 4>;

// Where a warp works; `groups` stretches of kChannelsWarps * S steps make a row.
struct ChannelsPlace {
  int64_t channel, row, group, groups, start, end;
  bool works;

  template <int V, int S>
  static __device__ __forceinline__ ChannelsPlace of(const ConvParams& p) {
    // A grid has fewer than 2^31 blocks, and 32-bit divisions cost less.
    const auto tiles = static_cast<unsigned>((p.channels / V + 31) / 32);
    const auto groups =
        static_cast<unsigned>((p.length + kChannelsWarps * S - 1) / (kChannelsWarps * S));
    const unsigned tile = blockIdx.x % tiles, stretch = blockIdx.x / tiles;
    ChannelsPlace at;
    at.channel = (int64_t{tile} * 32 + threadIdx.x % 32) * V;
    at.group = stretch % groups, at.groups = groups;
    at.row = stretch / groups;
    at.start = (at.group * kChannelsWarps + threadIdx.x / 32) * S;
    at.end = min(at.start + S, p.length);
    at.works = at.channel < p.channels && at.start < p.length;
    return at;
  }
};

template <typename Tile>
int64_t channels_groups(const ConvParams& p) {
  constexpr int kBlockSteps = kChannelsWarps * Tile::kSteps;
  return (p.length + kBlockSteps - 1) / kBlockSteps;
}

template <typename Tile>
unsigned channels_blocks(const ConvParams& p) {
  const int64_t tiles = (p.channels / Tile::kChannels + 31) / 32;
  return static_cast<unsigned>(tiles * channels_groups<Tile>(p) * p.batch);
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
  const auto at = ChannelsPlace::of<V, S>(p);
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

// Adds up the warps' shares and writes the block's: (groups, channels * W) and (groups, channels).
template <int W, int V>
__device__ __forceinline__ void store_shares(const CudaConvParams& c, const ChannelsPlace& at,
                                             const float (&dweight)[V][W],
                                             const float (&dbias)[V]) {
  constexpr int kValues = V * (W + 1);
  __shared__ float shares[kChannelsWarps - 1][kValues][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const auto value = [&](int i) { return i < V * W ? dweight[i / W][i % W] : dbias[i - V * W]; };
  if (warp > 0) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) shares[warp - 1][i][lane] = value(i);
  }
  __syncthreads();
  if (warp > 0 || at.channel >= c.p.channels) return;
  const int64_t d = c.p.channels;
  float* const share = c.partial + (at.row * at.groups + at.group) * d * (W + 1);
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    float sum = value(i);
#pragma unroll
    for (int w = 0; w < kChannelsWarps - 1; ++w) sum += shares[w][i][lane];
    const int v = i < V * W ? i / W : i - V * W;
    share[i < V * W ? (at.channel + v) * W + i % W : d * W + at.channel + v] = sum;
  }
}

// A warp runs W - 1 steps further, for the gradients that its last inputs need.
template <int W, typename T, bool kSilu, int V, int S, int U>
__global__ void __launch_bounds__(kChannelsThreads, 3)
    backward_channels_kernel(const __grid_constant__ CudaConvParams c) {
  const ConvParams& p = c.p;
  const auto at = ChannelsPlace::of<V, S>(p);
  float dweight[V][W] = {}, dbias[V] = {};
  const T* const x = static_cast<const T*>(p.x.data) + at.row * p.x.stride[0] + at.channel;
  const T* const dout = static_cast<const T*>(p.dout.data) + at.row * p.dout.stride[0] + at.channel;
  const T* from = x + at.start * p.x.stride[2];
  const T* from_dout = dout + at.start * p.dout.stride[2];
  T* to =
      static_cast<T*>(p.dx.data) + at.row * p.dx.stride[0] + at.channel + at.start * p.dx.stride[2];
  const int64_t first = at.start + W - 1;  // the step that completes the first gradient
  float weight[W][V], bias[V], window[W - 1][V], g[W - 1][V] = {};
  // `own`: the step counts for dweight and dbias; else it is one of the next stretch.
  const auto step = [&](const Packed<T, V>& x_t, const Packed<T, V>& dout_t, int64_t t, bool own) {
    float result[V];
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const float fresh = to_float(x_t.v[v]);
      float sum = fmaf(weight[W - 1][v], fresh, bias[v]);
#pragma unroll
      for (int k = W - 2; k >= 0; --k) sum = fmaf(weight[k][v], window[k][v], sum);
      float gradient = to_float(dout_t.v[v]);
      if constexpr (kSilu) gradient *= conv_dsilu(sum);
      if (own) {
        dbias[v] += gradient;
        dweight[v][W - 1] = fmaf(gradient, fresh, dweight[v][W - 1]);
#pragma unroll
        for (int k = 0; k < W - 1; ++k) {
          dweight[v][k] = fmaf(gradient, window[k][v], dweight[v][k]);
        }
      }
      result[v] = weight[0][v] * gradient;
#pragma unroll
      for (int k = 0; k < W - 1; ++k) result[v] = fmaf(weight[W - 1 - k][v], g[k][v], result[v]);
#pragma unroll
      for (int k = 0; k + 2 < W; ++k) window[k][v] = window[k + 1][v], g[k][v] = g[k + 1][v];
      window[W - 2][v] = fresh, g[W - 2][v] = gradient;
    }
    if (t < first) return;
    const int64_t column = t - p.length;  // of the state, for step t - (W - 1)
    if (p.dfinal.data && column >= 0) {
#pragma unroll
      for (int v = 0; v < V; ++v) result[v] += load_at(p.dfinal, at.row, at.channel + v, column);
    }
    store_packed<T, V>(result, to);
    to += p.dx.stride[2];
  };
  if (at.works) {
    Packed<T, V> packed_x[U], packed_dout[U];
    const auto load = [&] {
#pragma unroll
      for (int k = 0; k < U; ++k, from += p.x.stride[2], from_dout += p.dout.stride[2]) {
        packed_x[k] = load_packed<T, V>(from), packed_dout[k] = load_packed<T, V>(from_dout);
      }
    };
    int64_t t = at.start;
    if (t + U <= at.end) load();
    load_before<W, V>(p, at, x, window);
    load_weights<W, V>(p, at.channel, weight, bias);
#pragma unroll 1
    for (; t + U <= at.end; t += U) {
      Packed<T, V> now_x[U], now_dout[U];
#pragma unroll
      for (int k = 0; k < U; ++k) now_x[k] = packed_x[k], now_dout[k] = packed_dout[k];
      if (t + 2 * U <= at.end) load();  // the next steps' loads are out while these are worked on
#pragma unroll
      for (int k = 0; k < U; ++k) step(now_x[k], now_dout[k], t + k, true);
    }
#pragma unroll 1
    for (; t < at.end + W - 1; ++t, from += p.x.stride[2], from_dout += p.dout.stride[2]) {
      Packed<T, V> one_x = {}, one_dout = {};
      if (t < p.length) {
        one_x = load_packed<T, V>(from), one_dout = load_packed<T, V>(from_dout);
      }
      step(one_x, one_dout, t, t < at.end);
    }
  }
  store_shares<W, V>(c, at, dweight, dbias);
}

}  // namespace mamba
