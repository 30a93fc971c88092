// What a block of the forward scan stages in shared memory, and what a lane makes of a tile.
#pragma once

#include <cfloat>

#include "math.cuh"
#include "scan.h"
#include "tile.cuh"

namespace mamba {

// Blocks may share a row's length, in segments of so many steps. Before them, another kernel finds
// what each segment but the last leaves of no state, (count - 1, b, d, n), and the sums of its time
// steps, (count - 1, b, d).
struct Segments {
  int count = 1, steps = 0;
  float *states = nullptr, *sums = nullptr;
};

struct ForwardArgs {
  ScanParams p;
  CudaScanEvents events;
  TileSource u, delta, z, B, C, out;
  int64_t group_channels, blocks_per_group;
  bool every_chunk;     // whether all chunk states are kept, or the first alone
  bool aligned = true;  // no tensor is moved element by element
  Segments segments;
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
__device__ __forceinline__ Place<S> place(const ForwardArgs& a, int block) {
  Place<S> at;
  const int per_group = static_cast<int>(a.blocks_per_group);
  const int per_row = static_cast<int>(a.p.groups) * per_group;
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
    fill_places(a, at, 0);
  }
  // The block begins at `step`.
  __device__ void fill_places(const ForwardArgs& a, const Place<S>& at, int64_t step) {
    if (threadIdx.x > 0) return;
    const auto start = [&](const TileSource& s, int64_t offset) {
      return s.data + (at.row * s.stride_b + step * s.stride_t + offset) * s.element_size();
    };
    u = start(a.u, at.channel * a.u.stride_c);
    delta = start(a.delta, at.channel * a.delta.stride_c);
    z = start(a.z, at.channel * a.z.stride_c), out = start(a.out, at.channel * a.out.stride_c);
    B = start(a.B, at.group * a.p.B.stride[1]), C = start(a.C, at.group * a.p.C.stride[1]);
  }
};

// Which part of a row a block works on.
struct Segment {
  int index, steps;
  int64_t first;

  __device__ __forceinline__ Segment(const ForwardArgs& a, int which) : index(which) {
    first = int64_t{which} * a.segments.steps;
    const int64_t left = a.p.length - first;
    steps = static_cast<int>(a.segments.count > 1 ? min(left, int64_t{a.segments.steps}) : left);
  }
};

// The entering state of a segment from that of the row; `row`: of (b, d). A in the base of
// fast_exp2.
template <int N>
__device__ __forceinline__ void enter_segment(const ForwardArgs& a, const Segment& segment,
                                              int64_t row, int first, const float (&A)[N],
                                              float (&state)[N]) {
  const int64_t rows = a.p.batch * a.p.channels, n = a.p.state_dim;
  for (int k = 0; k < segment.index; ++k) {
    const float sum = a.segments.sums[k * rows + row];
    const float* const left = a.segments.states + (k * rows + row) * n + first;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float add = first + i < n ? left[i] : 0.0f;
      state[i] = fmaf(fminf(decay_of(sum, A[i]), FLT_MAX), state[i], add);
    }
  }
}

// delta, delta * u and the skip D * u of the lane's steps; steps that do not exist or are padding
// get delta = 0, which leaves the state as it is.
template <class S, class K, bool kGeneral, class Memory>
__device__ __forceinline__ void prepare_steps(Lane<S>& lane, const ForwardArgs& a,
                                              const Place<S>& at, const char* smem, const Memory& m,
                                              const BlockConstants<S>& constants, int64_t t0) {
  using Tile = TileLayout<S::kChannels, S::G, S::L>;
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

// Starts to bring the tile's part of up to kStates states of B and C.
template <class S, class K, bool kGeneral, class Memory>
__device__ __forceinline__ void load_projections(const ForwardArgs& a,
                                                 const BlockConstants<S>& from, char* smem,
                                                 const Memory& m, int64_t t0, int first_state) {
  using StateTile = TileLayout<S::kStates, 1, S::kSteps>;
  const int states = min(static_cast<int>(a.p.state_dim) - first_state, S::kStates);
  if (!kGeneral || !a.p.constant_B) {
    load_tile<K, StateTile, S::kThreads>(smem + m.B_raw, a.B,
                                         from.B + first_state * a.B.stride_c * a.B.element_size(),
                                         t0, a.p.length - t0, states);
  }
  if (!kGeneral || !a.p.constant_C) {
    load_tile<K, StateTile, S::kThreads>(smem + m.C_raw, a.C,
                                         from.C + first_state * a.C.stride_c * a.C.element_size(),
                                         t0, a.p.length - t0, states);
  }
}

// The gate, and the output into shared memory.
template <class S, class K, bool kGeneral, class Memory>
__device__ __forceinline__ void finish_steps(Lane<S>& lane, const ForwardArgs& a,
                                             const Place<S>& at, char* smem, const Memory& m) {
  using Tile = TileLayout<S::kChannels, S::G, S::L>;
  const int t = at.g * S::L;
  if (a.p.z.data) {
    float z[S::C][S::L];
    read_steps<Tile, S::C, S::L>(z, smem + m.z, K::order(a.z), K::dtype(a.z), at.c, t);
#pragma unroll
    for (int k = 0; k < S::C; ++k) {
#pragma unroll
      for (int i = 0; i < S::L; ++i) lane.y[k][i] *= z[k][i] * fast_sigmoid(z[k][i]);
    }
  }
  if constexpr (kGeneral) {
    if (lane.padding) {
#pragma unroll
      for (int k = 0; k < S::C; ++k) {
#pragma unroll
        for (int i = 0; i < S::L; ++i) {
          lane.y[k][i] = lane.padding >> i & 1 ? 0.0f : lane.y[k][i];
        }
      }
    }
  }
  write_steps<Tile, S::C, S::L>(lane.y, smem + m.out, K::order(a.out), K::dtype(a.out), at.c, t);
}

}  // namespace mamba
