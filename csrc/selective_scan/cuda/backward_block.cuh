// What a block of the scan's backward does around the states: inputs in, gradients out.
#pragma once

#include "backward_state.cuh"

namespace mamba {

// The kernels of kTime also serve kElements, which lies in shared memory in the same way.
template <class K>
bool serves(const TileSource& s) {
  if (K::kAny || K::fits(s)) return true;
  TileSource aligned = s;
  aligned.order = TileOrder::kTime;
  return s.order == TileOrder::kElements && K::fits(aligned);
}

// Moves steps [t0, t0 + 64) of the block's channels between global and shared memory.
template <class S, class K, bool kLoad>
__device__ __forceinline__ void move_block(char* tile, const TileSource& s,
                                           const BackwardPlace<S>& at, int64_t t0, int64_t length) {
  using Tile = BackwardTile<S::kChannels>;
  char* const start = s.data + (at.row * s.stride_b + at.channel * s.stride_c) * K::size(s);
  if constexpr (!K::kAny) {
    if (s.order == TileOrder::kElements) {
      move_any_tile<Tile, S::kThreads, kLoad>(tile, start + t0 * s.stride_t * K::size(s), s,
                                              clamp_int(length - t0, 0, S::kSteps), at.channels);
      return;
    }
  }
  move_steps<K, Tile, S::kThreads, kLoad>(tile, s, start, t0, length - t0, at.channels);
}

// B and C of the staged states on their way to shared memory: each thread's elements.
template <class S>
struct ProjectionLoad {
  static constexpr int kElements = S::kStates * S::kSteps;
  static constexpr int kPer = (kElements + S::kThreads - 1) / S::kThreads;
  uint32_t bits[2][kPer];

  struct Place {
    int state, step;
    __device__ __forceinline__ Place(const TensorArg& x, int k) {
      const int i = threadIdx.x + k * S::kThreads;
      const bool states_inner = x.stride[2] < x.stride[3];
      state = states_inner ? i % S::kStates : i / S::kSteps;
      step = states_inner ? i / S::kStates : i % S::kSteps;
    }
  };

  // Steps from t0, states from `first`; padding counts as not existing.
  template <class K>
  __device__ __forceinline__ void load(int which, const TensorArg& x, const BackwardPlace<S>& at,
                                       int64_t t0, int steps, int first, int states,
                                       const int* before) {
    const bool word = K::kAny ? x.dtype == DType::kFloat32 : K::size({}) == 4;
    const int64_t base =
        at.row * x.stride[0] + at.group * x.stride[1] + first * x.stride[2] + t0 * x.stride[3];
#pragma unroll
    for (int k = 0; k < kPer; ++k) {
      const Place p(x, k);
      bits[which][k] = 0;
      if (p.state >= states || p.step >= steps) continue;
      if (before && before[p.step] == CudaScanEvents::kPadding) continue;
      const int64_t offset = base + p.state * x.stride[2] + p.step * x.stride[3];
      bits[which][k] = word ? static_cast<const uint32_t*>(x.data)[offset]
                            : static_cast<const uint16_t*>(x.data)[offset];
    }
  }

  template <class K, int kStatePitch, int kLanePitch>
  __device__ __forceinline__ void store(int which, const TensorArg& x, float* to) const {
    const DType dtype = K::kAny ? x.dtype : K::dtype({});
#pragma unroll
    for (int k = 0; k < kPer; ++k) {
      const Place p(x, k);
      if (kElements % S::kThreads != 0 && p.state >= S::kStates) continue;
      if (kElements % S::kThreads != 0 && p.step >= S::kSteps) continue;
      const float value = dtype == DType::kFloat32
                              ? __uint_as_float(bits[which][k])
                              : unpack(bits[which][k], dtype == DType::kBFloat16).x;
      to[p.state * kStatePitch + p.step / S::L * kLanePitch + p.step % S::L] = value;
    }
  }
};

template <class S, class K, bool kGeneral>
struct BackwardBlock {
  using M = BackwardMemory<S, kGeneral>;
  using Tile = typename M::Tile;
  using Lane = BackwardLane<S>;
  const BackwardArgs& a;
  const M& m;
  char* const smem;
  const BackwardPlace<S> at;
  const int n;
  float bias[S::C], D[S::C], dD[S::C] = {}, dbias[S::C] = {};

  __device__ __forceinline__ BackwardBlock(const BackwardArgs& args, const M& memory, char* shared,
                                           int64_t unit)
      : a(args), m(memory), smem(shared), at(args, unit), n(static_cast<int>(args.p.state_dim)) {
#pragma unroll
    for (int k = 0; k < S::C; ++k) {
      const int64_t channel = at.channel + min(at.c + k, at.channels - 1);
      bias[k] = of_channel(a.p.delta_bias, channel), D[k] = of_channel(a.p.D, channel);
    }
  }

  __device__ static float of_channel(const TensorArg& x, int64_t channel) {
    return x.data ? load_float(x.data, x.dtype, channel * x.stride[0]) : 0.0f;
  }
  __device__ __forceinline__ float* floats(int offset) const {
    return reinterpret_cast<float*>(smem + offset);
  }
  __device__ __forceinline__ const int* events_from(int64_t t0) const {
    return kGeneral && a.events.before ? a.events.before + at.row * a.p.length + t0 : nullptr;
  }

  __device__ __forceinline__ void load_inputs(char* stage, int64_t t0) const {
    move_block<S, K, true>(stage + m.u, a.u, at, t0, a.p.length);
    move_block<S, K, true>(stage + m.delta, a.delta, at, t0, a.p.length);
    move_block<S, K, true>(stage + m.dout, a.dout, at, t0, a.p.length);
    if (a.p.z.data) move_block<S, K, true>(stage + m.z, a.z, at, t0, a.p.length);
  }
  __device__ __forceinline__ void store_outputs(char* stage, int64_t t0) const {
    move_block<S, K, false>(stage + m.u, a.du, at, t0, a.p.length);
    move_block<S, K, false>(stage + m.delta, a.ddelta, at, t0, a.p.length);
    if (a.p.z.data) move_block<S, K, false>(stage + m.z, a.dz, at, t0, a.p.length);
  }

  // The states that enter the tile at t0, from `first` on.
  __device__ __forceinline__ void load_entering(int64_t t0, int first, int turn) const {
    const int64_t chunk = at.row * a.p.chunks + t0 / kCudaChunk;
    const float* from = a.p.chunk_states + (chunk * a.p.channels + at.channel) * n + first;
    float* to = floats(m.entering) + turn * S::kChannels * M::kEnterPitch;
    constexpr int kQuads = S::kStates / 4;
#pragma unroll
    for (int i = threadIdx.x; i < S::kChannels * kQuads; i += S::kThreads) {
      const int c = i / kQuads, s = i % kQuads * 4;
      if (c >= at.channels || first + s >= n) continue;
      const float* const source = from + int64_t{c} * n + s;
      float* const target = to + c * M::kEnterPitch + s;
      if (a.wide_states) {
        copy_async<16>(reinterpret_cast<char*>(target), reinterpret_cast<const char*>(source), 16);
      } else {
        for (int k = 0; k < 4 && first + s + k < n; ++k) target[k] = source[k];
      }
    }
  }

  __device__ __forceinline__ void load_projections(ProjectionLoad<S>& load, int64_t t0,
                                                   int first) const {
    const int steps = clamp_int(a.p.length - t0, 0, S::kSteps), states = min(n - first, S::kStates);
    const int* before = events_from(t0);
    if (!kGeneral || !a.p.constant_B) {
      load.template load<K>(0, a.p.B, at, t0, steps, first, states, before);
    }
    if (!kGeneral || !a.p.constant_C) {
      load.template load<K>(1, a.p.C, at, t0, steps, first, states, before);
    }
  }
  __device__ __forceinline__ void store_projections(const ProjectionLoad<S>& load) const {
    float* const to = floats(m.projections);
    if (!kGeneral || !a.p.constant_B) {
      load.template store<K, M::kStatePitch, M::kLanePitch>(0, a.p.B, to);
    }
    if (!kGeneral || !a.p.constant_C) {
      load.template store<K, M::kStatePitch, M::kLanePitch>(1, a.p.C, to + M::kRowPitch);
    }
  }

  // A, and what enters the segment at its end; sums start at 0.
  __device__ void begin() const {
    for (int i = threadIdx.x; i < n * S::kChannels; i += S::kThreads) {
      const int c = i / n, s = i % n;
      const bool exists = c < at.channels;
      const int64_t index = (at.channel + c) * n + s, size = a.p.channels * n;
      float carry = 0.0f;
      if (exists && at.segment + 1 < a.plan.segments) {
        carry = a.scratch.adjoint[(at.row * a.plan.segments + at.segment) * size + index];
      } else if (exists && a.dfinal_state && !a.events.before) {
        carry = a.dfinal_state[at.row * size + index];
      }
      float* const record = floats(m.records) + s * M::kRecordPitch + c;
      record[0] = exists ? kLog2e * load_at(a.p.A, at.channel + c, s) : 0.0f;
      record[S::kChannels] = carry;
#pragma unroll
      for (int k = 2; k < M::kRecord; ++k) record[k * S::kChannels] = 0.0f;
    }
  }

  // Sums over the segment's time, and what leaves the row's first step.
  __device__ void end() const {
    const int64_t parts = at.row * a.plan.segments + at.segment;
    const int64_t size = a.p.channels * n, first = at.channel * n;
    for (int i = threadIdx.x; i < n * at.channels; i += S::kThreads) {
      const float* const record = floats(m.records) + i % n * M::kRecordPitch + i / n;
      a.dA[parts * size + first + i] = record[2 * S::kChannels];
      if constexpr (kGeneral) {
        if (a.p.constant_B) a.dB[parts * size + first + i] = record[3 * S::kChannels];
        if (a.p.constant_C) a.dC[parts * size + first + i] = record[4 * S::kChannels];
      }
      if (a.dinitial_state && !a.events.before && at.segment == 0) {
        a.dinitial_state[at.row * size + first + i] = record[S::kChannels];
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

  __device__ __forceinline__ void read(float (&v)[S::C][S::L], const char* tile,
                                       const TileSource& s) const {
    read_steps<Tile, S::C, S::L>(v, tile, K::order(s), K::dtype(s), at.c, at.i * S::L);
  }
  __device__ __forceinline__ void write(const float (&v)[S::C][S::L], char* tile,
                                        const TileSource& s) const {
    write_steps<Tile, S::C, S::L>(v, tile, K::order(s), K::dtype(s), at.c, at.i * S::L);
  }

  // delta, delta * u and dy of the lane's steps. Steps that do not exist or are padding get 0,
  // which leaves states as they are and adds nothing to any sum.
  __device__ __forceinline__ void prepare(Lane& lane, const char* stage, int64_t t0) const {
    const int t = at.i * S::L, exist = clamp_int(a.p.length - t0 - t, 0, S::L);
    float u[S::C][S::L];
    read(lane.dy, stage + m.dout, a.dout);
    if (a.p.z.data) {
      float z[S::C][S::L];
      read(z, stage + m.z, a.z);
#pragma unroll
      for (int k = 0; k < S::C; ++k) {
#pragma unroll
        for (int i = 0; i < S::L; ++i) lane.dy[k][i] *= z[k][i] * sigmoid(z[k][i]);
      }
    }
    read(lane.delta, stage + m.delta, a.delta);
#pragma unroll
    for (int k = 0; k < S::C; ++k) {
#pragma unroll
      for (int i = 0; i < S::L; ++i) lane.delta[k][i] += bias[k];
    }
    if (a.p.delta_softplus) {
#pragma unroll
      for (int k = 0; k < S::C; ++k) {
#pragma unroll
        for (int i = 0; i < S::L; ++i) lane.delta[k][i] = softplus(lane.delta[k][i]);
      }
    }
    read(u, stage + m.u, a.u);
#pragma unroll
    for (int k = 0; k < S::C; ++k) {
#pragma unroll
      for (int i = 0; i < S::L; ++i) lane.du[k][i] = lane.delta[k][i] * u[k][i];
    }
    lane.masked = exist < S::L ? ~0u << exist : 0u;
    if constexpr (kGeneral) read_events(lane, t0 + t, exist);
    if (lane.masked || at.c + S::C > at.channels) mask(lane);
#pragma unroll
    for (int k = 0; k < S::C; ++k) {
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < S::L; ++i) {
        sum += lane.delta[k][i];
        lane.ddu[k][i] = lane.ddelta[k][i] = lane.y[k][i] = 0.0f;
      }
      lane.delta_sum[k] = sum;
    }
  }

  __device__ __forceinline__ void read_events(Lane& lane, int64_t t, int exist) const {
    lane.starts = lane.ends = 0;
    if (!a.events.before) return;
    const int64_t first = at.row * a.p.length + t;
    for (int i = 0; i < exist; ++i) {
      const int before = a.events.before[first + i];
      if (before == CudaScanEvents::kPadding) lane.masked |= 1u << i;
      if (before >= 0 || before == CudaScanEvents::kFreshStart) lane.starts |= 1u << i;
      if (a.events.after[first + i] >= 0) lane.ends |= 1u << i;
    }
  }

  __device__ __forceinline__ void mask(Lane& lane) const {
#pragma unroll
    for (int k = 0; k < S::C; ++k) {
      const unsigned nothing = at.c + k < at.channels ? lane.masked : ~0u;
#pragma unroll
      for (int i = 0; i < S::L; ++i) {
        if (nothing >> i & 1) lane.delta[k][i] = lane.du[k][i] = lane.dy[k][i] = 0.0f;
      }
    }
  }

  // After the states: the gradients of u, delta and z take the inputs' place in shared memory, each
  // lane's its own.
  __device__ __forceinline__ void finish(Lane& lane, char* stage) {
    constexpr float kLn2 = 0.693147180559945309417f;  // A was in the base of exp2
    float u[S::C][S::L];
    read(u, stage + m.u, a.u);
    if (lane.masked) {
#pragma unroll
      for (int k = 0; k < S::C; ++k) {
#pragma unroll
        for (int i = 0; i < S::L; ++i) {
          if (lane.masked >> i & 1) u[k][i] = lane.ddelta[k][i] = 0.0f;
        }
      }
    }
    if (a.p.z.data) finish_z(lane, u, stage);
    float raw[S::C][S::L];
    read(raw, stage + m.delta, a.delta);
#pragma unroll
    for (int k = 0; k < S::C; ++k) {
#pragma unroll
      for (int i = 0; i < S::L; ++i) {
        const float ddu = lane.ddu[k][i], x = raw[k][i] + bias[k];
        float ddelta = fmaf(ddu, u[k][i], kLn2 * lane.ddelta[k][i]);
        // The derivative of softplus; where nothing is to flow, x may be anything.
        if (a.p.delta_softplus) ddelta = ddelta == 0.0f || x > 20.0f ? ddelta : ddelta * sigmoid(x);
        dD[k] = fmaf(lane.dy[k][i], u[k][i], dD[k]);
        dbias[k] += ddelta;
        lane.ddelta[k][i] = ddelta;
        lane.ddu[k][i] = fmaf(ddu, lane.delta[k][i], D[k] * lane.dy[k][i]);
      }
    }
    write(lane.ddu, stage + m.u, a.du);
    write(lane.ddelta, stage + m.delta, a.ddelta);
  }

  __device__ __forceinline__ void finish_z(Lane& lane, const float (&u)[S::C][S::L],
                                           char* stage) const {
    float z[S::C][S::L], dout[S::C][S::L];
    read(z, stage + m.z, a.z);
    read(dout, stage + m.dout, a.dout);
#pragma unroll
    for (int k = 0; k < S::C; ++k) {
#pragma unroll
      for (int i = 0; i < S::L; ++i) {
        const float s = sigmoid(z[k][i]), y = fmaf(D[k], u[k][i], lane.y[k][i]);
        lane.y[k][i] = dout[k][i] * y * s * fmaf(z[k][i], 1.0f - s, 1.0f);
      }
    }
    if (lane.masked) {
#pragma unroll
      for (int k = 0; k < S::C; ++k) {
#pragma unroll
        for (int i = 0; i < S::L; ++i) {
          if (lane.masked >> i & 1) lane.y[k][i] = 0.0f;
        }
      }
    }
    write(lane.y, stage + m.z, a.dz);
  }

  // Where the warp's sums of a batch go, [turn][state of the batch][warp][lane].
  __device__ __forceinline__ float4* batch_sums(int turn) const {
    return reinterpret_cast<float4*>(smem + m.sums) + (turn & 1) * S::kBatch * S::kWarps * 32;
  }

  // Sums a batch of states' dC and dB over the warps and writes the block's share of them. Warps
  // take turns, `last` being the one that was the last to do so.
  __device__ __forceinline__ void store_batch(int turn, int first_warp, int64_t t0, int first,
                                              int states) const {
    int j = at.warp - first_warp;
    if (j < 0) j += S::kWarps;
    for (; j < states; j += S::kWarps) {
      const float4* const from = batch_sums(turn) + j * S::kWarps * 32 + at.lane;
      float4 sum = from[0];
#pragma unroll
      for (int w = 1; w < S::kWarps; ++w) {
        const float4 v = from[w * 32];
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

  // Adds the lanes' dA of a batch, [state][lane][channel], over the lanes of each channel: one
  // state and channel for every lane.
  __device__ __forceinline__ void add_lane_sums(const float* sums, int first, int states) const {
    __syncwarp();
    const int s = at.lane / 8, channel = at.lane % 8;
    const float* const from = sums + s * M::kLaneSumPitch + channel;
    float sum = from[0];
#pragma unroll
    for (int i = 1; i < 8; ++i) sum += from[8 * i];
    if (s < states) {
      floats(m.records)[(first + s) * M::kRecordPitch + 2 * S::kChannels +
                        at.warp * S::kWarpChannels + channel] += sum;
    }
    __syncwarp();
  }
};

}  // namespace mamba
