// The convolution's backward with channels innermost: a lane copies the inputs that it will need
// into a ring of its own in shared memory, far ahead, and keeps windows and sums in registers.
#pragma once

#include "channels.cuh"

namespace mamba {

constexpr int kBackwardChannels = 4;  // of a lane
constexpr int kBackwardBlocks = 4;    // of a multiprocessor
constexpr int kRingBytes = 32 << 10;  // of a block

inline int multiprocessors() {
  thread_local int known_device = -1, count = 1;
  int device = 0;
  cudaGetDevice(&device);
  if (device != known_device) {
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    known_device = device;
  }
  return count;
}

// The steps of a warp: those that keep all multiprocessors busy for the shortest time.
inline int64_t backward_steps(const ConvParams& p) {
  constexpr int64_t kLeast = 32, kMost = 256, kBegin = 12;  // kBegin: what a warp costs, in steps
  const int64_t slots = int64_t{multiprocessors()} * kBackwardBlocks;
  int64_t best = kLeast, least = INT64_MAX;
  for (int64_t steps = kLeast; steps <= kMost; steps += 8) {
    const int64_t blocks = channels_blocks(p, kBackwardChannels, steps);
    const int64_t cost = (blocks + slots - 1) / slots * (steps + kBegin);
    if (cost < least) best = steps, least = cost;
  }
  return best;
}

// What a lane reads: U steps of x and dout a stage.
template <typename T>
struct BackwardRing {
  static constexpr int V = kBackwardChannels, kBytes = V * sizeof(T), U = 32 / kBytes;
  static constexpr int kStages = kRingBytes / (2 * U * kBytes * kChannelsThreads);
  using Vector = Packed<T, V>;
  Vector values[kStages][U][2][kChannelsThreads];

  // As words: the compiler would load the elements one by one.
  __device__ __forceinline__ Vector read(int stage, int k, int which) const {
    using Words = std::conditional_t<kBytes == 8, uint2, uint4>;
    Vector v;
    *reinterpret_cast<Words*>(&v) =
        *reinterpret_cast<const Words*>(&values[stage][k][which][threadIdx.x]);
    return v;
  }
};

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

// A lane's sums and windows.
template <int W, int V>
struct BackwardLane {
  float weight[W][V], bias[V], window[W - 1][V], g[W - 1][V] = {};
  float dweight[V][W] = {}, dbias[V] = {};

  // Takes step t; result: the gradient of the input of step t - (W - 1). `own`: the step counts for
  // dweight and dbias; else it is one of the next warp's.
  template <bool kSilu, typename T>
  __device__ __forceinline__ void step(const Packed<T, V>& x, const Packed<T, V>& dout, bool own,
                                       float (&result)[V]) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const float fresh = to_float(x.v[v]);
      float sum = fmaf(weight[W - 1][v], fresh, bias[v]);
#pragma unroll
      for (int k = W - 2; k >= 0; --k) sum = fmaf(weight[k][v], window[k][v], sum);
      float gradient = to_float(dout.v[v]);
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
  }
};

// The state's share of the gradient at a step behind the last, t = length + column.
template <int V>
__device__ __forceinline__ void add_dfinal(const ConvParams& p, const ChannelsPlace& at,
                                           int64_t column, float (&result)[V]) {
  if (!p.dfinal.data || column < 0) return;
#pragma unroll
  for (int v = 0; v < V; ++v) result[v] += load_at(p.dfinal, at.row, at.channel + v, column);
}

// A warp takes `steps` steps, a multiple of a stage's, and runs W - 1 further, for the gradients
// that its last inputs need.
template <int W, typename T, bool kSilu>
__global__ void __launch_bounds__(kChannelsThreads, kBackwardBlocks)
    backward_channels_kernel(const __grid_constant__ CudaConvParams c, int64_t steps) {
  using Ring = BackwardRing<T>;
  constexpr int V = Ring::V, U = Ring::U, kStages = Ring::kStages;
  __shared__ Ring ring;
  const ConvParams& p = c.p;
  const auto at = ChannelsPlace::of<V>(p, steps);
  BackwardLane<W, V> lane;
  if (at.works) {
    const int64_t x_pitch = p.x.stride[2], dout_pitch = p.dout.stride[2];
    const T* from =
        static_cast<const T*>(p.x.data) + at.row * p.x.stride[0] + at.channel + at.start * x_pitch;
    const T* const x = from - at.start * x_pitch;
    const T* from_dout = static_cast<const T*>(p.dout.data) + at.row * p.dout.stride[0] +
                         at.channel + at.start * dout_pitch;
    T* to = static_cast<T*>(p.dx.data) + at.row * p.dx.stride[0] + at.channel +
            (at.start - (W - 1)) * p.dx.stride[2];
    // Steps to copy and to take, counted from at.start, and the stages that they fill.
    const int copied = static_cast<int>(min(at.end + W - 1, p.length) - at.start);
    const int own = static_cast<int>(at.end - at.start), taken = own + W - 1;
    const int stages = (taken + U - 1) / U;
    const auto copy = [&](int stage) {
      if (stage < stages) {
        auto& places = ring.values[stage % kStages];
#pragma unroll
        for (int k = 0; k < U; ++k) {
          const bool there = stage * U + k < copied;
          copy_ahead<Ring::kBytes>(&places[k][0][threadIdx.x], there ? from : x,
                                   there ? Ring::kBytes : 0);
          copy_ahead<Ring::kBytes>(&places[k][1][threadIdx.x], there ? from_dout : x,
                                   there ? Ring::kBytes : 0);
          from += x_pitch, from_dout += dout_pitch;
        }
      }
      asm volatile("cp.async.commit_group;" ::: "memory");
    };
#pragma unroll
    for (int stage = 0; stage + 1 < kStages; ++stage) copy(stage);
    load_before<W, V>(p, at, x, lane.window);
    load_weights<W, V>(p, at.channel, lane.weight, lane.bias);
#pragma unroll 1
    for (int stage = 0; stage < stages; ++stage) {
      asm volatile("cp.async.wait_group %0;" ::"n"(kStages - 2) : "memory");
      copy(stage + kStages - 1);  // where the stage before was read
      const int place = stage % kStages, first = stage * U;
      if (first >= W - 1 && first + U <= own) {
#pragma unroll
        for (int k = 0; k < U; ++k, to += p.dx.stride[2]) {
          float result[V];
          lane.template step<kSilu, T>(ring.read(place, k, 0), ring.read(place, k, 1), true,
                                       result);
          store_packed<T, V>(result, to);
        }
        continue;
      }
#pragma unroll 1
      for (int k = 0; k < U && first + k < taken; ++k, to += p.dx.stride[2]) {
        float result[V];
        lane.template step<kSilu, T>(ring.read(place, k, 0), ring.read(place, k, 1),
                                     first + k < own, result);
        if (first + k < W - 1) continue;
        add_dfinal<V>(p, at, at.start + first + k - p.length, result);
        store_packed<T, V>(result, to);
      }
    }
  }
  store_shares<W, V>(c, at, lane.dweight, lane.dbias);
}

}  // namespace mamba
