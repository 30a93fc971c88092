// One state of the scan's backward: what a warp does for every (channel, step, state).
#pragma once

#include "backward.cuh"

namespace mamba {

// What a lane keeps over a tile.
struct BackwardLane {
  float delta[2][8], du[2][8], dy[2][8];   // du is delta * u
  float ddu[2][8], ddelta[2][8], y[2][8];  // sums over the states
  float delta_sum[2];
  unsigned masked, starts, ends;  // a bit per step
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
      "shfl.sync.up.b32 a|p, %0, 8, 0, -1;\n"
      "shfl.sync.down.b32 d, %2, 4, 31, -1;\n"
      "shfl.sync.down.b32 b|q, %1, 8, 31, -1;\n"
      "shfl.sync.up.b32 c, %2, 8, 0, -1;\n"
      "@p fma.rn.f32 %0, %2, a, %0;\n"
      "@q fma.rn.f32 %1, d, b, %1;\n"
      "mul.f32 %2, %2, c;}"
      : "+f"(h), "+f"(g), "+f"(P));
  P = fminf(P, FLT_MAX);
  asm volatile(
      "{.reg .pred p, q; .reg .f32 a, b, d;\n"
      "shfl.sync.up.b32 a|p, %0, 16, 0, -1;\n"
      "shfl.sync.down.b32 d, %2, 12, 31, -1;\n"
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
// j / 2. These are the second operands' four pairs of rows, {k, k + 4} each, of a lane.
__device__ __forceinline__ void write_columns(int lane, float4* to) {
  const auto is = [&](int column) { return lane / 4 == column ? 1.0f : 0.0f; };
  to[lane] = make_float4(is(0), is(1), is(2), is(3));
  to[32 + lane] = make_float4(is(4), is(5), is(6), is(7));
}

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
                                             float low_row, float high_row) {
  const uint32_t low = __float_as_uint(low_row), high = __float_as_uint(high_row);
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

// Sums of one state: terms of dC and dB of the lane's steps, over its channels; the rest per
// channel.
struct StateSums {
  float terms_C[8], terms_B[8];
  float dA[2], dB[2], dC[2], leaving[2];
};

// A lane's work on one state. B and C are those of the lane's steps, or constants.
template <class S, bool kGeneral>
struct StateRun {
  const BackwardArgs& a;
  const BackwardPlace<S>& at;
  BackwardLane& lane;
  const int64_t first_step;  // row * length + the lane's first step

  __device__ __forceinline__ bool exists(int k) const { return at.c + k < at.channels; }
  __device__ __forceinline__ int64_t state_index(int id, int k, int state) const {
    return (id * a.p.channels + at.channel + at.c + k) * a.p.state_dim + state;
  }

  // Channel k. A is in the base of exp2_fast; `entering` enters the tile's first step, `carry` its
  // last.
  template <int k>
  __device__ __forceinline__ void channel(int state, const float (&B)[8], const float (&C)[8],
                                          float A, float entering, float carry,
                                          StateSums& sums) const {
    float decay[8], input[8], grad[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      decay[i] = exp2_fast(lane.delta[k][i] * A);
      input[i] = lane.du[k][i] * B[i];
      grad[i] = lane.dy[k][i] * C[i];
    }
    float P = fminf(exp2_fast(lane.delta_sum[k] * A), FLT_MAX);
    if constexpr (kGeneral) apply_events(k, state, A, decay, input, grad, P);
    // The lane's steps alone, but that the tile's ends take what enters it.
    float h = at.i == 0 ? entering : 0.0f, g = at.i == 7 ? carry : 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      h = fmaf(decay[i], h, input[i]);
      g = decay[7 - i] * (grad[7 - i] + g);
    }
    scan_both(P, h, g);
    sums.leaving[k] = g;
    h = __shfl_up_sync(0xffffffffu, h, 4);
    g = __shfl_down_sync(0xffffffffu, g, 4);
    if (at.i == 0) h = entering;
    if (at.i == 7) g = carry;
    // Once more, from what enters the lane's steps: the states, each as it was before the step,
    float before[8];
    sums.dC[k] = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      before[i] = h;
      h = fmaf(decay[i], h, input[i]);
      const float dy = lane.dy[k][i];
      if (kGeneral && a.p.constant_C) sums.dC[k] = fmaf(h, dy, sums.dC[k]);
      sums.terms_C[i] = k ? fmaf(h, dy, sums.terms_C[i]) : h * dy;
      if (a.p.z.data) lane.y[k][i] = fmaf(C[i], h, lane.y[k][i]);
    }
    // and the adjoints.
    float adjoints[kGeneral ? 8 : 1];
    sums.dA[k] = sums.dB[k] = 0.0f;
#pragma unroll
    for (int i = 7; i >= 0; --i) {
      const float dh = grad[i] + g, du = lane.du[k][i];
      g = decay[i] * dh;
      float through = g * before[i];
      if constexpr (kGeneral) {
        adjoints[i] = dh;
        if (lane.starts >> i & 1) through = dh * decayed_start(k, i, state, A);
        if (a.p.constant_B) sums.dB[k] = fmaf(dh, du, sums.dB[k]);
      }
      sums.terms_B[i] = k ? fmaf(dh, du, sums.terms_B[i]) : dh * du;
      lane.ddu[k][i] = fmaf(dh, B[i], lane.ddu[k][i]);
      lane.ddelta[k][i] = fmaf(A, through, lane.ddelta[k][i]);
      sums.dA[k] = fmaf(lane.delta[k][i], through, sums.dA[k]);
    }
    if constexpr (kGeneral) {
      if (a.scratch.shared_starts) add_starts(k, state, A, adjoints);
      __syncwarp();
    }
  }

  // The decayed initial state that a start at step i takes.
  __device__ __forceinline__ float decayed_start(int k, int i, int state, float A) const {
    const int id = exists(k) ? a.events.before[first_step + i] : -1;
    if (id < 0) return 0.0f;
    return exp2_fast(lane.delta[k][i] * A) * a.p.initial_state[state_index(id, k, state)];
  }

  // Starts inside the lane's steps take their initial state and let nothing pass; the last step of
  // a sequence gets its final state's gradient.
  __device__ __forceinline__ void apply_events(int k, int state, float A, float (&decay)[8],
                                               float (&input)[8], float (&grad)[8],
                                               float& P) const {
    if (lane.starts) {
      P = 0.0f;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (!(lane.starts >> i & 1)) continue;
        input[i] += decayed_start(k, i, state, A);
        decay[i] = 0.0f;
      }
    }
    if (lane.ends && a.dfinal_state && exists(k)) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (!(lane.ends >> i & 1)) continue;
        grad[i] += a.dfinal_state[state_index(a.events.after[first_step + i], k, state)];
      }
    }
    __syncwarp();
  }

  // Hands the adjoints at starts to the initial states. Where starts share one, lane after lane
  // adds.
  __device__ __forceinline__ void add_starts(int k, int state, float A,
                                             const float (&dh)[8]) const {
    const bool shared = *a.scratch.shared_starts;
    for (int turn = 7; turn >= 0; --turn) {
      if (lane.starts && exists(k) && (!shared || turn == at.i)) {
#pragma unroll
        for (int i = 7; i >= 0; --i) {
          if (!(lane.starts >> i & 1)) continue;
          const int id = a.events.before[first_step + i];
          if (id < 0) continue;
          const float passed = exp2_fast(lane.delta[k][i] * A) * dh[i];
          float* const to = a.dinitial_state + state_index(id, k, state);
          *to = shared ? *to + passed : passed;
        }
      }
      if (!shared) return;
      __syncwarp();
    }
  }
};

}  // namespace mamba
