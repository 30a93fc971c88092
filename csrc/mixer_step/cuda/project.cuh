// The convolution's step and x_proj. A cluster of blocks has eight rows of the batch: each block
// moves on the windows of a share of the channels and multiplies them with its columns of x_proj;
// each then adds up, for some of the outputs, what all blocks have.
#pragma once

#include <cooperative_groups.h>

#include "../../common/cuda_barrier.cuh"
#include "../../common/cuda_chain.cuh"
#include "../../common/cuda_math.cuh"
#include "../../common/cuda_mma.cuh"
#include "../../common/cuda_vector.cuh"
#include "update.cuh"

namespace mamba {

constexpr int kRowWarps = 2;  // of a row in the convolution
constexpr int kProjectWarps = kStepRows * kRowWarps, kProjectThreads = 32 * kProjectWarps;
constexpr int kProjectBlocks = 4;  // of a cluster: larger ones wait for each other to find a place
constexpr int kTilesAtOnce = 3;    // tiles of 16 outputs
constexpr int kPairsAtOnce = 5;    // pairs of channels that a lane loads together
constexpr int kStepWidth = 4;      // of the convolution
constexpr int kStretch = 32 * kRowWarps;  // pairs of channels that a row's warps have at once
constexpr int kRowPad = 32;               // puts neighbouring rows in shared memory on other banks

// What a block keeps in shared memory.
template <typename T>
struct ProjectShared {
  float* gathered;  // (blocks, outputs each, rows): what the blocks have of this one's outputs
  float* sums;      // (warps, projected, rows)
  float* taps;      // (share, width), then the biases (share,)
  T* x;             // (rows, pitch)
  int share, pitch, each;

  __host__ __device__ ProjectShared(void* memory, int64_t projected, int64_t channels, int blocks) {
    share = static_cast<int>(channels) / blocks, pitch = share + kRowPad;
    each = static_cast<int>(projected) / blocks;
    gathered = static_cast<float*>(memory);
    sums = gathered + kProjectBlocks * each * kStepRows;
    taps = sums + kProjectWarps * projected * kStepRows;
    x = reinterpret_cast<T*>(taps + (kStepWidth + 1) * share);
  }
  size_t bytes() const {
    return reinterpret_cast<size_t>(x + kStepRows * pitch) - reinterpret_cast<size_t>(gathered);
  }
};

// Both channels of a pair: their windows of four inputs each, moved on by one.
template <typename T>
__device__ __forceinline__ uint32_t step_pair(uint4& window, uint32_t input, const float* taps,
                                              const float* bias) {
  constexpr bool kBf16 = std::is_same_v<T, __nv_bfloat16>;
  // Words: inputs 0, 1 and 2, 3 of the first channel, then of the second.
  window.x = (window.x >> 16) | (window.y << 16);
  window.y = (window.y >> 16) | (input << 16);
  window.z = (window.z >> 16) | (window.w << 16);
  window.w = (window.w >> 16) | (input & 0xffff0000u);
  const uint32_t words[4] = {window.x, window.y, window.z, window.w};
  float out[2];
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    const float4 weight = reinterpret_cast<const float4*>(taps)[c];
    const float2 old = halves_to_floats(words[2 * c], kBf16),
                 recent = halves_to_floats(words[2 * c + 1], kBf16);
    float sum = fmaf(weight.w, recent.y, bias[c]);
    sum = fmaf(weight.z, recent.x, sum);
    sum = fmaf(weight.y, old.y, sum);
    sum = fmaf(weight.x, old.x, sum);
    out[c] = sum * fast_sigmoid(sum);
  }
  return floats_to_halves(out[0], out[1], kBf16);
}

// Half a row of the block's channels, of which the warp has every second stretch. Windows are older
// than the row's inputs: the first of them come while those are computed.
template <typename T>
struct ConvRow {
  const ProjectShared<T>& shared;
  int64_t row, start, channels;
  bool exists;
  uint4 window[kPairsAtOnce];

  __device__ __forceinline__ uint4* windows(const MixerStepParams& p) const {
    return reinterpret_cast<uint4*>(static_cast<T*>(p.conv_state) +
                                    (row * channels + start) * kStepWidth);
  }
  __device__ __forceinline__ void load(const MixerStepParams& p, int base) {
#pragma unroll
    for (int k = 0; k < kPairsAtOnce; ++k) {
      window[k] = windows(p)[min(base + k * kStretch, shared.share / 2 - 1)];
    }
  }
  // `base`: the lane's first pair of those that were loaded.
  __device__ __forceinline__ void step(const MixerStepParams& p, int base) {
    const auto* const xz =
        reinterpret_cast<const uint32_t*>(static_cast<const T*>(p.xz) + row * 2 * channels + start);
    auto* const x = reinterpret_cast<uint32_t*>(static_cast<T*>(p.x) + row * channels + start);
    auto* const mine =
        reinterpret_cast<uint32_t*>(shared.x + threadIdx.x / kStretch * shared.pitch);
    uint32_t input[kPairsAtOnce];
#pragma unroll
    for (int k = 0; k < kPairsAtOnce; ++k) {
      input[k] = xz[min(base + k * kStretch, shared.share / 2 - 1)];
    }
#pragma unroll
    for (int k = 0; k < kPairsAtOnce; ++k) {
      const int pair = base + k * kStretch;
      if (pair >= shared.share / 2) break;
      const uint32_t out = step_pair<T>(window[k], input[k], shared.taps + 2 * pair * kStepWidth,
                                        shared.taps + shared.share * kStepWidth + 2 * pair);
      mine[pair] = out;
      if (!exists) continue;
      windows(p)[pair] = window[k];
      x[pair] = out;
    }
  }
};

// A warp's rows of x_proj for some tiles of outputs and 32 of the block's channels.
struct ProjectWeights {
  uint4 low[kTilesAtOnce], high[kTilesAtOnce];

  template <typename T>
  __device__ __forceinline__ void load(const MixerStepParams& p, int64_t start, int tile, int k) {
    const int lane = threadIdx.x % 32, tiles = static_cast<int>(p.projected / 16);
    const T* const weights = static_cast<const T*>(p.x_proj) + start + 32 * k + lane % 4 * 8;
#pragma unroll
    for (int i = 0; i < kTilesAtOnce; ++i) {
      const T* const row = weights + (16 * min(tile + i, tiles - 1) + lane / 4) * p.channels;
      low[i] = __ldg(reinterpret_cast<const uint4*>(row));
      high[i] = __ldg(reinterpret_cast<const uint4*>(row + 8 * p.channels));
    }
  }
};

// The block's share of x_proj's sums: the warps take turns with stretches of 32 channels. `next`
// holds the first weights.
template <typename T>
__device__ __forceinline__ void project_share(const MixerStepParams& p,
                                              const ProjectShared<T>& shared, int64_t start,
                                              ProjectWeights& next) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int tiles = static_cast<int>(p.projected / 16), stretches = shared.share / 32;
  for (int tile = 0; tile < tiles; tile += kTilesAtOnce) {
    float sum[kTilesAtOnce][4] = {};
    for (int k = warp; k < stretches; k += kProjectWarps) {
      const ProjectWeights now = next;
      const bool more = k + kProjectWarps < stretches;
      if (more || tile + kTilesAtOnce < tiles) {
        next.load<T>(p, start, more ? tile : tile + kTilesAtOnce, more ? k + kProjectWarps : warp);
      }
      const uint4 x = *reinterpret_cast<const uint4*>(shared.x + g * shared.pitch + 32 * k + 8 * t);
#pragma unroll
      for (int i = 0; i < kTilesAtOnce; ++i) multiply_32<T>(sum[i], now.low[i], now.high[i], x);
    }
#pragma unroll
    for (int i = 0; i < kTilesAtOnce; ++i) {
      if (tile + i >= tiles) break;
      float* const to =
          shared.sums + (warp * p.projected + 16 * (tile + i) + g) * kStepRows + 2 * t;
      *reinterpret_cast<float2*>(to) = make_float2(sum[i][0], sum[i][1]);
      *reinterpret_cast<float2*>(to + 8 * kStepRows) = make_float2(sum[i][2], sum[i][3]);
    }
  }
}

// The convolution's weights and biases, a pair of channels a thread.
template <typename T>
__device__ __forceinline__ void load_taps(const MixerStepParams& p, const ProjectShared<T>& shared,
                                          int64_t start) {
  for (int i = threadIdx.x; i < shared.share / 2; i += kProjectThreads) {
    RawFloats<2 * kStepWidth> weights;
    RawFloats<2> biases;
    weights.load(p.conv_weight.data, p.conv_weight.dtype, (start + 2 * i) * kStepWidth);
    if (p.conv_bias.data) biases.load(p.conv_bias.data, p.conv_bias.dtype, start + 2 * i);
    float taps[2 * kStepWidth], bias[2] = {};
    weights.floats(taps, p.conv_weight.dtype);
    if (p.conv_bias.data) biases.floats(bias, p.conv_bias.dtype);
    float4* const to = reinterpret_cast<float4*>(shared.taps) + 2 * i;
    to[0] = make_float4(taps[0], taps[1], taps[2], taps[3]);
    to[1] = make_float4(taps[4], taps[5], taps[6], taps[7]);
    reinterpret_cast<float2*>(shared.taps + kStepWidth * shared.share)[i] =
        make_float2(bias[0], bias[1]);
  }
}

// Weights are not in the cache when their layer's turn comes. The clusters share the work of asking
// for x_proj's.
template <typename T>
__device__ __forceinline__ void fetch_projection(const MixerStepParams& p, int64_t start,
                                                 int share) {
  constexpr int kLine = 128 / static_cast<int>(sizeof(T));
  const int lines = (share + kLine - 1) / kLine;
  const int first = threadIdx.x + static_cast<int>(blockIdx.y) * kProjectThreads;
  const int step = kProjectThreads * static_cast<int>(gridDim.y);
  for (int i = first; i < lines * static_cast<int>(p.projected); i += step) {
    const T* const at = static_cast<const T*>(p.x_proj) + i / lines * p.channels + start;
    asm volatile("prefetch.global.L2 [%0];" ::"l"(at + i % lines * kLine));
  }
}

template <typename T>
__global__ void __launch_bounds__(kProjectThreads, 1)
    step_project_kernel(const __grid_constant__ MixerStepParams p) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ float4 memory[];
  const auto cluster = cooperative_groups::this_cluster();
  const int blocks = static_cast<int>(cluster.num_blocks()),
            rank = static_cast<int>(cluster.block_rank());
  const ProjectShared<T> shared(memory, p.projected, p.channels, blocks);
  const int share = shared.share, warp = threadIdx.x / 32;
  const int64_t start = int64_t{rank} * share, first = int64_t{blockIdx.y} * kStepRows;
  __shared__ alignas(8) uint64_t gathering;
  const uint32_t gathered = shared_address(&gathering);
  if (threadIdx.x == 0) {
    init_barrier(gathered, 1);
    publish_barriers();
  }
  __syncthreads();
  if (threadIdx.x == 0) arrive_expecting(gathered, blocks * shared.each * kStepRows * 4);
  __syncwarp();
  arrive_at_cluster();
  const int64_t row = first + warp / kRowWarps;
  ConvRow<T> conv{shared, min(row, p.batch - 1), start, p.channels, row < p.batch, {}};
  conv.load(p, threadIdx.x % kStretch);
  ProjectWeights weights;
  weights.load<T>(p, start, 0, min(warp, share / 32 - 1));
  fetch_projection<T>(p, start, share);
  load_taps(p, shared, start);
  __syncthreads();
  start_next();
  for (int base = threadIdx.x % kStretch; base < share / 2; base += kStretch * kPairsAtOnce) {
    if (base >= kStretch * kPairsAtOnce) conv.load(p, base);
    conv.step(p, base);
  }
  __syncthreads();
  project_share<T>(p, shared, start, weights);
  __syncthreads();
  wait_for_cluster();  // every block has begun: its memory is there
  const int outputs = static_cast<int>(p.projected) * kStepRows, each = shared.each * kStepRows;
  for (int owner = 0; owner < blocks; ++owner) {
    for (int i = threadIdx.x; i < each; i += kProjectThreads) {
      const float* const from = shared.sums + owner * each + i;
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < kProjectWarps; ++w) sum += from[w * outputs];
      store_at(shared_address(shared.gathered + rank * each + i), gathered, owner, sum);
    }
  }
  wait_barrier(gathered, 0);
  for (int i = threadIdx.x; i < each; i += kProjectThreads) {
    const int64_t output = rank * shared.each + i / kStepRows, row_of = first + i % kStepRows;
    if (row_of >= p.batch) continue;
    float sum = 0.0f;
#pragma unroll
    for (int other = 0; other < kProjectBlocks; ++other) {
      if (other < blocks) sum += shared.gathered[other * each + i];
    }
    static_cast<T*>(p.selected)[row_of * p.projected + output] = from_float<T>(sum);
  }
#endif
}

}  // namespace mamba
