// What the kernels of the scan's backward share: their arguments, how a block divides its work, and
// the lanes' inputs. Only the backward's *.cu files include this.
#pragma once

#include <cuda_runtime.h>

#include <cfloat>

#include "math.cuh"
#include "scan_backward.h"
#include "tile.cuh"

namespace mamba {

// A warp holds 4 groups of 8 lanes; a lane owns 8 steps of 2 channels, a warp 64 steps of 8. Lane
// 4 i + j holds the i-th steps of the j-th channels, which is how mma fragments lie.
template <int kWarps_>
struct BackwardShape {
  static constexpr int C = 2, L = 8, kSteps = 64, kStates = 16;  // states staged at once
  static constexpr int kWarps = kWarps_, kThreads = 32 * kWarps;
  static constexpr int kWarpChannels = 8, kChannels = kWarps * kWarpChannels;
  static constexpr int kBatch = 4;  // states between two sums over the warps
  static constexpr int kMinBlocks = kWarps > 12 ? 1 : 12 / kWarps;
};

// Tiles without a pad inside the rows of kTime: a lane's steps are one or two 16-byte words, and the
// lanes that read at once differ in the channel.
template <int kChannels>
struct BackwardTile {
  static constexpr int kSteps = 64, kRow = kChannels;

  __device__ static int at(TileOrder order, int size, int c, int t) {
    if (order == TileOrder::kChannel) return (t * kChannels + c + t / 8 * 8) * size;
    return c * (kSteps * size + 16) + t * size;
  }
  __host__ __device__ static constexpr int bytes(int size) {
    const int by_channel = (kSteps * kChannels + 64) * size;
    const int by_time = kChannels * (kSteps * size + 16);
    return by_channel > by_time ? by_channel : by_time;
  }
};

struct BackwardArgs {
  ScanParams p;
  CudaScanEvents events;
  TileSource u, delta, z, dout, B, C, du, ddelta, dz;
  const float* dfinal_state;
  float *dinitial_state, *dA, *dB, *dC, *dD, *ddelta_bias;
  BackwardPlan plan;
  BackwardScratch scratch;
  int64_t group_channels, tiles;
};

// What a lane keeps over a tile.
template <class S>
struct BackwardLane {
  float delta[S::C][S::L], du[S::C][S::L], dy[S::C][S::L];
  float delta_sum[S::C];
  unsigned masked = 0, starts = 0, ends = 0;  // a bit per step
};

// A block's work: some channels of a group, over the tiles of one segment of one row.
template <class S>
struct BackwardPlace {
  int64_t row, segment, slice, channel;  // channel: the block's first
  int channels, group;                   // channels that exist; group of B and C
  int warp, lane, c, i;                  // the lane's first channel in the block; its place in time

  __device__ BackwardPlace(const BackwardArgs& a, int64_t unit) {
    const int64_t slices = a.plan.slices;
    slice = unit % slices;
    segment = unit / slices % a.plan.segments;
    row = unit / slices / a.plan.segments;
    group = static_cast<int>(slice / a.plan.blocks_per_group);
    const int64_t first = slice % a.plan.blocks_per_group * S::kChannels;
    channel = group * a.group_channels + first;
    channels = clamp_int(a.group_channels - first, 0, S::kChannels);
    warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    c = warp * S::kWarpChannels + lane % 4 * S::C;
    i = lane / 4;
  }
};

// Where the first channel's step 0 of a block lies in a tensor.
template <class S>
__device__ __forceinline__ char* block_start(const TileSource& s, const BackwardPlace<S>& at) {
  return s.data + (at.row * s.stride_b + at.channel * s.stride_c) * s.element_size();
}

__device__ __forceinline__ float load_channel(const TensorArg& x, int64_t channel) {
  return x.data ? load_float(x.data, x.dtype, channel * x.stride[0]) : 0.0f;
}

// One step of the inclusive scan of the affine maps H -> P h + H over the lanes of a channel, which
// are 4 apart; `kUp` goes forward in time. Growing products stay finite, so that 0 stays 0.
template <int kLanes, bool kUp, bool kLast>
__device__ __forceinline__ void combine(float& P, float& H) {
  if constexpr (kUp) {
    asm("{.reg .pred p; .reg .f32 h;\n"
        "shfl.sync.up.b32 h|p, %0, %2, 0, -1;\n"
        "@p fma.rn.f32 %0, %1, h, %0;}"
        : "+f"(H)
        : "f"(P), "n"(4 * kLanes));
  } else {
    asm("{.reg .pred p; .reg .f32 h;\n"
        "shfl.sync.down.b32 h|p, %0, %2, 31, -1;\n"
        "@p fma.rn.f32 %0, %1, h, %0;}"
        : "+f"(H)
        : "f"(P), "n"(4 * kLanes));
  }
  if constexpr (!kLast) {
    // Lanes without a neighbour have no use for their product.
    const float other = kUp ? __shfl_up_sync(0xffffffffu, P, 4 * kLanes)
                            : __shfl_down_sync(0xffffffffu, P, 4 * kLanes);
    P = fminf(P * other, FLT_MAX);
  }
}

template <bool kUp>
__device__ __forceinline__ float scan_steps(float P, float H) {
  combine<1, kUp, false>(P, H);
  combine<2, kUp, false>(P, H);
  combine<4, kUp, true>(P, H);
  return H;
}

__device__ __forceinline__ void read_eight(float (&v)[8], const float* from) {
  const float4 low = *reinterpret_cast<const float4*>(from);
  const float4 high = *reinterpret_cast<const float4*>(from + 4);
  v[0] = low.x, v[1] = low.y, v[2] = low.z, v[3] = low.w;
  v[4] = high.x, v[5] = high.y, v[6] = high.z, v[7] = high.w;
}

}  // namespace mamba
