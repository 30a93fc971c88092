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

template <class S, class K, bool kGeneral>
struct BackwardBlock {
  using M = BackwardMemory<S, kGeneral>;
  using Tile = typename M::Tile;
  using Lane = BackwardLane;
  const BackwardArgs& a;
  const M& m;
  char* const smem;
  const BackwardPlace<S> at;
  const int n;

  __device__ __forceinline__ BackwardBlock(const BackwardArgs& args, const M& memory, char* shared,
                                           int64_t unit)
      : a(args), m(memory), smem(shared), at(args, unit), n(static_cast<int>(args.p.state_dim)) {}

  __device__ static float of_channel(const TensorArg& x, int64_t channel) {
    return x.data ? load_float(x.data, x.dtype, channel * x.stride[0]) : 0.0f;
  }
  __device__ __forceinline__ float* floats(int offset) const {
    return reinterpret_cast<float*>(smem + offset);
  }
  // dD of the lane's two channels, then ddelta_bias.
  __device__ __forceinline__ float4* totals() const {
    return reinterpret_cast<float4*>(smem + m.totals) + threadIdx.x;
  }
  __device__ __forceinline__ float2 constants(int which) const {
    return *reinterpret_cast<const float2*>(floats(m.constants) + which * S::kChannels + at.c);
  }

  __device__ __forceinline__ char* start(int tensor) const {
    return reinterpret_cast<char* const*>(smem + m.starts)[tensor];
  }
  // Whether a tile is whole and all tensors are aligned: then copies need no bounds.
  __device__ __forceinline__ bool whole(int64_t t0) const {
    return a.aligned && at.channels == S::kChannels && t0 + S::kSteps <= a.p.length;
  }

  // Measured: 16-bit tiles with channels innermost move faster with bounds.
  static constexpr bool kMovesWhole = K::kOrder == static_cast<int>(TileOrder::kTime) ||
                                      (!K::kAny && K::kDType == static_cast<int>(DType::kFloat32));

  // A whole tile of an aligned tensor.
  template <bool kLoad>
  __device__ __forceinline__ void move_whole(char* tile, const TileSource& s, int tensor,
                                             int64_t t0) const {
    constexpr bool kByTime = K::kOrder == static_cast<int>(TileOrder::kTime);
    constexpr auto kOrder = kByTime ? TileOrder::kTime : TileOrder::kChannel;
    constexpr int kSize = K::kDType == static_cast<int>(DType::kFloat32) ? 4 : 2;
    constexpr int kPer = 16 / kSize, kPieces = (kByTime ? S::kSteps : S::kChannels) / kPer;
    constexpr int kStride = S::kThreads / kPieces;  // rows of a pass
    constexpr int kPasses = (kByTime ? S::kChannels : S::kSteps) / kStride;
    static_assert(kStride * kPieces == S::kThreads, "a pass covers whole rows");
    const int row = threadIdx.x / kPieces, first = threadIdx.x % kPieces * kPer;
    const int64_t row_bytes = (kByTime ? s.stride_c : s.stride_t) * kSize;
    char* global =
        start(tensor) + (kByTime ? t0 : t0 * s.stride_t) * kSize + row * row_bytes + first * kSize;
    tile += kByTime ? Tile::at(kOrder, kSize, row, first) : Tile::at(kOrder, kSize, first, row);
#pragma unroll
    for (int i = 0; i < kPasses; ++i, global += kStride * row_bytes) {
      // A pass moves on by whole pads, so that its distance in the tile is a constant.
      constexpr int kApart =
          kByTime ? Tile::at(kOrder, kSize, kStride, 0) : Tile::at(kOrder, kSize, 0, kStride);
      static_assert(kByTime || kStride % 8 == 0, "whole pads");
      if constexpr (kLoad) {
        copy_async<16>(tile + i * kApart, global, 16);
      } else {
        *reinterpret_cast<uint4*>(global) = *reinterpret_cast<const uint4*>(tile + i * kApart);
      }
    }
  }

  template <bool kLoad>
  __device__ __forceinline__ void move(char* tile, const TileSource& s, int tensor, int64_t t0,
                                       bool is_whole) const {
    if constexpr (kMovesWhole) {
      if (is_whole) return move_whole<kLoad>(tile, s, tensor, t0);
    } else if constexpr (!K::kAny) {
      if (s.order == TileOrder::kChannel) {
        move_steps<K, Tile, S::kThreads, kLoad>(tile, s, start(tensor), t0, a.p.length - t0,
                                                at.channels);
        return;
      }
    }
    move_any_tile<Tile, S::kThreads, kLoad>(tile,
                                            start(tensor) + t0 * s.stride_t * s.element_size(), s,
                                            clamp_int(a.p.length - t0, 0, S::kSteps), at.channels);
  }
  __device__ __forceinline__ void load_inputs(char* stage, int64_t t0) const {
    const bool is_whole = whole(t0);
    move<true>(stage + m.u, a.u, 0, t0, is_whole);
    move<true>(stage + m.delta, a.delta, 1, t0, is_whole);
    move<true>(stage + m.dout, a.dout, 2, t0, is_whole);
    if (a.p.z.data) move<true>(stage + m.z, a.z, 3, t0, is_whole);
  }
  __device__ __forceinline__ void store_outputs(char* stage, int64_t t0) const {
    const bool is_whole = whole(t0);
    move<false>(stage + m.u, a.du, 4, t0, is_whole);
    move<false>(stage + m.delta, a.ddelta, 5, t0, is_whole);
    if (a.p.z.data) move<false>(stage + m.z, a.dz, 6, t0, is_whole);
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

  // Starts to bring B or C of the states from `first` on.
  __device__ __forceinline__ void load(char* raw, const TileSource& s, int tensor, int64_t t0,
                                       int first) const {
    using States = typename M::StateTile;
    const int size = s.element_size();
    char* const from = start(tensor) + (first * s.stride_c + t0 * s.stride_t) * size;
    if (!kMovesWhole || s.order == TileOrder::kElements || t0 + S::kSteps > a.p.length ||
        first + S::kStates > n) {
      move_any_tile<States, S::kThreads, true>(
          raw, from, s, clamp_int(a.p.length - t0, 0, S::kSteps), min(n - first, S::kStates));
      return;
    }
    const bool by_time = s.order == TileOrder::kTime;
    const int64_t row_bytes = (by_time ? s.stride_c : s.stride_t) * size;
    const int per = 16 / size, pieces = (by_time ? S::kSteps : S::kStates) / per;
    for (int i = threadIdx.x; i < S::kStates * S::kSteps / per; i += S::kThreads) {
      const int row = i / pieces, at_piece = i % pieces * per;
      char* const to = raw + (by_time ? States::at(TileOrder::kTime, size, row, at_piece)
                                      : States::at(TileOrder::kChannel, size, at_piece, row));
      copy_async<16>(to, from + row * row_bytes + at_piece * size, 16);
    }
  }
  __device__ __forceinline__ void load_projections(int64_t t0, int first) const {
    if (!kGeneral || !a.p.constant_B) load(smem + m.B_raw, a.B, 7, t0, first);
    if (!kGeneral || !a.p.constant_C) load(smem + m.C_raw, a.C, 8, t0, first);
  }

  // B and C as fp32, steps innermost; what does not exist or is padding becomes 0.
  __device__ __forceinline__ void convert_projections(int64_t t0, int first) const {
    const int steps = clamp_int(a.p.length - t0, 0, S::kSteps), states = min(n - first, S::kStates);
    constexpr int kQuads = S::kStates * S::kSteps / 4;
#pragma unroll
    for (int i = threadIdx.x; i < 2 * kQuads; i += S::kThreads) {
      const bool of_C = i >= kQuads;
      if (kGeneral && (of_C ? a.p.constant_C : a.p.constant_B)) continue;
      const TileSource& s = of_C ? a.C : a.B;
      const char* const raw = smem + (of_C ? m.C_raw : m.B_raw);
      const int quad = of_C ? i - kQuads : i;
      float v[4];
      int state, t;
      if (s.order == TileOrder::kChannel) {
        state = quad % S::kStates, t = quad / S::kStates * 4;
#pragma unroll
        for (int k = 0; k < 4; ++k) v[k] = element(raw, s, state, t + k);
      } else {
        state = quad / (S::kSteps / 4), t = quad % (S::kSteps / 4) * 4;
        four_elements(v, raw, s, state, t);
      }
      if (state >= states || t + 4 > steps || (kGeneral && a.events.before)) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          bool here = state < states && t + k < steps;
          if (kGeneral && here && a.events.before) {
            here = a.events.before[at.row * a.p.length + t0 + t + k] != CudaScanEvents::kPadding;
          }
          if (!here) v[k] = 0.0f;
        }
      }
      *reinterpret_cast<float4*>(floats(m.projections) + state * M::kStatePitch +
                                 (of_C ? M::kRowPitch : 0) + t / 8 * M::kLanePitch + t % 8) =
          make_float4(v[0], v[1], v[2], v[3]);
    }
  }
  // Of a state and the lane's steps; `k` is the channel of a constant.
  __device__ __forceinline__ void read_projections(float (&B)[8], float (&C)[8], const float* from,
                                                   int k, int state) const {
    read_projection(B, a.p.constant_B, a.p.B, from, k, state);
    read_projection(C, a.p.constant_C, a.p.C, from + M::kRowPitch, k, state);
  }
  __device__ __forceinline__ void read_projection(float (&v)[8], bool constant, const TensorArg& x,
                                                  const float* from, int k, int state) const {
    if (kGeneral && constant) {
      const float value = load_at(x, at.channel + min(at.c + k, at.channels - 1), state);
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] = value;
    } else {
      read_eight(v, from);
    }
  }

  // The kernels of one dtype know that of B and C.
  __device__ __forceinline__ static DType projection_dtype(const TileSource& s) {
    return K::kAny ? s.dtype : K::dtype({});
  }
  __device__ __forceinline__ static float element(const char* raw, const TileSource& s, int state,
                                                  int t) {
    const DType dtype = projection_dtype(s);
    return load_float(raw + M::StateTile::at(s.order, dtype == DType::kFloat32 ? 4 : 2, state, t),
                      dtype, 0);
  }
  __device__ __forceinline__ static void four_elements(float (&v)[4], const char* raw,
                                                       const TileSource& s, int state, int t) {
    const DType dtype = projection_dtype(s);
    if (dtype == DType::kFloat32) {
      const float4 four =
          *reinterpret_cast<const float4*>(raw + M::StateTile::at(TileOrder::kTime, 4, state, t));
      v[0] = four.x, v[1] = four.y, v[2] = four.z, v[3] = four.w;
      return;
    }
    const uint2 words =
        *reinterpret_cast<const uint2*>(raw + M::StateTile::at(TileOrder::kTime, 2, state, t));
    const float2 low = unpack(words.x, dtype == DType::kBFloat16);
    const float2 high = unpack(words.y, dtype == DType::kBFloat16);
    v[0] = low.x, v[1] = low.y, v[2] = high.x, v[3] = high.y;
  }

  // Before anything is loaded: where the tensors are.
  __device__ void locate() const {
    if (threadIdx.x < M::kTensors) {
      const TileSource* const tensors[] = {&a.u,      &a.delta, &a.dout, &a.z, &a.du,
                                           &a.ddelta, &a.dz,    &a.B,    &a.C};
      const TileSource& s = *tensors[threadIdx.x];
      int64_t offset = at.row * s.stride_b + at.channel * s.stride_c;
      if (threadIdx.x == 7) offset = at.row * s.stride_b + at.group * a.p.B.stride[1];
      if (threadIdx.x == 8) offset = at.row * s.stride_b + at.group * a.p.C.stride[1];
      reinterpret_cast<char**>(smem + m.starts)[threadIdx.x] = s.data + offset * s.element_size();
    }
    if (threadIdx.x < 32) {
      write_columns(threadIdx.x, reinterpret_cast<float4*>(smem + m.columns));
    }
    __syncthreads();
  }

  // A, and what enters the segment at its end; sums start at 0. With kMap, instead, the map that
  // changes nothing.
  template <bool kMap>
  __device__ void begin() const {
    for (int c = threadIdx.x; c < S::kChannels; c += S::kThreads) {
      const int64_t channel = at.channel + min(c, at.channels - 1);
      floats(m.constants)[c] = of_channel(a.p.delta_bias, channel);
      floats(m.constants)[S::kChannels + c] = of_channel(a.p.D, channel);
    }
    *totals() = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    // Channels that do not exist keep these states.
    for (int i = at.channels * M::kEnterPitch + threadIdx.x; i < S::kChannels * M::kEnterPitch;
         i += S::kThreads) {
      floats(m.entering)[i] = floats(m.entering)[S::kChannels * M::kEnterPitch + i] = 0.0f;
    }
    for (int i = threadIdx.x; i < n * S::kChannels; i += S::kThreads) {
      const int c = i / n, s = i % n;
      const bool exists = c < at.channels;
      const int64_t index = (at.channel + c) * n + s, size = a.p.channels * n;
      float carry = 0.0f;
      if (!kMap && exists && at.segment + 1 < a.plan.segments) {
        carry = a.scratch.adjoint[(at.row * a.plan.segments + at.segment) * size + index];
      } else if (!kMap && exists && a.dfinal_state && !a.events.before) {
        carry = a.dfinal_state[at.row * size + index];
      }
      float* const record = floats(m.records) + s * M::kRecordPitch + c;
      record[0] = exists ? kLog2e * load_at(a.p.A, at.channel + c, s) : 0.0f;
      record[S::kChannels] = carry;
      record[2 * S::kChannels] = kMap ? 1.0f : 0.0f;
#pragma unroll
      for (int k = 3; k < M::kRecord; ++k) record[k * S::kChannels] = 0.0f;
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
    const float4 own = *totals();
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const float d = sum_steps(k ? own.y : own.x), bias = sum_steps(k ? own.w : own.z);
      if (at.i != 0 || at.c + k >= at.channels) continue;
      const int64_t to = parts * a.p.channels + at.channel + at.c + k;
      if (a.dD) a.dD[to] = d;
      if (a.ddelta_bias) a.ddelta_bias[to] = bias;
    }
  }

  __device__ __forceinline__ void read(float (&v)[2][8], const char* tile,
                                       const TileSource& s) const {
    read_steps<Tile, 2, 8>(v, tile, K::order(s), K::dtype(s), at.c, at.i * 8);
  }
  __device__ __forceinline__ void write(const float (&v)[2][8], char* tile,
                                        const TileSource& s) const {
    write_steps<Tile, 2, 8>(v, tile, K::order(s), K::dtype(s), at.c, at.i * 8);
  }

  // Calls f(channel, step) for the lane's 16.
  template <class F>
  __device__ __forceinline__ static void each(F&& f) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
#pragma unroll
      for (int i = 0; i < 8; ++i) f(k, i);
    }
  }

  // delta, delta * u and dy of the lane's steps. Steps that do not exist or are padding get 0,
  // which leaves states as they are and adds nothing to any sum.
  __device__ __forceinline__ void prepare(Lane& lane, const char* stage, int64_t t0) const {
    const int t = at.i * 8, exist = clamp_int(a.p.length - t0 - t, 0, 8);
    float u[2][8];
    read(lane.dy, stage + m.dout, a.dout);
    if (a.p.z.data) {
      float z[2][8];
      read(z, stage + m.z, a.z);
      each([&](int k, int i) { lane.dy[k][i] *= z[k][i] * sigmoid(z[k][i]); });
    }
    read(lane.delta, stage + m.delta, a.delta);
    const float2 bias = constants(0);
    each([&](int k, int i) { lane.delta[k][i] += k ? bias.y : bias.x; });
    if (a.p.delta_softplus) {
      each([&](int k, int i) { lane.delta[k][i] = softplus(lane.delta[k][i]); });
    }
    read(u, stage + m.u, a.u);
    lane.masked = exist < 8 ? ~0u << exist : 0u;
    if constexpr (kGeneral) read_events(lane, t0 + t, exist);
    each([&](int k, int i) { lane.du[k][i] = lane.delta[k][i] * u[k][i]; });
    if (lane.masked || at.c + 2 > at.channels) {
      each([&](int k, int i) {
        if (lane.masked >> i & 1 || at.c + k >= at.channels) {
          lane.delta[k][i] = lane.du[k][i] = lane.dy[k][i] = 0.0f;
        }
      });
    }
    lane.delta_sum[0] = lane.delta_sum[1] = 0.0f;
    each([&](int k, int i) {
      lane.delta_sum[k] += lane.delta[k][i];
      lane.ddu[k][i] = lane.ddelta[k][i] = lane.y[k][i] = 0.0f;
    });
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

  // After the states: the gradients of u, delta and z take the inputs' place in shared memory, each
  // lane's its own.
  __device__ __forceinline__ void finish(Lane& lane, char* stage) const {
    constexpr float kLn2 = 0.693147180559945309417f;  // A was in the base of exp2
    const float2 biases = constants(0), Ds = constants(1);
    const float bias[2] = {biases.x, biases.y}, D[2] = {Ds.x, Ds.y};
    float u[2][8], raw[2][8], dD[2] = {}, dbias[2] = {};
    read(u, stage + m.u, a.u);
    if (lane.masked) {
      each([&](int k, int i) {
        if (lane.masked >> i & 1) u[k][i] = lane.ddelta[k][i] = 0.0f;
      });
    }
    if (a.p.z.data) finish_z(lane, u, D, stage);
    read(raw, stage + m.delta, a.delta);
    each([&](int k, int i) {
      const float ddu = lane.ddu[k][i], x = raw[k][i] + bias[k];
      float ddelta = fmaf(ddu, u[k][i], kLn2 * lane.ddelta[k][i]);
      // The derivative of softplus; where nothing flows, x may be anything.
      if (a.p.delta_softplus) ddelta = ddelta == 0.0f || x > 20.0f ? ddelta : ddelta * sigmoid(x);
      dD[k] = fmaf(lane.dy[k][i], u[k][i], dD[k]);
      dbias[k] += ddelta;
      lane.ddelta[k][i] = ddelta;
      lane.ddu[k][i] = fmaf(ddu, lane.delta[k][i], D[k] * lane.dy[k][i]);
    });
    const float4 before = *totals();
    *totals() =
        make_float4(before.x + dD[0], before.y + dD[1], before.z + dbias[0], before.w + dbias[1]);
    write(lane.ddu, stage + m.u, a.du);
    write(lane.ddelta, stage + m.delta, a.ddelta);
  }

  __device__ __forceinline__ void finish_z(Lane& lane, const float (&u)[2][8], const float (&D)[2],
                                           char* stage) const {
    float z[2][8], dout[2][8];
    read(z, stage + m.z, a.z);
    read(dout, stage + m.dout, a.dout);
    each([&](int k, int i) {
      const float s = sigmoid(z[k][i]), y = fmaf(D[k], u[k][i], lane.y[k][i]);
      lane.y[k][i] = dout[k][i] * y * s * fmaf(z[k][i], 1.0f - s, 1.0f);
    });
    if (lane.masked) {
      each([&](int k, int i) {
        if (lane.masked >> i & 1) lane.y[k][i] = 0.0f;
      });
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
