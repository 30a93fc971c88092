// The recurrence of the forward scan over a lane's steps and across the lanes of a channel.
#pragma once

#include <cfloat>

#include "forward_tile.cuh"

namespace mamba {

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
    int u, delta, z, B_raw, C_raw, B, C, out, slots, A, carry, total;
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
      C = B + S::kStates * kStatePitch * 4, out = B;
      slots = take(kSlots * S::kChannels * kSlotPitch * 4);
      A = take(static_cast<int>(a.p.state_dim) * S::kChannels * 4);
      carry = take(static_cast<int>(a.p.state_dim) * S::kChannels * 4);
      total = at;
    }
  };
};

// B or C as fp32, steps innermost; steps that do not exist become 0.
template <class S, int kSize, bool kByState>
__device__ __forceinline__ void convert_projection(float* to, const char* tile, bool bf16,
                                                   int steps) {
  using F = Forward<S>;
  constexpr auto kOrder = kByState ? TileOrder::kChannel : TileOrder::kTime;
  constexpr int kQuads = S::kSteps / 4, kAll = S::kStates * kQuads;
  constexpr int kCount = (kAll + S::kThreads - 1) / S::kThreads;
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    const int i = threadIdx.x + k * S::kThreads;
    if (kAll % S::kThreads && i >= kAll) break;
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

// One round of the inclusive scan of the affine maps h -> P h + H over the G lanes of a channel.
// Written in PTX for the shuffle's own predicate, which says whether there is a lane to the left.
template <int G, int kDistance, int C>
__device__ __forceinline__ void scan_round(float (&P)[C], float (&H)[C]) {
  constexpr int kSegments = (32 - G) << 8;
  if constexpr (kDistance < G) {
#pragma unroll
    for (int k = 0; k < C; ++k) {
      asm("{\n\t.reg .pred p;\n\t.reg .f32 left;\n\t"
          "shfl.sync.up.b32 left|p, %0, %2, %3, 0xffffffff;\n\t"
          "@p fma.rn.f32 %0, %1, left, %0;\n\t}"
          : "+f"(H[k])
          : "f"(P[k]), "n"(kDistance), "n"(kSegments));
      if constexpr (2 * kDistance < G) P[k] *= __shfl_up_sync(0xffffffffu, P[k], kDistance, G);
    }
  }
}

// The first lane's H already holds the state that enters the tile.
template <int G, int C>
__device__ __forceinline__ void scan_lanes(float (&P)[C], float (&H)[C]) {
  scan_round<G, 1, C>(P, H);
  scan_round<G, 2, C>(P, H);
  scan_round<G, 4, C>(P, H);
  scan_round<G, 8, C>(P, H);
  scan_round<G, 16, C>(P, H);
}

template <int L>
__device__ __forceinline__ void read_floats(float (&v)[L], const float* from) {
#pragma unroll
  for (int i = 0; i < L; i += 4) {
    const float4 four = *reinterpret_cast<const float4*>(from + i);
    v[i] = four.x, v[i + 1] = four.y, v[i + 2] = four.z, v[i + 3] = four.w;
  }
}

// A lane's places in shared memory for one state; they advance from state to state.
struct StatePlace {
  const float *B, *C;       // the lane's steps
  const float* A;           // the lane's channels
  float *carry, *entering;  // likewise; `entering` gathers the chunk states
  bool keeps;               // whether this lane's entering state is a chunk state

  template <class S>
  __device__ __forceinline__ void advance(int states) {
    B += states * Forward<S>::kStatePitch, C += states * Forward<S>::kStatePitch;
    A += states * S::kChannels, carry += states * S::kChannels, entering += states;
  }
};

template <int C>
__device__ __forceinline__ void read_channels(float (&v)[C], const float* from) {
  if constexpr (C == 2) {
    const float2 two = *reinterpret_cast<const float2*>(from);
    v[0] = two.x, v[1] = two.y;
  } else {
    v[0] = *from;
  }
}
template <int C>
__device__ __forceinline__ void write_channels(float* to, const float* v) {
  if constexpr (C == 2) {
    *reinterpret_cast<float2*>(to) = make_float2(v[0], v[1]);
  } else {
    *to = v[0];
  }
}

// seq_idx over one state's steps: padding adds nothing, and a sequence starts from its own state.
template <class S>
__device__ __forceinline__ void apply_starts(const Lane<S>& lane, const ForwardArgs& a,
                                             const int64_t first_step, int64_t at_state,
                                             bool exists, float (&decay)[S::L],
                                             float (&input)[S::L], float& P) {
  if (lane.padding) {
#pragma unroll
    for (int i = 0; i < S::L; ++i) input[i] = lane.padding >> i & 1 ? 0.0f : input[i];
  }
  if (!lane.starts) return;
  P = 0.0f;
#pragma unroll
  for (int i = 0; i < S::L; ++i) {
    if (!(lane.starts >> i & 1)) continue;
    const int id = a.events.before[first_step + i];
    if (id >= 0 && exists) {
      const float start = a.p.initial_state[id * a.p.channels * a.p.state_dim + at_state];
      input[i] = fmaf(decay[i], start, input[i]);
    }
    decay[i] = 0.0f;
  }
}

// N neighbouring states of the lane's channels over the lane's steps: adds C h to y. States and
// channels go side by side, so that each hides the latencies of the others.
template <class S, bool kGeneral, int N>
__device__ __forceinline__ void run_states(Lane<S>& lane, const ForwardArgs& a, const Place<S>& at,
                                           const StatePlace& in, int64_t first_step, int state) {
  using F = Forward<S>;
  constexpr int C = S::C, L = S::L, kMaps = N * C;
  float decay[kMaps][L], input[kMaps][L], P[kMaps], h[kMaps], carry[kMaps];
#pragma unroll
  for (int j = 0; j < N; ++j) {
    float B[L], A[C];
    if (!kGeneral || !a.p.constant_B) read_floats<L>(B, in.B + j * F::kStatePitch);
    read_channels<C>(A, in.A + j * S::kChannels);
    float entering[C] = {};
    if (at.g == 0) read_channels<C>(entering, in.carry + j * S::kChannels);
#pragma unroll
    for (int k = 0; k < C; ++k) {
      const int m = j * C + k;
      if constexpr (kGeneral) {
        const int channel = at.channel + min(at.c + k, at.channels - 1);
        const float value = a.p.constant_B ? load_at(a.p.B, channel, state + j) : 0.0f;
#pragma unroll
        for (int i = 0; i < L; ++i) B[i] = a.p.constant_B ? value : B[i];
      }
#pragma unroll
      for (int i = 0; i < L; ++i) {
        decay[m][i] = decay_of(lane.delta[k][i], A[k]);
        input[m][i] = lane.du[k][i] * B[i];
      }
      P[m] = fminf(decay_of(lane.delta_sum[k], A[k]), FLT_MAX);
      if constexpr (kGeneral) {
        const int64_t channel = at.channel + min(at.c + k, at.channels - 1);
        apply_starts<S>(lane, a, first_step, channel * a.p.state_dim + state + j,
                        at.c + k < at.channels, decay[m], input[m], P[m]);
      }
      h[m] = carry[m] = entering[k];
    }
  }
#pragma unroll
  for (int i = 0; i < L; ++i) {
#pragma unroll
    for (int m = 0; m < kMaps; ++m) h[m] = fmaf(decay[m][i], h[m], input[m][i]);
  }
  scan_lanes<S::G, kMaps>(P, h);
  // A lane takes what leaves the lane to its left; a channel's first lane what leaves the tile, and
  // is the one that writes it, as it has read what entered: no other lane touches the carry.
  const int left = static_cast<int>(threadIdx.x + S::G - 1) % S::G;
#pragma unroll
  for (int m = 0; m < kMaps; ++m) h[m] = __shfl_sync(0xffffffffu, h[m], left, S::G);
  if (at.g == 0) {
#pragma unroll
    for (int j = 0; j < N; ++j) write_channels<C>(in.carry + j * S::kChannels, h + j * C);
#pragma unroll
    for (int m = 0; m < kMaps; ++m) h[m] = carry[m];
  }
  if (F::kSlots > 0 && in.keeps) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
#pragma unroll
      for (int k = 0; k < C; ++k) in.entering[k * F::kSlotPitch + j] = h[j * C + k];
    }
  }
#pragma unroll
  for (int j = 0; j < N; ++j) {
    float Cs[L];
    if (!kGeneral || !a.p.constant_C) read_floats<L>(Cs, in.C + j * F::kStatePitch);
#pragma unroll
    for (int k = 0; k < C; ++k) {
      const int m = j * C + k;
      if constexpr (kGeneral) {
        const int64_t channel = at.channel + min(at.c + k, at.channels - 1);
        const float value = a.p.constant_C ? load_at(a.p.C, channel, state + j) : 0.0f;
#pragma unroll
        for (int i = 0; i < L; ++i) Cs[i] = a.p.constant_C ? value : Cs[i];
      }
#pragma unroll
      for (int i = 0; i < L; ++i) {
        h[m] = fmaf(decay[m][i], h[m], input[m][i]);
        lane.y[k][i] = fmaf(Cs[i], h[m], lane.y[k][i]);
        if constexpr (kGeneral) {
          if (lane.ends >> i & 1 && at.c + k < at.channels) {
            const int64_t channel = at.channel + at.c + k;
            const int64_t id = a.events.after[first_step + i];
            a.p.final_state[(id * a.p.channels + channel) * a.p.state_dim + state + j] = h[m];
          }
        }
      }
    }
  }
}

}  // namespace mamba
