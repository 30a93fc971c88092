// The backward of the selective scan, parallel over time inside a warp and walking tiles of 64 steps
// from the last to the first. The states of a tile are computed again from the state that enters
// it, which the forward kept; then the adjoint runs the other way. Sums over states stay in
// registers; sums over channels (dB, dC) go through tensor cores within a warp, shared memory
// within a block and partial sums in global memory, always in the same order.
#include "backward.cuh"

#include <algorithm>
#include <type_traits>

namespace mamba {
namespace {

template <class S>
struct Backward {
  using Tile = BackwardTile<S::kChannels>;
  using StateTile = BackwardTile<S::kStates>;
  // fp32 B and C: [state][lane of a channel][L + 4], so that lanes read different banks.
  static constexpr int kLanePitch = S::L + 4, kStatePitch = 8 * kLanePitch;
  static constexpr int kEnterPitch = S::kStates + 4;

  // Byte offsets in shared memory.
  struct Memory {
    int u, delta, dout, z, stage, B_raw, C_raw, B, C, entering, sums, A, carry, dA, dB, dC, total;
    __host__ __device__ explicit Memory(const BackwardArgs& a) {
      int at = 0;
      const auto take = [&](int bytes) {
        const int here = at;
        at += (bytes + 15) / 16 * 16;
        return here;
      };
      const int per_state = static_cast<int>(a.p.state_dim) * S::kChannels * 4;
      u = take(Tile::bytes(a.u.element_size()));
      delta = take(Tile::bytes(a.delta.element_size()));
      dout = take(Tile::bytes(a.dout.element_size()));
      z = take(a.p.z.data ? Tile::bytes(a.z.element_size()) : 0);
      stage = at;  // the second stage lies behind the first
      take((a.plan.stages - 1) * stage);
      B_raw = take(a.p.constant_B ? 0 : StateTile::bytes(a.B.element_size()));
      C_raw = take(a.p.constant_C ? 0 : StateTile::bytes(a.C.element_size()));
      B = take(S::kStates * kStatePitch * 4);
      C = take(S::kStates * kStatePitch * 4);
      entering = take(2 * S::kChannels * kEnterPitch * 4);
      sums = take(2 * S::kBatch * S::kWarps * 512);
      A = take(per_state), carry = take(per_state), dA = take(per_state);
      dB = take(a.p.constant_B ? per_state : 0);
      dC = take(a.p.constant_C ? per_state : 0);
      total = at;
    }
  };
};

// Adds the values of a warp's lanes over the channels, v[4 h + e] at column 2 h2 + ..: the first
// operand of an m16n8k8 product is four steps of each lane, the second says which column they go to.
// Lane 4 i + j ends with steps 8 i + 4 (j % 2) + {0..3} of quantity j / 2.
struct ChannelSum {
  float total[4] = {};

  static __device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&v)[4],
                                                  uint32_t low, uint32_t high) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]), "r"(low), "r"(high));
  }

  // kExact: in two parts of 11 bits each.
  template <bool kExact>
  __device__ __forceinline__ void add(float a, float b, float c, float d, uint32_t low,
                                      uint32_t high) {
    const float v[4] = {a, c, b, d};
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
      multiply(total, rest, low, high);
    }
    multiply(total, bits, low, high);
  }
};

// The second operands: lane 4 n + k holds row k and k + 4 of column n.
struct Columns {
  uint32_t low[4], high[4];
  __device__ explicit Columns(int lane) {
#pragma unroll
    for (int p = 0; p < 4; ++p) {
      low[p] = lane / 4 == 2 * p ? __float_as_uint(1.0f) : 0u;
      high[p] = lane / 4 == 2 * p + 1 ? __float_as_uint(1.0f) : 0u;
    }
  }
};

// The lane's gradients over a tile.
template <class S>
struct LaneSums {
  float ddu[S::C][S::L], ddelta[S::C][S::L], y[S::C][S::L];
};

// delta, delta * u and dy of the lane's steps; steps that do not exist or are padding get 0, which
// leaves states as they are and adds nothing to any sum.
template <class S, bool kGeneral>
__device__ __forceinline__ void prepare(BackwardLane<S>& lane, const BackwardArgs& a,
                                        const BackwardPlace<S>& at, const char* stage,
                                        const typename Backward<S>::Memory& m,
                                        const float (&bias)[S::C], int64_t t0) {
  using Tile = typename Backward<S>::Tile;
  const int t = at.i * S::L, exist = clamp_int(a.p.length - t0 - t, 0, S::L);
  float u[S::C][S::L];
  read_steps<Tile, S::C, S::L>(lane.delta, stage + m.delta, a.delta.order, a.delta.dtype, at.c, t);
  read_steps<Tile, S::C, S::L>(u, stage + m.u, a.u.order, a.u.dtype, at.c, t);
  read_steps<Tile, S::C, S::L>(lane.dy, stage + m.dout, a.dout.order, a.dout.dtype, at.c, t);
  if (a.p.z.data) {
    float z[S::C][S::L];
    read_steps<Tile, S::C, S::L>(z, stage + m.z, a.z.order, a.z.dtype, at.c, t);
#pragma unroll
    for (int k = 0; k < S::C; ++k) {
#pragma unroll
      for (int i = 0; i < S::L; ++i) lane.dy[k][i] *= z[k][i] * sigmoid(z[k][i]);
    }
  }
#pragma unroll
  for (int k = 0; k < S::C; ++k) {
#pragma unroll
    for (int i = 0; i < S::L; ++i) {
      const float delta = lane.delta[k][i] + bias[k];
      lane.delta[k][i] = a.p.delta_softplus ? softplus(delta) : delta;
      lane.du[k][i] = lane.delta[k][i] * u[k][i];
    }
  }
  lane.masked = exist < S::L ? ~0u << exist : 0u;
  if constexpr (kGeneral) {
    lane.starts = lane.ends = 0;
    if (a.events.before) {
      const int64_t first = at.row * a.p.length + t0 + t;
      for (int i = 0; i < exist; ++i) {
        const int before = a.events.before[first + i];
        if (before == CudaScanEvents::kPadding) lane.masked |= 1u << i;
        if (before >= 0 || before == CudaScanEvents::kFreshStart) lane.starts |= 1u << i;
        if (a.events.after[first + i] >= 0) lane.ends |= 1u << i;
      }
    }
  }
#pragma unroll
  for (int k = 0; k < S::C; ++k) {
    const unsigned nothing = at.c + k < at.channels ? lane.masked : ~0u;
    if (nothing) {
#pragma unroll
      for (int i = 0; i < S::L; ++i) {
        if (nothing >> i & 1) lane.delta[k][i] = lane.du[k][i] = lane.dy[k][i] = 0.0f;
      }
    }
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < S::L; ++i) sum += lane.delta[k][i];
    lane.delta_sum[k] = sum;
  }
}

// Adds what a lane holds over the lanes of its channels; every lane gets the sum.
__device__ __forceinline__ float sum_steps(float v) {
  v += __shfl_xor_sync(0xffffffffu, v, 4);
  v += __shfl_xor_sync(0xffffffffu, v, 8);
  return v + __shfl_xor_sync(0xffffffffu, v, 16);
}

// One state of one of the lane's channels over the lane's steps.
template <class S, bool kGeneral, bool kExact>
struct StateRun {
  const BackwardArgs& a;
  const BackwardPlace<S>& at;
  const BackwardLane<S>& lane;
  LaneSums<S>& sums;
  const Columns& columns;
  const int64_t first_step;  // row * length + the lane's first step

  __device__ __forceinline__ int64_t state_index(int k, int state) const {
    return (at.channel + at.c + k) * a.p.state_dim + state;
  }

  // Returns the adjoint that leaves the lane's first step, for the first lane, and adds to dA, and
  // to the sums of constant B and C.
  template <int k>
  __device__ __forceinline__ float run(int state, const float (&B)[S::L], const float (&C)[S::L],
                                       float A, float entering, float carry, ChannelSum& total,
                                       float& dA, float& dB, float& dC) const {
    const float(&delta)[S::L] = lane.delta[k];
    const float(&du)[S::L] = lane.du[k];
    const float(&dy)[S::L] = lane.dy[k];
    float decay[S::L], input[S::L], grad[S::L];
#pragma unroll
    for (int i = 0; i < S::L; ++i) {
      decay[i] = exp2_fast(delta[i] * A);
      input[i] = du[i] * B[i];
      grad[i] = C[i] * dy[i];
    }
    float P = fminf(exp2_fast(lane.delta_sum[k] * A), FLT_MAX);
    if constexpr (kGeneral) {
      const bool exists = at.c + k < at.channels;
      const int64_t size = a.p.channels * a.p.state_dim;
      if (lane.starts) {
        P = 0.0f;
#pragma unroll
        for (int i = 0; i < S::L; ++i) {
          if (!(lane.starts >> i & 1)) continue;
          const int id = a.events.before[first_step + i];
          if (id >= 0 && exists) {
            input[i] = fmaf(decay[i], a.p.initial_state[id * size + state_index(k, state)],
                            input[i]);
          }
          decay[i] = 0.0f;
        }
      }
      if (lane.ends && a.dfinal_state && exists) {
#pragma unroll
        for (int i = 0; i < S::L; ++i) {
          if (!(lane.ends >> i & 1)) continue;
          const int id = a.events.after[first_step + i];
          grad[i] += a.dfinal_state[id * size + state_index(k, state)];
        }
      }
      __syncwarp();
    }
    // Both recurrences over the lane's steps alone, but that the ends take what enters the tile.
    float h = at.i == 0 ? entering : 0.0f, g = at.i == 7 ? carry : 0.0f;
#pragma unroll
    for (int i = 0; i < S::L; ++i) h = fmaf(decay[i], h, input[i]);
#pragma unroll
    for (int i = S::L - 1; i >= 0; --i) g = decay[i] * (grad[i] + g);
    h = scan_steps<true>(P, h);
    g = scan_steps<false>(P, g);
    const float leaving = g;
    h = __shfl_up_sync(0xffffffffu, h, 4);
    g = __shfl_down_sync(0xffffffffu, g, 4);
    if (at.i == 0) h = entering;
    if (at.i == 7) g = carry;
    // The states again, each step's as it was before.
    float before[S::L];
    {
      float terms[S::L];
#pragma unroll
      for (int i = 0; i < S::L; ++i) {
        before[i] = h;
        h = fmaf(decay[i], h, input[i]);
        terms[i] = h * dy[i];
        if (a.p.z.data) sums.y[k][i] = fmaf(C[i], h, sums.y[k][i]);
      }
      if (kGeneral && a.p.constant_C) {
#pragma unroll
        for (int i = 0; i < S::L; ++i) dC += terms[i];
      } else {
        total.add<kExact>(terms[0], terms[1], terms[2], terms[3], columns.low[0], columns.high[0]);
        total.add<kExact>(terms[4], terms[5], terms[6], terms[7], columns.low[1], columns.high[1]);
      }
    }
    // The adjoint; grad becomes the terms of dB.
#pragma unroll
    for (int i = S::L - 1; i >= 0; --i) {
      const float dh = grad[i] + g;
      g = decay[i] * dh;
      grad[i] = dh * du[i];
      sums.ddu[k][i] = fmaf(dh, B[i], sums.ddu[k][i]);
      float through = g * before[i];
      if constexpr (kGeneral) {
        if (lane.starts >> i & 1) through = at_start(k, i, state, A, dh, input[i]);
      }
      sums.ddelta[k][i] = fmaf(A, through, sums.ddelta[k][i]);
      dA = fmaf(delta[i], through, dA);
    }
    if constexpr (kGeneral) {
      if (a.scratch.shared_starts) add_starts(k, state, input);
      __syncwarp();
    }
    if (kGeneral && a.p.constant_B) {
#pragma unroll
      for (int i = 0; i < S::L; ++i) dB += grad[i];
    } else {
      total.add<kExact>(grad[0], grad[1], grad[2], grad[3], columns.low[2], columns.high[2]);
      total.add<kExact>(grad[4], grad[5], grad[6], grad[7], columns.low[3], columns.high[3]);
    }
    return leaving;
  }

  // What passes to the initial state that step i took, through the step's own decay.
  __device__ __forceinline__ float at_start(int k, int i, int state, float A, float dh,
                                            float& decayed) const {
    const int id = a.events.before[first_step + i];
    decayed = 0.0f;
    if (id < 0 || at.c + k >= at.channels) return 0.0f;
    decayed = exp2_fast(lane.delta[k][i] * A) * dh;
    return decayed * a.p.initial_state[id * a.p.channels * a.p.state_dim + state_index(k, state)];
  }

  // Hands the lane's adjoints to their initial states. Where starts share one, lane after lane adds.
  __device__ __forceinline__ void add_starts(int k, int state, const float (&decayed)[S::L]) const {
    const bool shared = *a.scratch.shared_starts;
    for (int turn = 7; turn >= 0; --turn) {
      if (lane.starts && at.c + k < at.channels && (!shared || turn == at.i)) {
#pragma unroll
        for (int i = S::L - 1; i >= 0; --i) {
          if (!(lane.starts >> i & 1)) continue;
          const int id = a.events.before[first_step + i];
          float* const to =
              a.dinitial_state + id * a.p.channels * a.p.state_dim + state_index(k, state);
          if (id >= 0) *to = shared ? *to + decayed[i] : decayed[i];
        }
      }
      if (!shared) return;
      __syncwarp();
    }
  }
};

// B and C of the staged states as fp32, steps innermost; what does not exist or is padding becomes
// 0.
template <class S, bool kGeneral>
__device__ void convert_projection(float* to, const char* tile, const TileSource& s, int states,
                                   int steps, const int* before) {
  using B = Backward<S>;
  const int size = s.element_size();
  const bool by_state = s.order == TileOrder::kChannel;
  for (int i = threadIdx.x; i < S::kStates * S::kSteps; i += S::kThreads) {
    const int n = by_state ? i % S::kStates : i / S::kSteps;
    const int t = by_state ? i / S::kStates : i % S::kSteps;
    const bool exists = n < states && t < steps &&
                        !(kGeneral && before && before[t] == CudaScanEvents::kPadding);
    const char* from = tile + B::StateTile::at(s.order, size, n, t);
    to[n * B::kStatePitch + t / S::L * B::kLanePitch + t % S::L] =
        exists ? load_float(from, s.dtype, 0) : 0.0f;
  }
}

// The steps of a tile, after its states: the gradients of u, delta and z take the inputs' place in
// shared memory, each lane's its own.
template <class S>
__device__ __forceinline__ void finish(const BackwardLane<S>& lane, LaneSums<S>& sums,
                                       const BackwardArgs& a, const BackwardPlace<S>& at,
                                       char* stage, const typename Backward<S>::Memory& m,
                                       const float (&bias)[S::C], const float (&D)[S::C],
                                       float (&dD)[S::C], float (&dbias)[S::C]) {
  using Tile = typename Backward<S>::Tile;
  constexpr float kLn2 = 0.693147180559945309417f;  // A was in the base of exp2
  const int t = at.i * S::L;
  float u[S::C][S::L];
  read_steps<Tile, S::C, S::L>(u, stage + m.u, a.u.order, a.u.dtype, at.c, t);
  float raw[S::C][S::L];
  read_steps<Tile, S::C, S::L>(raw, stage + m.delta, a.delta.order, a.delta.dtype, at.c, t);
  if (lane.masked) {
#pragma unroll
    for (int k = 0; k < S::C; ++k) {
#pragma unroll
      for (int i = 0; i < S::L; ++i) {
        if (lane.masked >> i & 1) u[k][i] = raw[k][i] = sums.ddelta[k][i] = 0.0f;
      }
    }
  }
  if (a.p.z.data) {
    float z[S::C][S::L], dout[S::C][S::L];
    read_steps<Tile, S::C, S::L>(z, stage + m.z, a.z.order, a.z.dtype, at.c, t);
    read_steps<Tile, S::C, S::L>(dout, stage + m.dout, a.dout.order, a.dout.dtype, at.c, t);
#pragma unroll
    for (int k = 0; k < S::C; ++k) {
#pragma unroll
      for (int i = 0; i < S::L; ++i) {
        const float s = sigmoid(z[k][i]), y = fmaf(D[k], u[k][i], sums.y[k][i]);
        const float dz = dout[k][i] * y * s * fmaf(z[k][i], 1.0f - s, 1.0f);
        sums.y[k][i] = lane.masked >> i & 1 ? 0.0f : dz;
      }
    }
    write_steps<Tile, S::C, S::L>(sums.y, stage + m.z, a.dz.order, a.dz.dtype, at.c, t);
  }
#pragma unroll
  for (int k = 0; k < S::C; ++k) {
#pragma unroll
    for (int i = 0; i < S::L; ++i) {
      const float ddu = sums.ddu[k][i];
      float ddelta = fmaf(ddu, u[k][i], kLn2 * sums.ddelta[k][i]);
      const float x = raw[k][i] + bias[k];
      if (a.p.delta_softplus && x <= 20.0f) ddelta *= sigmoid(x);
      dD[k] = fmaf(lane.dy[k][i], u[k][i], dD[k]);
      dbias[k] += ddelta;
      sums.ddelta[k][i] = ddelta;
      sums.ddu[k][i] = fmaf(ddu, lane.delta[k][i], D[k] * lane.dy[k][i]);
    }
  }
  write_steps<Tile, S::C, S::L>(sums.ddu, stage + m.u, a.du.order, a.du.dtype, at.c, t);
  write_steps<Tile, S::C, S::L>(sums.ddelta, stage + m.delta, a.ddelta.order, a.ddelta.dtype, at.c,
                                t);
}

// A block's memory and its inputs' places.
template <class S, bool kGeneral>
struct Block {
  using B = Backward<S>;
  const BackwardArgs& a;
  const typename B::Memory& m;
  char* const smem;
  const BackwardPlace<S> at;
  const int n;

  __device__ Block(const BackwardArgs& args, const typename B::Memory& memory, char* shared,
                   int64_t unit)
      : a(args), m(memory), smem(shared), at(args, unit), n(static_cast<int>(args.p.state_dim)) {}

  __device__ float* floats(int offset) const { return reinterpret_cast<float*>(smem + offset); }

  __device__ void load_inputs(char* stage, int64_t t0) const {
    const auto load = [&](int offset, const TileSource& s) {
      load_tile<typename B::Tile, S::kThreads>(stage + offset, s, block_start(s, at),
                                                             t0, a.p.length - t0, at.channels);
    };
    load(m.u, a.u);
    load(m.delta, a.delta);
    load(m.dout, a.dout);
    if (a.p.z.data) load(m.z, a.z);
  }

  // B, C and the entering states of the states [first, first + kStates) of a tile.
  __device__ void load_states(int64_t t0, int first, int turn) const {
    const int states = min(n - first, S::kStates);
    const auto load = [&](int offset, const TileSource& s, const TensorArg& t) {
      const char* from = s.data + (at.row * s.stride_b + at.group * t.stride[1] +
                                   first * s.stride_c) * s.element_size();
      load_tile<typename B::StateTile, S::kThreads>(smem + offset, s, from, t0,
                                                                a.p.length - t0, states);
    };
    if (!kGeneral || !a.p.constant_B) load(m.B_raw, a.B, a.p.B);
    if (!kGeneral || !a.p.constant_C) load(m.C_raw, a.C, a.p.C);
    const int64_t chunk = at.row * a.p.chunks + t0 / kCudaChunk;
    const float* from = a.p.chunk_states + (chunk * a.p.channels + at.channel) * n + first;
    char* to = smem + m.entering + turn * S::kChannels * B::kEnterPitch * 4;
    const bool wide = n % 4 == 0 && reinterpret_cast<uintptr_t>(a.p.chunk_states) % 16 == 0;
    for (int i = threadIdx.x; i < S::kChannels * S::kStates / 4; i += S::kThreads) {
      const int c = i / (S::kStates / 4), s = i % (S::kStates / 4) * 4;
      if (c >= at.channels) continue;
      char* const target = to + (c * B::kEnterPitch + s) * 4;
      const char* const source = reinterpret_cast<const char*>(from + c * int64_t{n} + s);
      if (wide) {
        if (s < states) copy_async<16>(target, source, 16);
      } else {
        for (int k = 0; k < 4 && s + k < states; ++k) {
          *reinterpret_cast<float*>(target + 4 * k) = reinterpret_cast<const float*>(source)[k];
        }
      }
    }
  }

  // A, and what enters the segment's end; sums start at 0.
  __device__ void begin() const {
    for (int i = threadIdx.x; i < n * S::kChannels; i += S::kThreads) {
      const int c = i / n, s = i % n, to = s * S::kChannels + c;
      const bool exists = c < at.channels;
      const int64_t index = (at.channel + c) * n + s, size = a.p.channels * n;
      float carry = 0.0f;
      if (exists && at.segment + 1 < a.plan.segments) {
        carry = a.scratch.adjoint[(at.row * a.plan.segments + at.segment) * size + index];
      } else if (exists && a.dfinal_state && !a.events.before) {
        carry = a.dfinal_state[at.row * size + index];
      }
      floats(m.A)[to] = exists ? kLog2e * load_at(a.p.A, at.channel + c, s) : 0.0f;
      floats(m.carry)[to] = carry;
      floats(m.dA)[to] = 0.0f;
      if (kGeneral && a.p.constant_B) floats(m.dB)[to] = 0.0f;
      if (kGeneral && a.p.constant_C) floats(m.dC)[to] = 0.0f;
    }
  }

  // Sums over the segment's time, and what leaves the row's first step.
  __device__ void end(const float (&dD)[S::C], const float (&dbias)[S::C]) const {
    const int64_t parts = at.row * a.plan.segments + at.segment;
    const int64_t size = a.p.channels * n;
    for (int i = threadIdx.x; i < n * at.channels; i += S::kThreads) {
      const int from = i % n * S::kChannels + i / n;
      const int64_t to = parts * size + at.channel * n + i;
      a.dA[to] = floats(m.dA)[from];
      if (kGeneral && a.p.constant_B) a.dB[to] = floats(m.dB)[from];
      if (kGeneral && a.p.constant_C) a.dC[to] = floats(m.dC)[from];
      if (a.dinitial_state && !a.events.before && at.segment == 0) {
        a.dinitial_state[at.row * size + at.channel * n + i] = floats(m.carry)[from];
      }
    }
#pragma unroll
    for (int k = 0; k < S::C; ++k) {
      const float d = sum_steps(dD[k]), b = sum_steps(dbias[k]);
      if (at.i != 0 || at.c + k >= at.channels) continue;
      const int64_t to = parts * a.p.channels + at.channel + at.c + k;
      if (a.dD) a.dD[to] = d;
      if (a.ddelta_bias) a.ddelta_bias[to] = b;
    }
  }

  // Sums a batch of states' dC and dB over the warps and writes the block's share of them.
  __device__ void store_batch(int turn, int64_t t0, int first, int states) const {
    const float4* const from = reinterpret_cast<const float4*>(smem + m.sums) +
                               (turn & 1) * S::kBatch * S::kWarps * 32;
    for (int j = 0; j < states; ++j) {
      if ((turn * S::kBatch + j) % S::kWarps != at.warp) continue;
      float4 sum = from[j * S::kWarps * 32 + at.lane];
#pragma unroll 4
      for (int w = 1; w < S::kWarps; ++w) {
        const float4 v = from[(j * S::kWarps + w) * 32 + at.lane];
        sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
      }
      const bool of_B = at.lane & 2;
      if (kGeneral && (of_B ? a.p.constant_B : a.p.constant_C)) continue;
      const int64_t t = t0 + at.i * S::L + at.lane % 2 * 4;
      if (t >= a.plan.padded_length) continue;
      const int64_t row = at.row * a.plan.slices + at.slice;
      float* const to = (of_B ? a.dB : a.dC) + (row * n + first + j) * a.plan.padded_length + t;
      *reinterpret_cast<float4*>(to) = sum;
    }
  }

  __device__ void store_outputs(char* stage, int64_t t0) const {
    const auto store = [&](int offset, const TileSource& s) {
      store_tile<typename B::Tile, S::kThreads>(stage + offset, s, block_start(s, at),
                                                              t0, a.p.length - t0, at.channels);
    };
    store(m.u, a.du);
    store(m.delta, a.ddelta);
    if (a.p.z.data) store(m.z, a.dz);
  }

  // One staged state.
  template <bool kExact>
  __device__ __forceinline__ void run_state(const BackwardLane<S>& lane, LaneSums<S>& sums,
                                            const Columns& columns, int64_t t0, int first, int s,
                                            int turn, float4* to) const {
    const int state = first + s;
    float Bs[S::L], Cs[S::L];
    const int from = s * B::kStatePitch + at.i * B::kLanePitch;
    if (!kGeneral || !a.p.constant_B) read_eight(Bs, floats(m.B) + from);
    if (!kGeneral || !a.p.constant_C) read_eight(Cs, floats(m.C) + from);
    const int here = state * S::kChannels + at.c;
    const float* const entering = floats(m.entering) +
                                  (turn * S::kChannels + at.c) * B::kEnterPitch + s;
    const StateRun<S, kGeneral, kExact> run{a, at, lane, sums, columns,
                                            at.row * a.p.length + t0 + at.i * S::L};
    ChannelSum total;
    float leaving[S::C], dA[S::C] = {}, dB[S::C] = {}, dC[S::C] = {};
    const auto channel = [&](auto which) {
      constexpr int k = decltype(which)::value;
      if constexpr (kGeneral) {
        const int64_t c = at.channel + min(at.c + k, at.channels - 1);
        const float b = a.p.constant_B ? load_at(a.p.B, c, state) : 0.0f;
        const float v = a.p.constant_C ? load_at(a.p.C, c, state) : 0.0f;
#pragma unroll
        for (int i = 0; i < S::L; ++i) {
          if (a.p.constant_B) Bs[i] = b;
          if (a.p.constant_C) Cs[i] = v;
        }
      }
      const float h = at.c + k < at.channels ? entering[k * B::kEnterPitch] : 0.0f;
      leaving[k] = run.template run<k>(state, Bs, Cs, floats(m.A)[here + k], h,
                                       floats(m.carry)[here + k], total, dA[k], dB[k], dC[k]);
    };
    channel(std::integral_constant<int, 0>{});
    channel(std::integral_constant<int, 1>{});
    *to = make_float4(total.total[0], total.total[1], total.total[2], total.total[3]);
    __syncwarp();  // every lane has read the carry
#pragma unroll
    for (int k = 0; k < S::C; ++k) {
      dA[k] = sum_steps(dA[k]);
      if (kGeneral && a.p.constant_B) dB[k] = sum_steps(dB[k]);
      if (kGeneral && a.p.constant_C) dC[k] = sum_steps(dC[k]);
      if (at.i != 0) continue;
      floats(m.carry)[here + k] = leaving[k];
      floats(m.dA)[here + k] += dA[k];
      if (kGeneral && a.p.constant_B) floats(m.dB)[here + k] += dB[k];
      if (kGeneral && a.p.constant_C) floats(m.dC)[here + k] += dC[k];
    }
  }
};

// All tiles of a unit.
template <class S, bool kGeneral, bool kExact>
__device__ void run_unit(const BackwardArgs& a, const typename Backward<S>::Memory& m, char* smem,
                         int64_t unit) {
  const Block<S, kGeneral> block(a, m, smem, unit);
  const BackwardPlace<S>& at = block.at;
  const int n = block.n;
  const Columns columns(at.lane);
  float bias[S::C], D[S::C], dD[S::C] = {}, dbias[S::C] = {};
#pragma unroll
  for (int k = 0; k < S::C; ++k) {
    const int64_t channel = at.channel + min(at.c + k, at.channels - 1);
    bias[k] = load_channel(a.p.delta_bias, channel);
    D[k] = load_channel(a.p.D, channel);
  }
  const int64_t first_tile = at.segment * a.plan.segment_tiles;
  const int64_t last_tile = min(first_tile + a.plan.segment_tiles, a.tiles) - 1;
  block.load_inputs(smem, last_tile * S::kSteps);
  block.load_states(last_tile * S::kSteps, 0, 0);
  copies_commit();
  block.begin();
  int turn = 0, batch = 0;  // of the entering states; of the sums over warps
  BackwardLane<S> lane;
  for (int64_t tile = last_tile; tile >= first_tile; --tile) {
    const int64_t t0 = tile * S::kSteps;
    const int stage_index = a.plan.stages == 2 ? (last_tile - tile) & 1 : 0;
    char* const stage = smem + stage_index * m.stage;
    const int* before = kGeneral && a.events.before ? a.events.before + at.row * a.p.length + t0
                                                    : nullptr;
    LaneSums<S> sums;
    for (int first = 0; first < n; first += S::kStates, turn ^= 1) {
      const int states = min(n - first, S::kStates);
      const int steps = clamp_int(a.p.length - t0, 0, S::kSteps);
      copies_wait<0>();
      __syncthreads();
      if (!kGeneral || !a.p.constant_B) {
        convert_projection<S, kGeneral>(block.floats(m.B), smem + m.B_raw, a.B, states, steps,
                                        before);
      }
      if (!kGeneral || !a.p.constant_C) {
        convert_projection<S, kGeneral>(block.floats(m.C), smem + m.C_raw, a.C, states, steps,
                                        before);
      }
      if (first == 0) {
        prepare<S, kGeneral>(lane, a, at, stage, m, bias, t0);
#pragma unroll
        for (int k = 0; k < S::C; ++k) {
#pragma unroll
          for (int i = 0; i < S::L; ++i) {
            sums.ddu[k][i] = sums.ddelta[k][i] = sums.y[k][i] = 0.0f;
          }
        }
      }
      __syncthreads();
      const bool last = first + S::kStates >= n;
      if (first == 0 && a.plan.stages == 2 && tile > first_tile) {
        block.load_inputs(smem + (m.stage - stage_index * m.stage), t0 - S::kSteps);
      }
      if (!last) {
        block.load_states(t0, first + S::kStates, turn ^ 1);
      } else if (tile > first_tile) {
        block.load_states(t0 - S::kSteps, 0, turn ^ 1);
      }
      copies_commit();
      for (int s0 = 0; s0 < states; s0 += S::kBatch, ++batch) {
        const int count = min(states - s0, S::kBatch);
        float4* const to = reinterpret_cast<float4*>(smem + m.sums) +
                           ((batch & 1) * S::kBatch * S::kWarps + at.warp) * 32 + at.lane;
        for (int j = 0; j < count; ++j) {
          block.template run_state<kExact>(lane, sums, columns, t0, first, s0 + j, turn,
                                           to + j * S::kWarps * 32);
        }
        __syncthreads();
        block.store_batch(batch, t0, first + s0, count);
      }
    }
    finish<S>(lane, sums, a, at, stage, m, bias, D, dD, dbias);
    __syncthreads();
    block.store_outputs(stage, t0);
    if (a.plan.stages == 1 && tile > first_tile) {
      __syncthreads();
      block.load_inputs(smem, t0 - S::kSteps);
      copies_commit();
    }
  }
  block.end(dD, dbias);
}

template <class S, bool kGeneral, bool kExact>
__global__ void __launch_bounds__(S::kThreads, S::kMinBlocks)
    scan_backward_kernel(const __grid_constant__ BackwardArgs a, int64_t units) {
  extern __shared__ __align__(16) char smem[];
  const typename Backward<S>::Memory m(a);
  // Rows that share an initial state add to its gradient one after the other.
  const bool one_after_the_other =
      kGeneral && a.scratch.shared_starts && *a.scratch.shared_starts;
  const int64_t slices = a.plan.slices;
  if (one_after_the_other && blockIdx.x >= slices) return;
  const int64_t step = one_after_the_other ? min(slices, int64_t{gridDim.x}) : gridDim.x;
  for (int64_t unit = blockIdx.x; unit < units; unit += step) {
    run_unit<S, kGeneral, kExact>(a, m, smem, unit);
    __syncthreads();
  }
}

// The gradients take their inputs' place in shared memory, so both need one order.
void use_one_order(TileSource& input, TileSource& output) {
  const bool by_channel = input.order == TileOrder::kChannel;
  if (by_channel != (output.order == TileOrder::kChannel)) {
    input.order = output.order = TileOrder::kElements;
  }
}

template <class S>
BackwardArgs backward_args(const ScanGradients& g, const CudaScanEvents& events,
                           const BackwardPlan& plan, const BackwardScratch& scratch) {
  BackwardArgs a;
  const ScanParams& p = g.forward;
  a.p = p, a.events = events, a.plan = plan, a.scratch = scratch;
  a.dfinal_state = g.dfinal_state, a.dinitial_state = g.dinitial_state;
  a.dA = g.dA, a.dB = g.dB, a.dC = g.dC, a.dD = g.dD, a.ddelta_bias = g.ddelta_bias;
  a.group_channels = p.group_channels();
  a.tiles = (p.length + S::kSteps - 1) / S::kSteps;
  const auto size = [](const TensorArg& t) { return t.dtype == DType::kFloat32 ? 4 : 2; };
  const auto source = [&](const TensorArg& t) {
    const bool aligned = p.groups == 1 || p.group_channels() * size(t) % 16 == 0;
    return tile_source(t.data, t.dtype, t.stride[0], t.stride[1], t.stride[2], S::kChannels,
                       aligned);
  };
  const auto projection = [&](const TensorArg& t) {
    TileSource s = tile_source(t.data, t.dtype, t.stride[0], t.stride[2], t.stride[3], S::kStates,
                               true);
    if (p.groups > 1 && t.stride[1] * size(t) % 16 != 0) s.order = TileOrder::kElements;
    return s;
  };
  a.u = source(p.u), a.delta = source(p.delta), a.z = source(p.z), a.dout = source(g.dout);
  a.du = source(g.du), a.ddelta = source(g.ddelta), a.dz = source(g.dz);
  use_one_order(a.u, a.du), use_one_order(a.delta, a.ddelta), use_one_order(a.z, a.dz);
  if (!p.constant_B) a.B = projection(p.B);
  if (!p.constant_C) a.C = projection(p.C);
  return a;
}

const char* message(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <class S, bool kGeneral, bool kExact>
const char* launch(const BackwardArgs& a, cudaStream_t stream) {
  const typename Backward<S>::Memory m(a);
  const auto kernel = scan_backward_kernel<S, kGeneral, kExact>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, m.total);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  const int64_t units = a.p.batch * a.plan.segments * a.plan.slices;
  const int64_t blocks = units < INT32_MAX ? units : INT32_MAX;
  kernel<<<static_cast<unsigned>(blocks), S::kThreads, m.total, stream>>>(a, units);
  return message(cudaGetLastError());
}

template <class S>
const char* launch(const ScanGradients& g, const CudaScanEvents& events, const BackwardPlan& plan,
                   const BackwardScratch& scratch, cudaStream_t stream) {
  const BackwardArgs a = backward_args<S>(g, events, plan, scratch);
  if (events.before || a.p.constant_B || a.p.constant_C) return launch<S, true, true>(a, stream);
  return plan.exact_sums ? launch<S, false, true>(a, stream) : launch<S, false, false>(a, stream);
}

// Which states several starts share: those have no single adjoint to store.
__global__ void __launch_bounds__(256)
    count_starts_kernel(const int* before, int64_t steps, int* starts, int* shared) {
  for (int64_t i = int64_t{blockIdx.x} * 256 + threadIdx.x; i < steps; i += int64_t{gridDim.x} * 256) {
    if (before[i] >= 0 && atomicAdd(starts + before[i], 1) > 0) *shared = 1;
  }
}

const char* count_starts(const ScanParams& p, const CudaScanEvents& events,
                         const BackwardScratch& scratch, cudaStream_t stream) {
  cudaError_t error = cudaMemsetAsync(scratch.shared_starts, 0, sizeof(int), stream);
  if (error == cudaSuccess) {
    error = cudaMemsetAsync(scratch.starts, 0, p.num_states * sizeof(int), stream);
  }
  if (error != cudaSuccess) return cudaGetErrorString(error);
  const int64_t steps = p.batch * p.length, blocks = (steps + 255) / 256;
  count_starts_kernel<<<static_cast<unsigned>(blocks < 1024 ? blocks : 1024), 256, 0, stream>>>(
      events.before, steps, scratch.starts, scratch.shared_starts);
  return message(cudaGetLastError());
}

template <class S>
int shared_memory(const ScanParams& p, int stages) {
  ScanGradients g;
  g.forward = p;
  g.dout = p.u;
  BackwardPlan plan;
  plan.stages = stages;
  return typename Backward<S>::Memory(backward_args<S>(g, {}, plan, {})).total;
}

template <class S>
bool choose(const ScanParams& p, int memory, int memory_of_processor, BackwardPlan* plan) {
  // Two stages where they do not cost a block.
  const int one = shared_memory<S>(p, 1), two = shared_memory<S>(p, 2);
  if (one > memory) return false;
  const auto blocks = [&](int bytes) {
    return std::min<int>(S::kMinBlocks, memory_of_processor / (bytes + 1024));
  };
  plan->warps = S::kWarps;
  plan->stages = two <= memory && blocks(two) >= blocks(one) ? 2 : 1;
  plan->blocks_per_group = (p.group_channels() + S::kChannels - 1) / S::kChannels;
  plan->slices = p.groups * plan->blocks_per_group;
  return true;
}

}  // namespace

BackwardPlan backward_plan(const ScanParams& p) {
  BackwardPlan plan;
  int device = 0, memory = 0, memory_of_processor = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&memory, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  cudaDeviceGetAttribute(&memory_of_processor, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  plan.padded_length = (p.length + 3) / 4 * 4;
  plan.exact_sums = p.B.dtype == DType::kFloat32 || p.C.dtype == DType::kFloat32;
  plan.segment_tiles = (p.length + kCudaChunk - 1) / kCudaChunk;
  if (p.group_channels() > 32 &&
      choose<BackwardShape<12>>(p, memory, memory_of_processor, &plan)) {
    return plan;
  }
  if (choose<BackwardShape<4>>(p, memory, memory_of_processor, &plan)) return plan;
  choose<BackwardShape<1>>(p, memory, memory_of_processor, &plan);
  return plan;
}

const char* scan_backward_cuda(const ScanGradients& g, const CudaScanEvents& events,
                               const BackwardPlan& plan, const BackwardScratch& scratch,
                               void* stream_handle) {
  const ScanParams& p = g.forward;
  if (p.batch * p.channels * p.length == 0) return nullptr;
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  if (scratch.shared_starts) {
    if (const char* error = count_starts(p, events, scratch, stream)) return error;
  }
  switch (plan.warps) {
    case 12:
      return launch<BackwardShape<12>>(g, events, plan, scratch, stream);
    case 4:
      return launch<BackwardShape<4>>(g, events, plan, scratch, stream);
    default:
      return launch<BackwardShape<1>>(g, events, plan, scratch, stream);
  }
}

}  // namespace mamba
