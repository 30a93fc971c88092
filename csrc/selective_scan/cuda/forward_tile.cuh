// What a block of the forward scan stages in shared memory, and what a lane makes of a tile.
#pragma once

#include "math.cuh"
#include "scan.h"
#include "tile.cuh"

namespace mamba {

struct ForwardArgs {
  ScanParams p;
  CudaScanEvents events;
  TileSource u, delta, z, B, C, out;
  int64_t group_channels, blocks_per_group;
  bool every_chunk;  // whether all chunk states are kept, or the first alone
};

template <class S>
struct Forward {
  using Tile = TileLayout<S::kChannels, S::G, S::L>;
  using StateTile = TileLayout<S::kStates, 1, S::kSteps>;
  // fp32 B and C: [state][lane of the group][L + 4], rows padded against bank conflicts.
  static constexpr int kLanePitch = S::L + 4, kStatePitch = S::G * kLanePitch + 4;
  // Chunk states inside a tile; with one chunk a tile they are the carry itself.
  static constexpr int kSlots = S::kSteps > kCudaChunk ? S::kSteps / kCudaChunk : 0,
                       kSlotPitch = S::kStates + 4;

  // Byte offsets in shared memory.
  struct Memory {
    int u, delta, z, B_raw, C_raw, B, C, slots, A, carry, total;
    __host__ __device__ Memory(const ForwardArgs& a) {
      int at = 0;
      const auto take = [&](int bytes) {
        const int here = at;
        at += (bytes + 15) / 16 * 16;
        return here;
      };
      u = take(Tile::bytes(a.u.element_size()));
      delta = take(Tile::bytes(a.delta.element_size()));
      z = take(a.p.z.data ? Tile::bytes(a.z.element_size()) : 0);
      B_raw = take(a.p.constant_B ? 0 : StateTile::bytes(a.B.element_size()));
      C_raw = take(a.p.constant_C ? 0 : StateTile::bytes(a.C.element_size()));
      // The output tile takes the place of B and C once a tile's states are done.
      const int projections = 2 * S::kStates * kStatePitch * 4;
      const int output = Tile::bytes(a.out.element_size());
      B = take(projections > output ? projections : output);
      C = B + S::kStates * kStatePitch * 4;
      slots = take(kSlots * S::kChannels * kSlotPitch * 4);
      A = take(static_cast<int>(a.p.state_dim) * S::kChannels * 4);
      carry = take(static_cast<int>(a.p.state_dim) * S::kChannels * 4);
      total = at;
    }
  };
};

// What a lane keeps over a tile.
template <class S>
struct Lane {
  float delta[S::C][S::L], du[S::C][S::L], y[S::C][S::L];
  float delta_sum[S::C];
  unsigned padding = 0, starts = 0, ends = 0;  // a bit per step
};

template <class S>
struct Place {
  int row, channel, group;  // of the block; the group of B and C
  int channels;             // that exist
  int c, g;  // the lane's first channel in the block, its place among the lanes of it
};

template <class S>
__device__ __forceinline__ Place<S> place(const ForwardArgs& a) {
  Place<S> at;
  const int per_group = static_cast<int>(a.blocks_per_group);
  const int per_row = static_cast<int>(a.p.groups) * per_group, block = blockIdx.x;
  at.row = block / per_row;
  at.group = block % per_row / per_group;
  const int first = block % per_group * S::kChannels;
  at.channel = at.group * static_cast<int>(a.group_channels) + first;
  at.channels = min(static_cast<int>(a.group_channels) - first, S::kChannels);
  const int lane = threadIdx.x % 32;
  at.g = lane % S::G;
  at.c = threadIdx.x / 32 * S::kWarpChannels + lane / S::G * S::C;
  return at;
}

// What all threads of a block read now and then; in shared memory, so that it costs no registers.
template <class S>
struct BlockConstants {
  const char *u, *delta, *z, *B, *C;  // at the block's first channel and step
  char* out;
  float bias[S::kChannels], D[S::kChannels];

  __device__ void fill(const ForwardArgs& a, const Place<S>& at) {
    const int c = threadIdx.x;
    if (c < S::kChannels) {
      const int64_t channel = at.channel + min(c, at.channels - 1);
      const TensorArg &b = a.p.delta_bias, &skip = a.p.D;
      bias[c] = b.data ? load_float(b.data, b.dtype, channel * b.stride[0]) : 0.0f;
      D[c] = skip.data ? load_float(skip.data, skip.dtype, channel * skip.stride[0]) : 0.0f;
    }
    if (c == 0) {
      const auto start = [&](const TileSource& s, int64_t offset) {
        return s.data + (at.row * s.stride_b + offset) * s.element_size();
      };
      u = start(a.u, at.channel * a.u.stride_c),
      delta = start(a.delta, at.channel * a.delta.stride_c);
      z = start(a.z, at.channel * a.z.stride_c), out = start(a.out, at.channel * a.out.stride_c);
      B = start(a.B, at.group * a.p.B.stride[1]), C = start(a.C, at.group * a.p.C.stride[1]);
    }
  }
};

// B or C as fp32, steps innermost; steps that do not exist become 0.
template <class S, int kSize, bool kByState>
__device__ __forceinline__ void convert_projection(float* to, const char* tile, bool bf16,
                                                   int steps) {
  using F = Forward<S>;
  constexpr auto kOrder = kByState ? TileOrder::kChannel : TileOrder::kTime;
  constexpr int kQuads = S::kSteps / 4, kCount = S::kStates * kQuads / S::kThreads;
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    const int i = threadIdx.x + k * S::kThreads;
    const int n = kByState ? i % S::kStates : i / kQuads;
    const int t = 4 * (kByState ? i / S::kStates : i % kQuads);
    const char* from = tile + F::StateTile::at(kOrder, kSize, n, t);
    float v[4];
    if constexpr (kByState) {
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const char* at = from + q * S::kStates * kSize;
        v[q] = kSize == 4 ? *reinterpret_cast<const float*>(at)
                          : unpack(*reinterpret_cast<const uint16_t*>(at), bf16).x;
      }
    } else if constexpr (kSize == 4) {
      const float4 four = *reinterpret_cast<const float4*>(from);
      v[0] = four.x, v[1] = four.y, v[2] = four.z, v[3] = four.w;
    } else {
      const uint2 words = *reinterpret_cast<const uint2*>(from);
      const float2 low = unpack(words.x, bf16), high = unpack(words.y, bf16);
      v[0] = low.x, v[1] = low.y, v[2] = high.x, v[3] = high.y;
    }
    if (steps < S::kSteps) {
#pragma unroll
      for (int q = 0; q < 4; ++q) v[q] = t + q < steps ? v[q] : 0.0f;
    }
    *reinterpret_cast<float4*>(to + n * F::kStatePitch + t / S::L * F::kLanePitch + t % S::L) =
        make_float4(v[0], v[1], v[2], v[3]);
  }
}

template <class S, class K>
__device__ __forceinline__ void convert_projection(float* to, const char* tile, const TileSource& s,
                                                   int steps) {
  const bool bf16 = K::dtype(s) == DType::kBFloat16, by_state = K::order(s) == TileOrder::kChannel;
  if (K::size(s) == 4) {
    if (by_state) {
      convert_projection<S, 4, true>(to, tile, bf16, steps);
    } else {
      convert_projection<S, 4, false>(to, tile, bf16, steps);
    }
  } else if (by_state) {
    convert_projection<S, 2, true>(to, tile, bf16, steps);
  } else {
    convert_projection<S, 2, false>(to, tile, bf16, steps);
  }
}

// delta, delta * u and the skip D * u of the lane's steps; steps that do not exist or are padding
// get delta = 0, which leaves the state as it is.
template <class S, class K, bool kGeneral>
__device__ __forceinline__ void prepare_steps(Lane<S>& lane, const ForwardArgs& a,
                                              const Place<S>& at, const char* smem,
                                              const typename Forward<S>::Memory& m,
                                              const BlockConstants<S>& constants, int64_t t0) {
  using Tile = typename Forward<S>::Tile;
  const int t = at.g * S::L, exist = clamp_int(a.p.length - t0 - t, 0, S::L);
  read_steps<Tile, S::C, S::L>(lane.delta, smem + m.delta, K::order(a.delta), K::dtype(a.delta),
                               at.c, t);
  read_steps<Tile, S::C, S::L>(lane.du, smem + m.u, K::order(a.u), K::dtype(a.u), at.c, t);
  unsigned masked = exist < S::L ? ~0u << exist : 0u;
  if constexpr (kGeneral) {
    lane.padding = lane.starts = lane.ends = 0;
    if (a.events.before) {
      const int64_t first = int64_t{at.row} * a.p.length + t0 + t;
      for (int i = 0; i < exist; ++i) {
        const int before = a.events.before[first + i];
        if (before == CudaScanEvents::kPadding) lane.padding |= 1u << i;
        if (before >= 0 || before == CudaScanEvents::kFreshStart) lane.starts |= 1u << i;
        if (a.events.after[first + i] >= 0) lane.ends |= 1u << i;
      }
      masked |= lane.padding;
    }
  }
#pragma unroll
  for (int k = 0; k < S::C; ++k) {
    const float bias = constants.bias[at.c + k];
#pragma unroll
    for (int i = 0; i < S::L; ++i) lane.delta[k][i] += bias;
    if (a.p.delta_softplus) {
#pragma unroll
      for (int i = 0; i < S::L; ++i) lane.delta[k][i] = softplus(lane.delta[k][i]);
    }
  }
  if (masked) {
#pragma unroll
    for (int k = 0; k < S::C; ++k) {
#pragma unroll
      for (int i = 0; i < S::L; ++i) {
        if (masked >> i & 1) lane.delta[k][i] = lane.du[k][i] = 0.0f;
      }
    }
  }
#pragma unroll
  for (int k = 0; k < S::C; ++k) {
    const float D = constants.D[at.c + k];
    lane.delta_sum[k] = 0.0f;
#pragma unroll
    for (int i = 0; i < S::L; ++i) {
      const float u = lane.du[k][i];
      lane.delta_sum[k] += lane.delta[k][i];
      lane.du[k][i] = lane.delta[k][i] * u;
      lane.y[k][i] = D * u;
    }
  }
}

}  // namespace mamba
