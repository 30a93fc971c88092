// One state of the scan's backward: what a warp does for every (channel, step, state).
#pragma once

#include "backward.cuh"

namespace mamba {

// What a lane keeps over a tile.
template <class S>
struct BackwardLane {
  float delta[S::C][S::L], du[S::C][S::L], dy[S::C][S::L];   // du is delta * u
  float ddu[S::C][S::L], ddelta[S::C][S::L], y[S::C][S::L];  // sums over the states
  float delta_sum[S::C];
  unsigned masked = 0, starts = 0, ends = 0;  // a bit per step
};

// The inclusive scans of the affine maps x -> P x + h forward and x -> P x + g backward in time
// over the lanes of a channel, which lie 4 apart. Both need the same products of P: the backward
// one takes them from later lanes. Growing products stay finite, so that 0 stays 0.
__device__ __forceinline__ void scan_both(float P, float& h, float& g) {
  asm volatile(
      "{.reg .pred p, q; .reg .f32 a, b, c;\n"
      "shfl.sync.up.b32 a|p, %0, 4, 0, -1;\n"
      "shfl.sync.down.b32 b|q, %1, 4, 31, -1;\n"
      "shfl.sync.up.b32 c, %2, 4, 0, -1;\n"
      "@p fma.rn.f32 %0, %2, a, %0;\n"
      "@q fma.rn.f32 %1, %2, b, %1;\n"
      "mul.f32 %2, %2, c;}"
      : "+f"(h), "+f"(g), "+f"(P));
  P = fminf(P, FLT_MAX);
  asm volatile(
      "{.reg .pred p, q; .reg .f32 a, b, c, d;\n"
      "shfl.sync.down.b32 d, %2, 4, 31, -1;\n"
      "shfl.sync.up.b32 a|p, %0, 8, 0, -1;\n"
      "shfl.sync.down.b32 b|q, %1, 8, 31, -1;\n"
      "shfl.sync.up.b32 c, %2, 8, 0, -1;\n"
      "@p fma.rn.f32 %0, %2, a, %0;\n"
      "@q fma.rn.f32 %1, d, b, %1;\n"
      "mul.f32 %2, %2, c;}"
      : "+f"(h), "+f"(g), "+f"(P));
  P = fminf(P, FLT_MAX);
  asm volatile(
      "{.reg .pred p, q; .reg .f32 a, b, d;\n"
      "shfl.sync.down.b32 d, %2, 12, 31, -1;\n"
      "shfl.sync.up.b32 a|p, %0, 16, 0, -1;\n"
      "shfl.sync.down.b32 b|q, %1, 16, 31, -1;\n"
      "@p fma.rn.f32 %0, %2, a, %0;\n"
      "@q fma.rn.f32 %1, d, b, %1;}"
      : "+f"(h), "+f"(g)
      : "f"(P));
}

__device__ __forceinline__ void read_eight(float (&v)[8], const float* from) {
  const float4 low = *reinterpret_cast<const float4*>(from);
  const float4 high = *reinterpret_cast<const float4*>(from + 4);
  v[0] = low.x, v[1] = low.y, v[2] = low.z, v[3] = low.w;
  v[4] = high.x, v[5] = high.y, v[6] = high.z, v[7] = high.w;
}

// Sums over a warp's channels on the tensor cores. The first operand of an m16n8k8 product is four
// steps of every lane, the second says to which columns they go: lane 4 n + k holds its rows k and
// k + 4 of column n. In the end lane 4 i + j has steps 8 i + 4 (j % 2) + {0, 1, 2, 3} of quantity
// j / 2.
struct ChannelColumns {
  uint32_t low[4], high[4];
  __device__ __forceinline__ explicit ChannelColumns(int lane) {
#pragma unroll
    for (int p = 0; p < 4; ++p) {
      low[p] = lane / 4 == 2 * p ? __float_as_uint(1.0f) : 0u;
      high[p] = lane / 4 == 2 * p + 1 ? __float_as_uint(1.0f) : 0u;
    }
  }
};

__device__ __forceinline__ void multiply_tf32(float (&d)[4], const uint32_t (&v)[4], uint32_t low,
                                              uint32_t high) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]), "r"(low), "r"(high));
}

// Terms have 11 bits, which is enough for 16-bit results; kExact adds the next 11.
template <bool kExact>
__device__ __forceinline__ void add_channels(float (&d)[4], float a, float b, float c, float e,
                                             uint32_t low, uint32_t high) {
  const float v[4] = {a, c, b, e};
  uint32_t bits[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) bits[k] = __float_as_uint(v[k]);
  if constexpr (kExact) {
    uint32_t rest[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      bits[k] &= 0xffffe000u;
      rest[k] = __float_as_uint(v[k] - __uint_as_float(bits[k]));
    }
    multiply_tf32(d, rest, low, high);
  }
  multiply_tf32(d, bits, low, high);
}

// Adds what lanes hold over the lanes of their channel; every lane gets the sum.
__device__ __forceinline__ float sum_steps(float v) {
  v += __shfl_xor_sync(0xffffffffu, v, 4);
  v += __shfl_xor_sync(0xffffffffu, v, 8);
  return v + __shfl_xor_sync(0xffffffffu, v, 16);
}

// Sums of one state: over the warp's channels, and over the lane's steps for each channel.
template <class S>
struct StateSums {
  float channels[2][4] = {};
  float dA[S::C], dB[S::C] = {}, dC[S::C] = {}, leaving[S::C];
};

template <class S, bool kGeneral, bool kExact>
struct StateRun {
  const BackwardArgs& a;
  const BackwardPlace<S>& at;
  BackwardLane<S>& lane;
  const ChannelColumns& columns;
  const int64_t first_step;  // row * length + the lane's first step

  __device__ __forceinline__ int64_t state_index(int id, int k, int state) const {
    return (id * a.p.channels + at.channel + at.c + k) * a.p.state_dim + state;
  }

  // Channel k of the lane; A is in the base of exp2_fast.
  template <int k>
  __device__ __forceinline__ void channel(int state, const float (&B)[S::L], const float (&C)[S::L],
                                          float A, float entering, float carry,
                                          StateSums<S>& sums) const {
    const float (&delta)[S::L] = lane.delta[k];
    const float (&du)[S::L] = lane.du[k];
    const float (&dy)[S::L] = lane.dy[k];
    float decay[S::L], input[S::L], grad[S::L];
#pragma unroll
    for (int i = 0; i < S::L; ++i) {
      decay[i] = exp2_fast(delta[i] * A);
      input[i] = du[i] * B[i];
      grad[i] = C[i] * dy[i];
    }
    float P = fminf(exp2_fast(lane.delta_sum[k] * A), FLT_MAX);
    if constexpr (kGeneral) apply_events(k, state, decay, input, grad, P);
    // Both recurrences over the lane's steps alone, but that the ends take what enters the tile.
    float h = at.i == 0 ? entering : 0.0f, g = at.i == 7 ? carry : 0.0f;
#pragma unroll
    for (int i = 0; i < S::L; ++i) {
      h = fmaf(decay[i], h, input[i]);
      g = decay[S::L - 1 - i] * (grad[S::L - 1 - i] + g);
    }
    scan_both(P, h, g);
    sums.leaving[k] = g;
    h = __shfl_up_sync(0xffffffffu, h, 4);
    g = __shfl_down_sync(0xffffffffu, g, 4);
    if (at.i == 0) h = entering;
    if (at.i == 7) g = carry;
    // The states again; each step's is kept as it was before.
    float before[S::L], terms[S::L];
#pragma unroll
    for (int i = 0; i < S::L; ++i) {
      before[i] = h;
      h = fmaf(decay[i], h, input[i]);
      terms[i] = h * dy[i];
      if (a.p.z.data) lane.y[k][i] = fmaf(C[i], h, lane.y[k][i]);
    }
    if (kGeneral && a.p.constant_C) {
#pragma unroll
      for (int i = 0; i < S::L; ++i) sums.dC[k] += terms[i];
    } else {
      add_terms(sums, terms, 0);
    }
    float dA = 0.0f;
#pragma unroll
    for (int i = S::L - 1; i >= 0; --i) {
      const float dh = grad[i] + g;
      g = decay[i] * dh;
      terms[i] = dh * du[i];
      lane.ddu[k][i] = fmaf(dh, B[i], lane.ddu[k][i]);
      float through = g * before[i];
      if constexpr (kGeneral) {
        if (lane.starts >> i & 1) through = at_start(k, i, state, A, dh, input[i]);
      }
      lane.ddelta[k][i] = fmaf(A, through, lane.ddelta[k][i]);
      dA = fmaf(delta[i], through, dA);
    }
    sums.dA[k] = dA;
    if constexpr (kGeneral) {
      if (a.scratch.shared_starts) add_starts(k, state, input);
      __syncwarp();
    }
    if (kGeneral && a.p.constant_B) {
#pragma unroll
      for (int i = 0; i < S::L; ++i) sums.dB[k] += terms[i];
    } else {
      add_terms(sums, terms, 2);
    }
  }

  __device__ __forceinline__ void add_terms(StateSums<S>& sums, const float (&v)[S::L],
                                            int column) const {
    add_channels<kExact>(sums.channels[0], v[0], v[1], v[2], v[3], columns.low[column],
                         columns.high[column]);
    add_channels<kExact>(sums.channels[1], v[4], v[5], v[6], v[7], columns.low[column + 1],
                         columns.high[column + 1]);
  }

  // Restarts inside the lane's steps take their initial state and let nothing pass; the last step
  // of a sequence gets its final state's gradient.
  __device__ __forceinline__ void apply_events(int k, int state, float (&decay)[S::L],
                                               float (&input)[S::L], float (&grad)[S::L],
                                               float& P) const {
    const bool exists = at.c + k < at.channels;
    if (lane.starts) {
      P = 0.0f;
#pragma unroll
      for (int i = 0; i < S::L; ++i) {
        if (!(lane.starts >> i & 1)) continue;
        const int id = a.events.before[first_step + i];
        if (id >= 0 && exists) {
          input[i] = fmaf(decay[i], a.p.initial_state[state_index(id, k, state)], input[i]);
        }
        decay[i] = 0.0f;
      }
    }
    if (lane.ends && a.dfinal_state && exists) {
#pragma unroll
      for (int i = 0; i < S::L; ++i) {
        if (!(lane.ends >> i & 1)) continue;
        grad[i] += a.dfinal_state[state_index(a.events.after[first_step + i], k, state)];
      }
    }
    __syncwarp();
  }

  // The adjoint times the decayed state where step i took an initial state; `decayed` is what that
  // state gets.
  __device__ __forceinline__ float at_start(int k, int i, int state, float A, float dh,
                                            float& decayed) const {
    const int id = a.events.before[first_step + i];
    decayed = 0.0f;
    if (id < 0 || at.c + k >= at.channels) return 0.0f;
    decayed = exp2_fast(lane.delta[k][i] * A) * dh;
    return decayed * a.p.initial_state[state_index(id, k, state)];
  }

  // Hands the lane's adjoints to their initial states. Where starts share one, lane after lane
  // adds.
  __device__ __forceinline__ void add_starts(int k, int state, const float (&decayed)[S::L]) const {
    const bool shared = *a.scratch.shared_starts;
    for (int turn = 7; turn >= 0; --turn) {
      if (lane.starts && at.c + k < at.channels && (!shared || turn == at.i)) {
#pragma unroll
        for (int i = S::L - 1; i >= 0; --i) {
          if (!(lane.starts >> i & 1)) continue;
          const int id = a.events.before[first_step + i];
          if (id < 0) continue;
          float* const to = a.dinitial_state + state_index(id, k, state);
          *to = shared ? *to + decayed[i] : decayed[i];
        }
      }
      if (!shared) return;
      __syncwarp();
    }
  }
};

}  // namespace mamba
