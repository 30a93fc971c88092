// What the kernels of the scan's backward share: their arguments and how a block divides its work.
#pragma once

#include <cuda_runtime.h>

#include <cfloat>
#include <type_traits>

#include "../../common/cuda_launch.h"
#include "barrier.cuh"
#include "math.cuh"
#include "scan_backward.h"
#include "tile.cuh"

namespace mamba {

constexpr int kWideWarps = 12;  // of a block for many channels
constexpr int kSumsPitch = 68;  // of a warp's sums of a state, in fours: see SumsPlace

// A lane owns 16 steps of a channel, a warp 64 steps of 8 channels: lane 8 i + j holds the i-th
// steps of the j-th channel. Lanes that differ in j % 4 lie as mma sums them.
template <int kWarps_>
struct BackwardShape {
  static constexpr int L = 16, kSteps = 64, kLanes = kSteps / L;  // lanes of a channel
  static constexpr int kWarps = kWarps_, kThreads = 32 * kWarps;
  static constexpr int kWarpChannels = 8, kChannels = kWarps * kWarpChannels;
  static constexpr int kStates = 16;  // staged at once
  static constexpr int kRing = 3;     // states whose sums over the warps are on their way
  static constexpr int kMinBlocks = 12 / kWarps;  // 168 registers a thread
};

// Tiles without a pad inside the rows of kTime: a lane's steps are one or two 16-byte words, and
// the lanes that read at once differ in the channel.
template <int kChannels>
struct BackwardTile {
  static constexpr int kSteps = 64, kRow = kChannels;

  __device__ static constexpr int at(TileOrder order, int size, int c, int t) {
    if (order == TileOrder::kChannel) return (t * kChannels + c + t / 16 * 8) * size;
    return c * (kSteps * size + 16) + t * size;
  }
  __host__ __device__ static constexpr int bytes(int size) {
    const int by_channel = (kSteps * kChannels + kSteps / 2) * size;
    const int by_time = kChannels * (kSteps * size + 16);
    return by_channel > by_time ? by_channel : by_time;
  }
};

struct BackwardArgs {
  ScanParams p;
  CudaScanEvents events;
  TileSource u, delta, z, dout, du, ddelta, dz, B, C;
  const float* dfinal_state;
  float *dinitial_state, *dA, *dB, *dC, *dD, *ddelta_bias;
  BackwardPlan plan;
  BackwardScratch scratch;
  int64_t group_channels, tiles;
  bool wide_states;  // chunk states are copied 16 bytes at a time
  bool aligned;      // no (b, d, l) tensor is moved element by element
};

// The kernels, by dtype.
const char* backward_bf16(const BackwardArgs& a, cudaStream_t stream);
const char* backward_fp16(const BackwardArgs& a, cudaStream_t stream);
const char* backward_fp32(const BackwardArgs& a, cudaStream_t stream);
const char* backward_any(const BackwardArgs& a, cudaStream_t stream);

// scratch.adjoint, what leaves each segment where nothing enters it, becomes what enters it.
const char* chain_segments(const BackwardArgs& a, cudaStream_t stream);

inline const char* message(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// A block's work: some channels of a group, over the tiles of one segment of one row.
template <class S>
struct BackwardPlace {
  int64_t row, segment, slice, channel;  // channel: the block's first
  int channels, group;                   // channels that exist; group of B and C

  __device__ __forceinline__ BackwardPlace(const BackwardArgs& a, int64_t unit) {
    const int64_t slices = a.plan.slices;
    slice = unit % slices;
    segment = unit / slices % a.plan.segments;
    row = unit / slices / a.plan.segments;
    group = static_cast<int>(slice / a.plan.blocks_per_group);
    const int64_t first = slice % a.plan.blocks_per_group * S::kChannels;
    channel = group * a.group_channels + first;
    channels = clamp_int(a.group_channels - first, 0, S::kChannels);
  }

  // Read anew wherever they are needed: registers are scarcer than time.
  __device__ __forceinline__ static int thread() {
    unsigned id;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(id));
    __builtin_assume(id < S::kThreads);
    return static_cast<int>(id);
  }
  __device__ __forceinline__ static int warp() { return thread() / 32; }
  __device__ __forceinline__ static int lane() { return thread() % 32; }
  // The lane's channel in the block, and its place in time.
  __device__ __forceinline__ static int c() {
    const int id = thread();
    return id / 32 * S::kWarpChannels + id % S::kWarpChannels;
  }
  __device__ __forceinline__ static int i() { return lane() / S::kWarpChannels; }
};

// Byte offsets in shared memory.
template <class S, bool kGeneral>
struct BackwardMemory {
  using Tile = BackwardTile<S::kChannels>;
  using StateTile = BackwardTile<S::kStates>;
  // B and C in fp32: [state][B or C][lane of a channel][its steps], padded against bank conflicts.
  static constexpr int kLanePitch = S::L + 4, kRowPitch = S::kLanes * kLanePitch;
  static constexpr int kStatePitch = 2 * kRowPitch + 4;
  // Of each state and channel: A, the adjoint that enters the tile, dA, constant dB, constant dC.
  static constexpr int kRecord = kGeneral ? 5 : 3, kRecordPitch = kRecord * S::kChannels;
  static constexpr int kEnterPitch = S::kStates + 4;  // entering states: [channel][state]

  static constexpr int kTensors = 9;            // u, delta, dout, z, du, ddelta, dz, B, C
  static constexpr int kStarts = kTensors + 3;  // and partial dC, partial dB, chunk states

  int u, delta, dout, z, stage, B_raw, C_raw, projections, entering, deltas, sums, barriers,
      records, constants, totals, starts, numbers, total;

  __host__ __device__ BackwardMemory(const BackwardArgs& a, int stages) {
    int at = 0;
    const auto take = [&](int bytes) {
      const int here = at;
      at += (bytes + 15) / 16 * 16;
      return here;
    };
    u = take(Tile::bytes(a.u.element_size()));
    delta = take(Tile::bytes(a.delta.element_size()));
    dout = take(Tile::bytes(a.dout.element_size()));
    z = take(a.p.z.data ? Tile::bytes(a.z.element_size()) : 0);
    stage = at;  // the second stage lies behind the first
    take((stages - 1) * stage);
    B_raw = take(a.p.constant_B ? 0 : StateTile::bytes(a.B.element_size()));
    C_raw = take(a.p.constant_C ? 0 : StateTile::bytes(a.C.element_size()));
    projections = take(S::kStates * kStatePitch * 4);
    entering = take(2 * S::kChannels * kEnterPitch * 4);
    deltas = take(S::kThreads * S::L * 4);  // [four steps of a lane][thread]
    sums = take(S::kRing * S::kWarps * kSumsPitch * 16);
    barriers = take(2 * S::kRing * 8);
    records = take(static_cast<int>(a.p.state_dim) * kRecordPitch * 4);
    constants = take(2 * S::kChannels * 4);  // bias, D
    totals = take(S::kThreads * 8);          // each lane's dD and ddelta_bias
    starts = take(kStarts * 8);              // where the block's channels lie at step 0
    numbers = take(3 * 4);                   // the block's channels, tiles and last tile
    total = at;
  }
};

}  // namespace mamba
