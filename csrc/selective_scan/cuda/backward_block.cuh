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
  using StateTile = typename M::StateTile;
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
  // dD of the lane's channel, then ddelta_bias.
  __device__ __forceinline__ float2* totals() const {
    return reinterpret_cast<float2*>(smem + m.totals) + at.thread();
  }
  __device__ __forceinline__ float constant(int which) const {
    return floats(m.constants)[which * S::kChannels + at.c()];
  }

  // Kept in shared memory rather than in registers, or in the slower memory of those that spill.
  __device__ __forceinline__ int number(int which) const {
    int v;
    asm volatile("ld.volatile.shared.s32 %0, [%1];"
                 : "=r"(v)
                 : "r"(shared_address(smem + m.numbers) + 4 * which));
    return v;
  }
  __device__ __forceinline__ int channels() const { return number(0); }
  __device__ __forceinline__ int tiles() const { return number(1); }
  __device__ __forceinline__ int64_t step_of(int k) const {
    return int64_t{number(2) - k} * S::kSteps;
  }

  __device__ __forceinline__ char* start(int tensor) const {
    return reinterpret_cast<char* const*>(smem + m.starts)[tensor];
  }
  // Whether a tile is whole and all tensors are aligned: then copies need no bounds.
  __device__ __forceinline__ bool whole(int64_t t0) const {
    return a.aligned && channels() == S::kChannels && t0 + S::kSteps <= a.p.length;
  }

  // The thread's share of whole tiles: 16 bytes of every kStride-th row, a row being the steps of a
  // channel or the channels of a step.
  struct Share {
    static constexpr bool kByTime = K::kOrder == static_cast<int>(TileOrder::kTime);
    static constexpr auto kOrder = kByTime ? TileOrder::kTime : TileOrder::kChannel;
    static constexpr int kSize = K::kDType == static_cast<int>(DType::kFloat32) ? 4 : 2;
    static constexpr int kPer = 16 / kSize, kPieces = (kByTime ? S::kSteps : S::kChannels) / kPer;
    static constexpr int kStride = S::kThreads / kPieces;  // rows of a pass
    static constexpr int kPasses = (kByTime ? S::kChannels : S::kSteps) / kStride;
    // A pass moves on by whole pads, so that its distance in the tile is a constant.
    static constexpr int kApart =
        kByTime ? Tile::at(kOrder, kSize, kStride, 0) : Tile::at(kOrder, kSize, 0, kStride);
    static_assert(kStride * kPieces == S::kThreads, "a pass covers whole rows");
    static_assert(kByTime || kStride % 16 == 0, "whole pads");
    int64_t row, first;  // in global memory
    int in_tile;

    __device__ __forceinline__ Share(int thread, int64_t t0) {
      const int r = thread / kPieces, f = thread % kPieces * kPer;
      in_tile = kByTime ? Tile::at(kOrder, kSize, r, f) : Tile::at(kOrder, kSize, f, r);
      row = kByTime ? r : t0 + r, first = kByTime ? t0 + f : f;
    }
    template <bool kLoad>
    __device__ __forceinline__ void move(char* tile, const TileSource& s, char* global) const {
      const int64_t stride = (kByTime ? s.stride_c : s.stride_t) * kSize;
      global += row * stride + first * kSize, tile += in_tile;
#pragma unroll
      for (int i = 0; i < kPasses; ++i, global += kStride * stride) {
        if constexpr (kLoad) {
          copy_async<16>(tile + i * kApart, global, 16);
        } else {
          *reinterpret_cast<uint4*>(global) = *reinterpret_cast<const uint4*>(tile + i * kApart);
        }
      }
    }
  };

  template <bool kLoad>
  __device__ __forceinline__ void move_any(char* tile, const TileSource& s, int tensor,
                                           int64_t t0) const {
    move_any_tile<Tile, S::kThreads, kLoad>(tile,
                                            start(tensor) + t0 * s.stride_t * s.element_size(), s,
                                            clamp_int(a.p.length - t0, 0, S::kSteps), channels());
  }
  // Calls f(tile, tensor, its number) for the inputs, or for the outputs that take their places.
  template <bool kLoad, class F>
  __device__ __forceinline__ void each_tile(char* stage, F&& f) const {
    f(stage + m.u, kLoad ? a.u : a.du, kLoad ? 0 : 4);
    f(stage + m.delta, kLoad ? a.delta : a.ddelta, kLoad ? 1 : 5);
    if (kLoad) f(stage + m.dout, a.dout, 2);
    if (a.p.z.data) f(stage + m.z, kLoad ? a.z : a.dz, kLoad ? 3 : 6);
  }
  template <bool kLoad>
  __device__ __forceinline__ void move_tiles(char* stage, int64_t t0) const {
    if constexpr (!K::kAny) {
      if (whole(t0)) {
        const Share share(at.thread(), t0);
        each_tile<kLoad>(stage, [&](char* tile, const TileSource& s, int tensor) {
          share.template move<kLoad>(tile, s, start(tensor));
        });
        return;
      }
    }
    each_tile<kLoad>(stage, [&](char* tile, const TileSource& s, int tensor) {
      move_any<kLoad>(tile, s, tensor, t0);
    });
  }
  __device__ __forceinline__ void load_inputs(char* stage, int64_t t0) const {
    move_tiles<true>(stage, t0);
  }
  __device__ __forceinline__ void store_outputs(char* stage, int64_t t0) const {
    move_tiles<false>(stage, t0);
  }

  // The states that enter the tile at t0, from `first` on.
  __device__ __forceinline__ void load_entering(int64_t t0, int first, int turn) const {
    const float* from = reinterpret_cast<const float*>(start(M::kTensors + 2)) +
                        t0 / kCudaChunk * a.p.channels * n + first;
    float* to = floats(m.entering) + turn * S::kChannels * M::kEnterPitch;
    constexpr int kQuads = S::kStates / 4;
#pragma unroll
    for (int i = at.thread(); i < S::kChannels * kQuads; i += S::kThreads) {
      const int c = i / kQuads, s = i % kQuads * 4;
      if (c >= channels() || first + s >= n) continue;
      const float* const source = from + int64_t{c} * n + s;
      float* const target = to + c * M::kEnterPitch + s;
      if (a.wide_states) {
        copy_async<16>(reinterpret_cast<char*>(target), reinterpret_cast<const char*>(source), 16);
      } else {
        for (int k = 0; k < 4 && first + s + k < n; ++k) target[k] = source[k];
      }
    }
  }

  // Starts to bring B or C of the states from `first` on, piece by piece of 16 bytes.
  __device__ __forceinline__ void load_any(char* raw, const TileSource& s, int tensor, int64_t t0,
                                           int first) const {
    move_any_tile<StateTile, S::kThreads, true>(
        raw, start(tensor) + (first * s.stride_c + t0 * s.stride_t) * s.element_size(), s,
        clamp_int(a.p.length - t0, 0, S::kSteps), min(n - first, S::kStates));
  }
  template <int kSize>
  __device__ __forceinline__ void load_piece(char* raw, const TileSource& s, int tensor, int piece,
                                             int64_t t0, int first) const {
    constexpr int kPer = 16 / kSize, kRow = S::kSteps / kPer, kColumn = S::kStates / kPer;
    const bool by_time = s.order == TileOrder::kTime;
    const int row = by_time ? piece / kRow : piece / kColumn;
    const int at_piece = (by_time ? piece % kRow : piece % kColumn) * kPer;
    const int64_t state = first + (by_time ? row : at_piece), t = t0 + (by_time ? at_piece : row);
    char* const to = raw + (by_time ? StateTile::at(TileOrder::kTime, kSize, row, at_piece)
                                    : StateTile::at(TileOrder::kChannel, kSize, at_piece, row));
    copy_async<16>(to, start(tensor) + (state * s.stride_c + t * s.stride_t) * kSize, 16);
  }
  __device__ __forceinline__ void load_projections(int64_t t0, int first) const {
    if constexpr (!K::kAny) {
      const bool pieces = a.B.order != TileOrder::kElements && a.C.order != TileOrder::kElements;
      if (pieces && t0 + S::kSteps <= a.p.length && first + S::kStates <= n) {
        constexpr int kSize = Share::kSize, kPieces = S::kStates * S::kSteps * kSize / 16;
#pragma unroll
        for (int i = at.thread(); i < 2 * kPieces; i += S::kThreads) {
          const bool of_C = i >= kPieces;
          load_piece<kSize>(smem + (of_C ? m.C_raw : m.B_raw), of_C ? a.C : a.B, of_C ? 8 : 7,
                            i % kPieces, t0, first);
        }
        return;
      }
    }
    if (!kGeneral || !a.p.constant_B) load_any(smem + m.B_raw, a.B, 7, t0, first);
    if (!kGeneral || !a.p.constant_C) load_any(smem + m.C_raw, a.C, 8, t0, first);
  }

  // B and C as fp32, steps innermost; what does not exist or is padding becomes 0. A thread takes
  // eight steps of a state.
  __device__ __forceinline__ void convert_projections(int64_t t0, int first) const {
    const int steps = clamp_int(a.p.length - t0, 0, S::kSteps), states = min(n - first, S::kStates);
    constexpr int kRow = S::kSteps / 8, kPieces = S::kStates * kRow;
#pragma unroll
    for (int i = at.thread(); i < 2 * kPieces; i += S::kThreads) {
      const bool of_C = i >= kPieces;
      if (kGeneral && (of_C ? a.p.constant_C : a.p.constant_B)) continue;
      const TileSource& s = of_C ? a.C : a.B;
      const char* const raw = smem + (of_C ? m.C_raw : m.B_raw);
      const bool by_channel = s.order == TileOrder::kChannel;
      const int piece = i % kPieces, state = by_channel ? piece % S::kStates : piece / kRow;
      const int t = (by_channel ? piece / S::kStates : piece % kRow) * 8;
      float v[8];
      if (by_channel) {
#pragma unroll
        for (int k = 0; k < 8; ++k) v[k] = element(raw, s, state, t + k);
      } else {
        eight_elements(v, raw, s, state, t);
      }
      if (state >= states || t + 8 > steps || (kGeneral && a.events.before)) {
        clear_absent(v, state < states ? steps - t : 0, t0 + t);
      }
      float4* const to = reinterpret_cast<float4*>(floats(m.projections) + state * M::kStatePitch +
                                                   (of_C ? M::kRowPitch : 0) +
                                                   t / S::L * M::kLanePitch + t % S::L);
      to[0] = make_float4(v[0], v[1], v[2], v[3]);
      to[1] = make_float4(v[4], v[5], v[6], v[7]);
    }
  }
  __device__ __forceinline__ void clear_absent(float (&v)[8], int exist, int64_t t) const {
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      bool here = k < exist;
      if (kGeneral && here && a.events.before) {
        here = a.events.before[at.row * a.p.length + t + k] != CudaScanEvents::kPadding;
      }
      if (!here) v[k] = 0.0f;
    }
  }
  // Four of the lane's steps of B or C (`x`).
  __device__ __forceinline__ void read_projection(float (&v)[4], bool constant, const TensorArg& x,
                                                  const float* from, int state) const {
    if (kGeneral && constant) {
      v[0] = load_at(x, at.channel + min(at.c(), channels() - 1), state);
      v[1] = v[2] = v[3] = v[0];
    } else {
      read_four(v, from);
    }
  }
  // The q-th four steps of B (0) or C (1) of a state.
  __device__ __forceinline__ void read_projection(int which, int q, float (&v)[4],
                                                  const float* from, int state) const {
    if (which == 0) {
      read_projection(v, a.p.constant_B, a.p.B, from + 4 * q, state);
    } else {
      read_projection(v, a.p.constant_C, a.p.C, from + M::kRowPitch + 4 * q, state);
    }
  }

  // The kernels of one dtype know that of B and C.
  __device__ __forceinline__ static DType projection_dtype(const TileSource& s) {
    return K::kAny ? s.dtype : K::dtype({});
  }
  __device__ __forceinline__ static float element(const char* raw, const TileSource& s, int state,
                                                  int t) {
    const DType dtype = projection_dtype(s);
    return load_float(raw + StateTile::at(s.order, dtype == DType::kFloat32 ? 4 : 2, state, t),
                      dtype, 0);
  }
  __device__ __forceinline__ static void eight_elements(float (&v)[8], const char* raw,
                                                        const TileSource& s, int state, int t) {
    const DType dtype = projection_dtype(s);
    if (dtype == DType::kFloat32) {
      const float4* const from =
          reinterpret_cast<const float4*>(raw + StateTile::at(TileOrder::kTime, 4, state, t));
      const float4 low = from[0], high = from[1];
      v[0] = low.x, v[1] = low.y, v[2] = low.z, v[3] = low.w;
      v[4] = high.x, v[5] = high.y, v[6] = high.z, v[7] = high.w;
      return;
    }
    const uint4 eight =
        *reinterpret_cast<const uint4*>(raw + StateTile::at(TileOrder::kTime, 2, state, t));
    const uint32_t words[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float2 two = unpack(words[k], dtype == DType::kBFloat16);
      v[2 * k] = two.x, v[2 * k + 1] = two.y;
    }
  }

  // Before anything is loaded: where the tensors are.
  __device__ void locate() const {
    if (at.thread() < M::kTensors) {
      const TileSource* const tensors[] = {&a.u,      &a.delta, &a.dout, &a.z, &a.du,
                                           &a.ddelta, &a.dz,    &a.B,    &a.C};
      const TileSource& s = *tensors[at.thread()];
      int64_t offset = at.row * s.stride_b + at.channel * s.stride_c;
      if (at.thread() == 7) offset = at.row * s.stride_b + at.group * a.p.B.stride[1];
      if (at.thread() == 8) offset = at.row * s.stride_b + at.group * a.p.C.stride[1];
      reinterpret_cast<char**>(smem + m.starts)[at.thread()] = s.data + offset * s.element_size();
    } else if (at.thread() < M::kStarts) {
      const int64_t sums = (at.row * a.plan.slices + at.slice) * n * a.plan.padded_length;
      const int64_t states = (at.row * a.p.chunks * a.p.channels + at.channel) * n;
      const int which = at.thread() - M::kTensors;
      const float* const to = which == 0   ? a.dC + sums
                              : which == 1 ? a.dB + sums
                                           : a.p.chunk_states + states;
      reinterpret_cast<const float**>(smem + m.starts)[at.thread()] = to;
    }
    if (at.thread() == 0) {
      const int64_t first = at.segment * a.plan.segment_tiles;
      const int64_t tiles = min(a.plan.segment_tiles, a.tiles - first);
      int* const numbers = reinterpret_cast<int*>(smem + m.numbers);
      numbers[0] = at.channels, numbers[1] = static_cast<int>(tiles);
      numbers[2] = static_cast<int>(first + tiles - 1);
    }
    __syncthreads();
  }

  // A, and what enters the segment at its end; sums start at 0. With kMap, instead, the map that
  // changes nothing.
  template <bool kMap>
  __device__ void begin() const {
    for (int c = at.thread(); c < S::kChannels; c += S::kThreads) {
      const int64_t channel = at.channel + min(c, at.channels - 1);
      floats(m.constants)[c] = of_channel(a.p.delta_bias, channel);
      floats(m.constants)[S::kChannels + c] = of_channel(a.p.D, channel);
    }
    *totals() = make_float2(0.0f, 0.0f);
    // Channels that do not exist keep these states.
    for (int i = at.channels * M::kEnterPitch + at.thread(); i < S::kChannels * M::kEnterPitch;
         i += S::kThreads) {
      floats(m.entering)[i] = floats(m.entering)[S::kChannels * M::kEnterPitch + i] = 0.0f;
    }
    for (int i = at.thread(); i < n * S::kChannels; i += S::kThreads) {
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

  using Steps = float[S::L];
  __device__ __forceinline__ void read(Steps& v, const char* tile, const TileSource& s) const {
    read_steps<Tile, 1, S::L>(reinterpret_cast<float (&)[1][S::L]>(v), tile, K::order(s),
                              K::dtype(s), at.c(), at.i() * S::L);
  }
  __device__ __forceinline__ void write(const Steps& v, char* tile, const TileSource& s) const {
    write_steps<Tile, 1, S::L>(reinterpret_cast<const float (&)[1][S::L]>(v), tile, K::order(s),
                               K::dtype(s), at.c(), at.i() * S::L);
  }

  // Calls f(step) for the lane's.
  template <class F>
  __device__ __forceinline__ static void each(F&& f) {
#pragma unroll
    for (int i = 0; i < S::L; ++i) f(i);
  }

  // delta, delta * u and dy of the lane's steps. Steps that do not exist or are padding get 0,
  // which leaves states as they are and adds nothing to any sum.
  __device__ __forceinline__ void prepare(Lane& lane, const char* stage, int64_t t0) const {
    const int t = at.i() * S::L, exist = clamp_int(a.p.length - t0 - t, 0, S::L);
    Steps u;
    read(lane.dy, stage + m.dout, a.dout);
    if (a.p.z.data) {
      Steps z;
      read(z, stage + m.z, a.z);
      each([&](int i) { lane.dy[i] *= z[i] * fast_sigmoid(z[i]); });
    }
    Steps delta;
    read(delta, stage + m.delta, a.delta);
    const float bias = constant(0);
    each([&](int i) { delta[i] += bias; });
    if (a.p.delta_softplus) each([&](int i) { delta[i] = softplus(delta[i]); });
    read(u, stage + m.u, a.u);
    lane.masked = exist < S::L ? ~0u << exist : 0u;
    if constexpr (kGeneral) read_events(lane, t0 + t, exist);
    each([&](int i) { lane.du[i] = delta[i] * u[i]; });
    const unsigned absent = at.c() < channels() ? lane.masked : ~0u;
    if (absent) {
      each([&](int i) {
        if (absent >> i & 1) delta[i] = lane.du[i] = lane.dy[i] = 0.0f;
      });
    }
    lane.delta_sum = 0.0f;
    each([&](int i) {
      lane.delta_sum += delta[i];
      lane.ddu[i] = lane.ddelta[i] = lane.y[i] = 0.0f;
    });
    float4* const to = reinterpret_cast<float4*>(smem + m.deltas) + at.thread();
#pragma unroll
    for (int q = 0; q < S::L / 4; ++q) {
      to[q * S::kThreads] =
          make_float4(delta[4 * q], delta[4 * q + 1], delta[4 * q + 2], delta[4 * q + 3]);
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

  // After the states: the gradients of u, delta and z take the inputs' place in shared memory, each
  // lane's its own.
  __device__ __forceinline__ void finish(Lane& lane, char* stage) const {
    constexpr float kLn2 = 0.693147180559945309417f;  // A was in the base of exp2
    const float bias = constant(0), D = constant(1);
    Steps u, raw, delta;
    float dD = 0.0f, dbias = 0.0f;
    read(u, stage + m.u, a.u);
    if (lane.masked) {
      each([&](int i) {
        if (lane.masked >> i & 1) u[i] = lane.ddelta[i] = 0.0f;
      });
    }
    if (a.p.z.data) finish_z(lane, u, D, stage);
    read(raw, stage + m.delta, a.delta);
    if (lane.masked) {
      each([&](int i) { raw[i] = lane.masked >> i & 1 ? 0.0f : raw[i]; });
    }
    const float* const deltas = floats(m.deltas) + at.thread() * 4;
#pragma unroll
    for (int q = 0; q < S::L / 4; ++q) {
      float four[4];
      read_four(four, deltas + q * S::kThreads * 4);
#pragma unroll
      for (int k = 0; k < 4; ++k) delta[4 * q + k] = four[k];
    }
    each([&](int i) {
      const float ddu = lane.ddu[i], x = raw[i] + bias;
      float ddelta = fmaf(ddu, u[i], kLn2 * lane.ddelta[i]);
      // The derivative of softplus.
      if (a.p.delta_softplus) ddelta *= fast_sigmoid(x);
      dD = fmaf(lane.dy[i], u[i], dD);
      dbias += ddelta;
      lane.ddelta[i] = ddelta;
      lane.ddu[i] = fmaf(ddu, delta[i], D * lane.dy[i]);
    });
    const float2 before = *totals();
    *totals() = make_float2(before.x + dD, before.y + dbias);
    write(lane.ddu, stage + m.u, a.du);
    write(lane.ddelta, stage + m.delta, a.ddelta);
  }

  __device__ __forceinline__ void finish_z(Lane& lane, const Steps& u, float D, char* stage) const {
    Steps z, dout;
    read(z, stage + m.z, a.z);
    read(dout, stage + m.dout, a.dout);
    each([&](int i) {
      const float s = fast_sigmoid(z[i]), y = fmaf(D, u[i], lane.y[i]);
      lane.y[i] = dout[i] * y * s * fmaf(z[i], 1.0f - s, 1.0f);
    });
    if (lane.masked) {
      each([&](int i) {
        if (lane.masked >> i & 1) lane.y[i] = 0.0f;
      });
    }
    write(lane.y, stage + m.z, a.dz);
  }
};

}  // namespace mamba
