// One state of the scan's backward: what a warp does for every (channel, step, state).
#pragma once

#include "backward.cuh"

namespace mamba {

// What a lane keeps over a tile.
struct BackwardLane {
  float delta[16], du[16], dy[16];   // du is delta * u
  float ddu[16], ddelta[16], y[16];  // sums over the states
  float delta_sum;
  unsigned masked, starts, ends;  // a bit per step
};

// The inclusive scans of the affine maps x -> P x + h forward and x -> P x + g backward in time
// over the four lanes of a channel, which lie 8 apart. Both need the same products of P: the
// backward one takes them from the next lane. Growing products stay finite, so that 0 stays 0.
__device__ __forceinline__ void scan_both(float P, float& h, float& g) {
  asm volatile(
      "{.reg .pred p, q; .reg .f32 a, b, c;\n"
      "shfl.sync.up.b32 a|p, %0, 8, 0, -1;\n"
      "shfl.sync.down.b32 b|q, %1, 8, 31, -1;\n"
      "shfl.sync.up.b32 c, %2, 8, 0, -1;\n"
      "@p fma.rn.f32 %0, %2, a, %0;\n"
      "@q fma.rn.f32 %1, %2, b, %1;\n"
      "mul.f32 %2, %2, c;}"
      : "+f"(h), "+f"(g), "+f"(P));
  P = fminf(P, FLT_MAX);
  asm volatile(
      "{.reg .pred p, q; .reg .f32 a, b, d;\n"
      "shfl.sync.up.b32 a|p, %0, 16, 0, -1;\n"
      "shfl.sync.down.b32 d, %2, 8, 31, -1;\n"
      "shfl.sync.down.b32 b|q, %1, 16, 31, -1;\n"
      "@p fma.rn.f32 %0, %2, a, %0;\n"
      "@q fma.rn.f32 %1, d, b, %1;}"
      : "+f"(h), "+f"(g)
      : "f"(P));
}

// Four steps of B or C. Volatile where they are to be read again rather than kept.
__device__ __forceinline__ void read_four(float (&v)[4], const float* from) {
  asm volatile("ld.volatile.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3])
               : "r"(shared_address(from)));
}

__device__ __forceinline__ void read_two(float& first, float& second, const char* from) {
  asm volatile("ld.volatile.shared.v2.f32 {%0, %1}, [%2];"
               : "=f"(first), "=f"(second)
               : "r"(shared_address(from)));
}

// In one instruction, which the compiler does not find by itself.
__device__ __forceinline__ void write_four(float* to, const float4& v) {
  asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
               "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
               : "memory");
}

// Sums over four neighbouring lanes on the tensor cores. The first operand of an m16n8k8 product is
// four steps of every lane, the second says to which columns they go: lane 4 n + k holds its rows k
// and k + 4 of column n. After four products, lane 4 r + j has the sums of the r-th four lanes'
// steps 4 j + {0, 1, 2, 3}. These are the second operands' four pairs of rows, {k, k + 4} each, of
// a lane.
__device__ __forceinline__ void write_columns(int lane, float2* to) {
  const auto is = [&](int column) { return lane / 4 == column ? 1.0f : 0.0f; };
  for (int q = 0; q < 4; ++q) to[32 * q + lane] = make_float2(is(2 * q), is(2 * q + 1));
}

__device__ __forceinline__ void multiply_tf32(float (&d)[4], const uint32_t (&v)[4], uint32_t low,
                                              uint32_t high) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]), "r"(low), "r"(high));
}

// Terms have 11 bits, which is enough for 16-bit results; kExact adds the next 11. The product cuts
// off what is beyond them. The first part is rounded, so that what is cut off has either sign.
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
      bits[k] = (bits[k] + 0x1000u) & 0xffffe000u;
      rest[k] = __float_as_uint(v[k] - __uint_as_float(bits[k]));
    }
    multiply_tf32(d, rest, low, high);
  }
  multiply_tf32(d, bits, low, high);
}

// Adds what lanes hold over the lanes of their channel; every lane gets the sum.
__device__ __forceinline__ float sum_steps(float v) {
  v += __shfl_xor_sync(0xffffffffu, v, 8);
  return v + __shfl_xor_sync(0xffffffffu, v, 16);
}

// Sums of one state: dC and dB over four lanes' channels, as write_columns says; the rest is the
// lane's own.
struct StateSums {
  float C[4], B[4];
  float dA, dB, dC, leaving;
};

// A lane's work on one state.
template <class S, bool kGeneral>
struct StateRun {
  const BackwardArgs& a;
  const BackwardPlace<S>& at;
  BackwardLane& lane;
  const int64_t first_step;  // row * length + the lane's first step
  const char* columns;

  __device__ __forceinline__ bool exists() const { return at.c() < at.channels; }
  __device__ __forceinline__ int64_t state_index(int id, int state) const {
    return (id * a.p.channels + at.channel + at.c()) * a.p.state_dim + state;
  }

  // A is in the base of exp2_fast; `entering` enters the tile's first step, `carry` its last.
  // `rows(which, q, v)` reads the q-th four steps of B (0) or C (1).
  template <bool kExact, class Rows>
  __device__ __forceinline__ void run(int state, Rows&& rows, float A, float entering, float carry,
                                      StateSums& sums) const {
    constexpr int L = S::L;
    float decay[L], input[L], grad[kGeneral ? L : 1];
#pragma unroll
    for (int i = 0; i < L; ++i) decay[i] = exp2_fast(lane.delta[i] * A);
    float P = fminf(exp2_fast(lane.delta_sum * A), FLT_MAX);
#pragma unroll
    for (int q = 0; q < L / 4; ++q) {
      float B[4];
      rows(0, q, B);
#pragma unroll
      for (int i = 0; i < 4; ++i) input[4 * q + i] = lane.du[4 * q + i] * B[i];
    }
    if constexpr (kGeneral) {
#pragma unroll
      for (int q = 0; q < L / 4; ++q) {
        float C[4];
        rows(1, q, C);
#pragma unroll
        for (int i = 0; i < 4; ++i) grad[4 * q + i] = lane.dy[4 * q + i] * C[i];
      }
      apply_events(state, A, decay, input, grad, P);
    }
    // The lane's steps alone, but that the tile's ends take what enters it.
    float h = at.i() == 0 ? entering : 0.0f, g = at.i() == S::kLanes - 1 ? carry : 0.0f;
#pragma unroll
    for (int i = 0; i < L; ++i) h = fmaf(decay[i], h, input[i]);
    float C[4];  // where a pass ends, the next begins
#pragma unroll
    for (int q = L / 4 - 1; q >= 0; --q) {
      if constexpr (!kGeneral) rows(1, q, C);
#pragma unroll
      for (int k = 3; k >= 0; --k) {
        const int i = 4 * q + k;
        const float of_y = kGeneral ? grad[kGeneral ? i : 0] : lane.dy[i] * C[k];
        g = i == L - 1 ? of_y + g : fmaf(decay[i + 1 < L ? i + 1 : 0], g, of_y);
      }
    }
    g *= decay[0];
    scan_both(P, h, g);
    sums.leaving = g;
    h = __shfl_up_sync(0xffffffffu, h, 8);
    g = __shfl_down_sync(0xffffffffu, g, 8);
    if (at.i() == 0) h = entering;
    if (at.i() == S::kLanes - 1) g = carry;
    // Once more, from what enters the lane's steps: the states, each as it was before the step,
    float before[L];
    sums.dC = 0.0f;
    clear(sums.C);
#pragma unroll
    for (int q = 0; q < L / 4; ++q) {
      float terms[4];
      if (kGeneral || q > 0) rows(1, q, C);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int i = 4 * q + k;
        before[i] = h;
        h = fmaf(decay[i], h, input[i]);
        const float dy = lane.dy[i];
        if (kGeneral && a.p.constant_C) sums.dC = fmaf(h, dy, sums.dC);
        terms[k] = h * dy;
        if (a.p.z.data) lane.y[i] = fmaf(C[k], h, lane.y[i]);
      }
      float low, high;
      read_two(low, high, columns + (32 * q + at.lane()) * 8);
      add_channels<kExact>(sums.C, terms[0], terms[1], terms[2], terms[3], low, high);
    }
    // and the adjoints.
    float adjoints[kGeneral ? L : 1];
    sums.dA = sums.dB = 0.0f;
    clear(sums.B);
#pragma unroll
    for (int q = L / 4 - 1; q >= 0; --q) {
      float B[4], terms[4];
      rows(0, q, B);
      if (!kGeneral && q < L / 4 - 1) rows(1, q, C);
#pragma unroll
      for (int k = 3; k >= 0; --k) {
        const int i = 4 * q + k;
        const float du = lane.du[i];
        const float dh = kGeneral ? grad[kGeneral ? i : 0] + g : fmaf(lane.dy[i], C[k], g);
        g = decay[i] * dh;
        float through = g * before[i];
        if constexpr (kGeneral) {
          adjoints[i] = dh;
          if (lane.starts >> i & 1) through = dh * decayed_start(i, state, A);
          if (a.p.constant_B) sums.dB = fmaf(dh, du, sums.dB);
        }
        terms[k] = dh * du;
        lane.ddu[i] = fmaf(dh, B[k], lane.ddu[i]);
        lane.ddelta[i] = fmaf(A, through, lane.ddelta[i]);
        sums.dA = fmaf(lane.delta[i], through, sums.dA);
      }
      float low, high;
      read_two(low, high, columns + (32 * q + at.lane()) * 8);
      add_channels<kExact>(sums.B, terms[0], terms[1], terms[2], terms[3], low, high);
    }
    if constexpr (kGeneral) {
      if (a.scratch.shared_starts) add_starts(state, A, adjoints);
      __syncwarp();
    }
  }

  __device__ __forceinline__ static void clear(float (&v)[4]) { v[0] = v[1] = v[2] = v[3] = 0.0f; }

  // The decayed initial state that a start at step i takes.
  __device__ __forceinline__ float decayed_start(int i, int state, float A) const {
    const int id = exists() ? a.events.before[first_step + i] : -1;
    if (id < 0) return 0.0f;
    return exp2_fast(lane.delta[i] * A) * a.p.initial_state[state_index(id, state)];
  }

  // Starts inside the lane's steps take their initial state and let nothing pass; the last step of
  // a sequence gets its final state's gradient.
  __device__ __forceinline__ void apply_events(int state, float A, float (&decay)[S::L],
                                               float (&input)[S::L], float (&grad)[S::L],
                                               float& P) const {
    if (lane.starts) {
      P = 0.0f;
#pragma unroll
      for (int i = 0; i < S::L; ++i) {
        if (!(lane.starts >> i & 1)) continue;
        input[i] += decayed_start(i, state, A);
        decay[i] = 0.0f;
      }
    }
    if (lane.ends && a.dfinal_state && exists()) {
#pragma unroll
      for (int i = 0; i < S::L; ++i) {
        if (!(lane.ends >> i & 1)) continue;
        grad[i] += a.dfinal_state[state_index(a.events.after[first_step + i], state)];
      }
    }
    __syncwarp();
  }

  // Hands the adjoints at starts to the initial states. Where starts share one, lane after lane
  // adds.
  __device__ __forceinline__ void add_starts(int state, float A, const float (&dh)[S::L]) const {
    const bool shared = *a.scratch.shared_starts;
    for (int turn = S::kLanes - 1; turn >= 0; --turn) {
      if (lane.starts && exists() && (!shared || turn == at.i())) {
#pragma unroll
        for (int i = S::L - 1; i >= 0; --i) {
          if (!(lane.starts >> i & 1)) continue;
          const int id = a.events.before[first_step + i];
          if (id < 0) continue;
          const float passed = exp2_fast(lane.delta[i] * A) * dh[i];
          float* const to = a.dinitial_state + state_index(id, state);
          *to = shared ? *to + passed : passed;
        }
      }
      if (!shared) return;
      __syncwarp();
    }
  }
};

}  // namespace mamba
