// One state of the scan's backward: what a warp does for every (channel, step, state).
#pragma once

#include "backward.cuh"

namespace mamba {

// What a lane keeps over a tile.
struct BackwardLane {
  float du[16], dy[16];              // du is delta * u; delta itself lies in shared memory
  float ddu[16], ddelta[16], y[16];  // sums over the states
  float delta_sum;
  unsigned masked, starts, ends;  // a bit per step
};

// Over the four lanes of a channel, which lie 8 apart, lane i mapping x to P x + h forward and to
// P x + g backward in time: h becomes what the lanes before hand to the lane, g what those after
// hand to it; the first lane's h and the last one's g are undefined. `sum` becomes the sum over the
// lanes. Every lane takes from all the others at once, so that one latency is waited for.
__device__ __forceinline__ void join_lanes(float P, float& h, float& g, float& sum) {
  asm volatile(
      "{.reg .pred p, q, r, s; .reg .f32 a, b, c, d, e, f, u, v, w, x, y, z;\n"
      "shfl.sync.up.b32 a|p, %0, 24, 0, -1;\n"
      "shfl.sync.up.b32 b|q, %0, 16, 0, -1;\n"
      "shfl.sync.up.b32 u, %3, 16, 0, -1;\n"
      "shfl.sync.down.b32 d|r, %1, 24, 31, -1;\n"
      "shfl.sync.down.b32 e|s, %1, 16, 31, -1;\n"
      "shfl.sync.down.b32 w, %3, 16, 31, -1;\n"
      "shfl.sync.up.b32 v, %3, 8, 0, -1;\n"
      "shfl.sync.up.b32 c, %0, 8, 0, -1;\n"
      "shfl.sync.down.b32 x, %3, 8, 31, -1;\n"
      "shfl.sync.down.b32 f, %1, 8, 31, -1;\n"
      "shfl.sync.bfly.b32 y, %2, 8, 31, -1;\n"
      "@p fma.rn.f32 b, u, a, b;\n"
      "@r fma.rn.f32 e, w, d, e;\n"
      "add.f32 y, %2, y;\n"
      "shfl.sync.bfly.b32 z, y, 16, 31, -1;\n"
      "@q fma.rn.f32 c, v, b, c;\n"
      "@s fma.rn.f32 f, x, e, f;\n"
      "mov.f32 %0, c;\n"
      "mov.f32 %1, f;\n"
      "add.f32 %2, y, z;}"
      : "+f"(h), "+f"(g), "+f"(sum)
      : "f"(P));
}

// Four steps of B or C. Volatile where they are to be read again rather than kept.
__device__ __forceinline__ void read_four(float (&v)[4], const float* from) {
  asm volatile("ld.volatile.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3])
               : "r"(shared_address(from)));
}

// In one instruction, which the compiler does not find by itself.
__device__ __forceinline__ void write_four(float* to, const float4& v) {
  asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
               "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
               : "memory");
}

// Sums over four neighbouring lanes on the tensor cores: an m16n8k8 product of four steps of every
// lane with the first two columns of ones, rows 0 to 3 in one and 4 to 7 in the other. The first of
// the four lanes gets the sums of the four steps. These are the second operand's rows k and k + 4
// of column n, of lane 4 n + k.
struct Columns {
  static constexpr uint32_t kOne = 0x3f800000;  // 1 in fp32
  uint32_t low, high;
  __device__ __forceinline__ explicit Columns(int lane)
      : low(lane / 4 == 0 ? kOne : 0), high(lane / 4 == 1 ? kOne : 0) {}
};

__device__ __forceinline__ void multiply_tf32(float (&d)[4], const uint32_t (&v)[4],
                                              const Columns& columns) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]), "r"(columns.low), "r"(columns.high));
}

// Of the products x y. The tensor cores cut them off after 11 bits, which is enough for 16-bit
// results; kExact adds the next 11, what an fma finds beyond them. The first part is rounded, so
// that what is cut off in the end has either sign: it would add up over channels.
template <bool kExact>
__device__ __forceinline__ float4 sum_channels(const float (&x)[4], const float (&y)[4],
                                               const Columns& columns) {
  constexpr int kStep[4] = {0, 2, 1, 3};  // of an operand's rows
  float d[4] = {};
  uint32_t bits[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) bits[k] = __float_as_uint(x[kStep[k]] * y[kStep[k]]);
  if constexpr (kExact) {
    uint32_t rest[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      bits[k] = (bits[k] + 0x1000u) & 0xffffe000u;
      rest[k] = __float_as_uint(fmaf(x[kStep[k]], y[kStep[k]], -__uint_as_float(bits[k])));
    }
    multiply_tf32(d, rest, columns);
  }
  multiply_tf32(d, bits, columns);
  return make_float4(d[0], d[1], d[2], d[3]);
}

// Where a warp's sums of a state go: of C or B and of the q-th four steps of each lane, eight at
// once, first those of the even four lanes. Odd q lie half a row of banks apart, so that what is
// read at once is spread as well as what is written at once.
struct SumsPlace {
  char* to;
  bool writes;
  __host__ __device__ static constexpr int at(int which, int q) {
    return 16 * which + 8 * (q / 2) + 36 * (q % 2);
  }
  __device__ __forceinline__ static int of_lane(int warp, int lane) {
    return (warp * kSumsPitch + lane / 8 + lane / 4 % 2 * 4) * 16;
  }
  __device__ __forceinline__ void write(int which, int q, const float4& v) const {
    if (writes) reinterpret_cast<float4*>(to)[at(which, q)] = v;
  }
};

// B and C of four steps.
struct Group {
  float B[4], C[4];
};

// Adds what lanes hold over the lanes of their channel; every lane gets the sum.
__device__ __forceinline__ float sum_steps(float v) {
  v += __shfl_xor_sync(0xffffffffu, v, 8);
  return v + __shfl_xor_sync(0xffffffffu, v, 16);
}

// The lane's own sums of one state.
struct StateSums {
  float dB, dC;
};

// A state over the lane's steps: what a step keeps of it and puts in (later: what it was before the
// step), and what all of them keep. A is in the base of fast_exp2.
template <class S>
struct StateSteps {
  float decay[S::L], input[S::L], A, P;
};

// A lane's work on one state.
template <class S, bool kGeneral>
struct StateRun {
  const BackwardArgs& a;
  const BackwardPlace<S>& at;
  BackwardLane& lane;
  const int64_t first_step;  // row * length + the lane's first step
  const float* deltas;
  const Columns columns;

  __device__ __forceinline__ bool exists() const { return at.c() < at.channels; }
  __device__ __forceinline__ int64_t state_index(int id, int state) const {
    return (id * a.p.channels + at.channel + at.c()) * a.p.state_dim + state;
  }

  // Four of the lane's deltas, or one.
  __device__ __forceinline__ void read_deltas(int q, float (&v)[4]) const {
    read_four(v, deltas + (q * S::kThreads + at.thread()) * 4);
  }
  __device__ __forceinline__ float delta(int i) const {
    return deltas[(i / 4 * S::kThreads + at.thread()) * 4 + i % 4];
  }
  __device__ __forceinline__ void read_decays(float (&decay)[S::L], float A) const {
#pragma unroll
    for (int q = 0; q < S::L / 4; ++q) {
      float v[4];
      read_deltas(q, v);
#pragma unroll
      for (int k = 0; k < 4; ++k) decay[4 * q + k] = decay_of(v[k], A);
    }
  }

  // What follows from B alone, and from A where no state before has done it. `rows(which, q, v)`
  // reads the q-th four steps of B (0) or C (1).
  __device__ __forceinline__ void begin(StateSteps<S>& s, float A) const {
    read_decays(s.decay, A);
    s.A = A, s.P = decay_of(lane.delta_sum, A);
  }
  template <class Rows>
  __device__ __forceinline__ void read_inputs(StateSteps<S>& s, Rows&& rows) const {
#pragma unroll
    for (int q = 0; q < S::L / 4; ++q) {
      float B[4];
      rows(0, q, B);
#pragma unroll
      for (int k = 0; k < 4; ++k) s.input[4 * q + k] = lane.du[4 * q + k] * B[k];
    }
  }

  // What enters the lane's steps: the state (h) and the adjoint (g), from `entering` at the tile's
  // first step and `carry` at its last. Returns the adjoint that leaves the tile. The sum over
  // lanes of the state before goes the same way (dA).
  template <class Rows>
  __device__ __forceinline__ float enter(int state, StateSteps<S>& s, Rows&& rows,
                                         float (&grad)[kGeneral ? S::L : 1], float entering,
                                         float carry, float& h, float& g, float& dA) const {
    constexpr int L = S::L;
    float C[4];
    s.P = fminf(s.P, FLT_MAX);
    if constexpr (kGeneral) {
#pragma unroll
      for (int q = 0; q < L / 4; ++q) {
        rows(1, q, C);
#pragma unroll
        for (int i = 0; i < 4; ++i) grad[4 * q + i] = lane.dy[4 * q + i] * C[i];
      }
      apply_events(state, s, grad);
    }
    // The lane's steps alone, but that the tile's ends take what enters it.
    h = at.i() == 0 ? entering : 0.0f, g = at.i() == S::kLanes - 1 ? carry : 0.0f;
#pragma unroll
    for (int i = 0; i < L; ++i) h = fmaf(s.decay[i], h, s.input[i]);
#pragma unroll
    for (int q = L / 4 - 1; q >= 0; --q) {
      if constexpr (!kGeneral) rows(1, q, C);
#pragma unroll
      for (int k = 3; k >= 0; --k) {
        const int i = 4 * q + k;
        const float of_y = kGeneral ? grad[kGeneral ? i : 0] : lane.dy[i] * C[k];
        g = i == L - 1 ? of_y + g : fmaf(s.decay[i + 1 < L ? i + 1 : 0], g, of_y);
      }
    }
    g *= s.decay[0];
    const float own = g;
    join_lanes(s.P, h, g, dA);
    const float leaving = fmaf(s.P, g, own);  // of the first lane
    if (at.i() == 0) h = entering;
    if (at.i() == S::kLanes - 1) g = carry;
    return leaving;
  }

  // The states from what enters the lane's steps (h, which becomes what leaves them); of each step,
  // the state before it is kept.
  template <bool kExact>
  __device__ __forceinline__ float4 run_states(StateSteps<S>& s, float& h, StateSums& sums,
                                               const SumsPlace& place) const {
    sums.dC = 0.0f;
    float4 done;
#pragma unroll
    for (int q = 0; q < S::L / 4; ++q) {
      float states[4], dy[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int i = 4 * q + k;
        const float before = h;
        h = fmaf(s.decay[i], h, s.input[i]);
        s.input[i] = before;
        states[k] = h, dy[k] = lane.dy[i];
        if (kGeneral && a.p.constant_C) sums.dC = fmaf(h, dy[k], sums.dC);
      }
      const float4 sum = sum_channels<kExact>(states, dy, columns);
      if (q > 0) place.write(0, q - 1, done);
      done = sum;
    }
    return done;
  }

  // The adjoints, and all that follows from them and from the state after each step. Where a decay
  // has served, the next state's takes its place (`A_next`).
  template <bool kExact, class Rows>
  __device__ __forceinline__ void run_adjoints(int state, StateSteps<S>& s, Rows&& rows,
                                               const float (&grad)[kGeneral ? S::L : 1], float h,
                                               float g, float A_next, StateSums& sums, float& dA,
                                               const SumsPlace& place, float4 done) const {
    constexpr int kQuads = S::L / 4;
    Group now;
    rows(0, kQuads - 1, now.B), rows(1, kQuads - 1, now.C);
    float adjoints[kGeneral ? S::L : 1], parts[2] = {};
    sums.dB = 0.0f;
#pragma unroll
    for (int q = kQuads - 1; q >= 0; --q) {
      Group next = now;
      float delta[4];
      read_deltas(q, delta);
      if (q > 0) {
        rows(0, q - 1, next.B), rows(1, q - 1, next.C);
      }
      float adjoint[4], du_of[4];
#pragma unroll
      for (int k = 3; k >= 0; --k) {
        const int i = 4 * q + k;
        const float du = lane.du[i];
        const float dh = kGeneral ? grad[kGeneral ? i : 0] + g : fmaf(lane.dy[i], now.C[k], g);
        g = s.decay[i] * dh;
        s.decay[i] = decay_of(delta[k], A_next);
        float through = g * s.input[i];
        if constexpr (kGeneral) {
          adjoints[i] = dh;
          if (lane.starts >> i & 1) through = dh * decayed_start(i, state, s.A);
          if (a.p.constant_B) sums.dB = fmaf(dh, du, sums.dB);
        }
        adjoint[k] = dh, du_of[k] = du;
        lane.y[i] = fmaf(now.C[k], i + 1 < S::L ? s.input[i + 1 < S::L ? i + 1 : 0] : h, lane.y[i]);
        lane.ddu[i] = fmaf(dh, now.B[k], lane.ddu[i]);
        lane.ddelta[i] = fmaf(s.A, through, lane.ddelta[i]);
        parts[k % 2] = fmaf(delta[k], through, parts[k % 2]);
      }
      const float4 sum = sum_channels<kExact>(adjoint, du_of, columns);
      if (q + 1 < kQuads) {
        place.write(1, q + 1, done);
      } else {
        place.write(0, q, done);
      }
      done = sum;
      now = next;
    }
    dA = parts[0] + parts[1];
    place.write(1, 0, done);
    if constexpr (kGeneral) {
      if (a.scratch.shared_starts) add_starts(state, s.A, adjoints);
      __syncwarp();
    }
    s.A = A_next, s.P = decay_of(lane.delta_sum, A_next);
  }

  // The decayed initial state that a start at step i takes.
  __device__ __forceinline__ float decayed_start(int i, int state, float A) const {
    const int id = exists() ? a.events.before[first_step + i] : -1;
    if (id < 0) return 0.0f;
    return decay_of(delta(i), A) * a.p.initial_state[state_index(id, state)];
  }

  // Starts inside the lane's steps take their initial state and let nothing pass; the last step of
  // a sequence gets its final state's gradient.
  __device__ __forceinline__ void apply_events(int state, StateSteps<S>& s,
                                               float (&grad)[S::L]) const {
    if (lane.starts) {
      s.P = 0.0f;
#pragma unroll
      for (int i = 0; i < S::L; ++i) {
        if (!(lane.starts >> i & 1)) continue;
        s.input[i] += decayed_start(i, state, s.A);
        s.decay[i] = 0.0f;
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
          const float passed = decay_of(delta(i), A) * dh[i];
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
