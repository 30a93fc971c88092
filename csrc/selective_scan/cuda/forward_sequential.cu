// The forward selective scan for many channels: each lane walks the steps in order with a few
// states of one channel in registers, four lanes to a channel. No state is ever visited twice, and
// the exponentials, which bind here, are spread evenly over the multiply-adds.
#include "forward_launch.cuh"
#include "forward_walk.cuh"

namespace mamba {
namespace sequential {
namespace {

struct Memory {
  int u, delta, z, B_raw, C_raw, steps, projections, out, sums, carry, total;
  __host__ __device__ Memory(const ForwardArgs& a) {
    using Tile = TileLayout<kChannels, Shape::G, Shape::L>;
    using StateTile = TileLayout<Shape::kStates, 1, kSteps>;
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
    steps = take(kChannels * kStepPitch * 4);
    // The output tile takes the place of B and C once a tile is walked.
    const int rows = kSteps * kProjectionPitch * 4, output = Tile::bytes(a.out.element_size());
    projections = out = take(rows > output ? rows : output);
    sums = take(kChannels * kOutPitch * 4);
    carry = take(a.p.state_dim > Shape::kStates
                     ? kChannels * (static_cast<int>(a.p.state_dim + 3) / 4 * 16)
                     : 0);
    total = at;
  }
};

// Four elements of a staged tile of B or C: neighbouring states of one step (kByState) or steps of
// one state.
template <int kSize, bool kByState>
struct Quad {
  int n, t;
  float v[4];

  __device__ __forceinline__ void place(int i) {
    n = kByState ? i % (Shape::kStates / 4) * 4 : i % Shape::kStates;
    t = kByState ? i / (Shape::kStates / 4) : i / Shape::kStates * 4;
  }
  __device__ __forceinline__ void read(const char* tile, bool bf16) {
    using StateTile = TileLayout<Shape::kStates, 1, kSteps>;
    constexpr auto kOrder = kByState ? TileOrder::kChannel : TileOrder::kTime;
    const char* from = tile + StateTile::at(kOrder, kSize, n, t);
    if constexpr (kSize == 4) {
      const float4 four = *reinterpret_cast<const float4*>(from);
      v[0] = four.x, v[1] = four.y, v[2] = four.z, v[3] = four.w;
    } else {
      const uint2 words = *reinterpret_cast<const uint2*>(from);
      const float2 low = unpack(words.x, bf16), high = unpack(words.y, bf16);
      v[0] = low.x, v[1] = low.y, v[2] = high.x, v[3] = high.y;
    }
  }
  // What does not exist becomes 0: also states, whose rows nothing was copied into, since lanes
  // walk all the states of their block.
  __device__ __forceinline__ void mask(int steps, int states, const int* before) {
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const int step = kByState ? t : t + q, state = kByState ? n + q : n;
      const bool exists =
          step < steps && state < states && !(before && before[step] == CudaScanEvents::kPadding);
      v[q] = exists ? v[q] : 0.0f;
    }
  }
  __device__ __forceinline__ void write(float* rows) const {
    float* const to = rows + t * kProjectionPitch + n;
    if constexpr (kByState) {
      *reinterpret_cast<float4*>(to) = make_float4(v[0], v[1], v[2], v[3]);
    } else {
#pragma unroll
      for (int q = 0; q < 4; ++q) to[q * kProjectionPitch] = v[q];
    }
  }
};

// B or C of a tile as fp32 into every row of `to`. Everything is read before anything is written,
// so that latencies overlap.
template <int kSize, bool kByState>
__device__ __forceinline__ void convert_rows(float* to, const char* tile, bool bf16, int steps,
                                             int states, const int* before) {
  constexpr int kCount = Shape::kStates * kSteps / 4 / Shape::kThreads;
  Quad<kSize, kByState> quads[kCount];
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    quads[k].place(threadIdx.x + k * Shape::kThreads);
    quads[k].read(tile, bf16);
  }
  if (steps < kSteps || states < Shape::kStates || before) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) quads[k].mask(steps, states, before);
  }
#pragma unroll
  for (int k = 0; k < kCount; ++k) quads[k].write(to);
}

template <class K>
__device__ __forceinline__ void convert_rows(float* to, const char* tile, const TileSource& s,
                                             int steps, int states, const int* before) {
  const bool bf16 = K::dtype(s) == DType::kBFloat16, by_state = K::order(s) == TileOrder::kChannel;
  if (K::size(s) == 4) {
    if (by_state) {
      convert_rows<4, true>(to, tile, bf16, steps, states, before);
    } else {
      convert_rows<4, false>(to, tile, bf16, steps, states, before);
    }
  } else if (by_state) {
    convert_rows<2, true>(to, tile, bf16, steps, states, before);
  } else {
    convert_rows<2, false>(to, tile, bf16, steps, states, before);
  }
}

template <bool kGeneral>
struct Events {
  __device__ void fill(const ForwardArgs&, int, int64_t) {}
  __device__ const TileEvents* get(const ForwardArgs&) const { return nullptr; }
};
template <>
struct Events<true> {
  TileEvents tile;
  __device__ void fill(const ForwardArgs& a, int row, int64_t t0) {
    if (a.events.before) tile.fill(a, row, t0);
  }
  __device__ const TileEvents* get(const ForwardArgs& a) const {
    return a.events.before ? &tile : nullptr;
  }
};

// Hands a lane's (delta, delta u) to the lanes that walk its channels.
__device__ __forceinline__ void write_pairs(const Lane<Shape>& lane, const Place<Shape>& at,
                                            float* steps) {
#pragma unroll
  for (int k = 0; k < Shape::C; ++k) {
    float* const row = steps + (at.c + k) * kStepPitch + at.g * Shape::L * 2;
#pragma unroll
    for (int i = 0; i < Shape::L; i += 2) {
      *reinterpret_cast<float4*>(row + 2 * i) =
          make_float4(lane.delta[k][i], lane.du[k][i], lane.delta[k][i + 1], lane.du[k][i + 1]);
    }
  }
}

__device__ __forceinline__ void add_sums(Lane<Shape>& lane, const Place<Shape>& at,
                                         const float* sums) {
#pragma unroll
  for (int k = 0; k < Shape::C; ++k) {
    const float* row = sums + (at.c + k) * kOutPitch + at.g * Shape::L;
#pragma unroll
    for (int i = 0; i < Shape::L; i += 4) {
      const float4 four = *reinterpret_cast<const float4*>(row + i);
      lane.y[k][i] += four.x, lane.y[k][i + 1] += four.y;
      lane.y[k][i + 2] += four.z, lane.y[k][i + 3] += four.w;
    }
  }
}

// The channel that a lane walks, and where its states lie in global and shared memory.
struct Walker {
  int c, channel;  // in the block; in the tensor (the last that exists, if it does not)
  bool exists, aligned;
  float* carry;

  template <int kPer>
  __device__ __forceinline__ void enter(const ForwardArgs& a, States<kPer>& s, int row, int block,
                                        bool first_tile, bool many) const {
    s.place(a, block);
    if (!first_tile && !many) return;
    s.load_A(a, channel);
    if (!first_tile) {
      s.load(carry);
    } else {
      const bool given = a.p.initial_state && !a.events.before;
      s.load(given ? a.p.initial_state + (row * a.p.channels + channel) * a.p.state_dim : nullptr);
    }
  }
  template <int kPer>
  __device__ __forceinline__ void keep_chunk(const ForwardArgs& a, const States<kPer>& s, int row,
                                             int64_t t0) const {
    if (!exists) return;
    const int64_t chunk = row * a.p.chunks + t0 / kCudaChunk;
    s.store(a.p.chunk_states + (chunk * a.p.channels + channel) * a.p.state_dim, aligned);
  }
  template <int kPer>
  __device__ __forceinline__ void leave(const ForwardArgs& a, const States<kPer>& s, int row,
                                        bool last_tile, bool many) const {
    if (many) s.store(carry, false);
    if (!last_tile || !exists || !a.p.final_state || a.events.before) return;
    s.store(a.p.final_state + (row * a.p.channels + channel) * a.p.state_dim, aligned);
  }
};

template <class K, bool kGeneral, int kPer>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocks)
    sequential_kernel(const __grid_constant__ ForwardArgs a) {
  using Tile = TileLayout<kChannels, Shape::G, Shape::L>;
  constexpr int kBlock = kLanes * kPer;  // states walked at once
  extern __shared__ __align__(16) char smem[];
  __shared__ BlockConstants<Shape> from;
  __shared__ Events<kGeneral> events;
  const Memory m(a);
  const Place<Shape> at = place<Shape>(a, blockIdx.x);
  from.fill(a, at);
  __syncthreads();
  const int n = static_cast<int>(a.p.state_dim);
  const bool many = n > kBlock;
  const auto words = [&](int offset) { return reinterpret_cast<float*>(smem + offset); };
  const auto load = [&](int offset, const TileSource& s, const char* data, int64_t t0) {
    load_tile<K, Tile, Shape::kThreads>(smem + offset, s, data, t0, a.p.length - t0, at.channels);
  };
  Walker walker;
  walker.c = walking_channel();
  walker.exists = walker.c < at.channels;
  walker.channel = at.channel + min(walker.c, at.channels - 1);
  walker.aligned = n % kPer == 0;
  walker.carry = words(m.carry) + walker.c * ((n + 3) / 4 * 4);
  float* const sums = words(m.sums);
  const float* const rows = words(m.projections) + walking_lane() * kPer;
  load(m.u, a.u, from.u, 0);
  load(m.delta, a.delta, from.delta, 0);
  load_projections<Shape, K, kGeneral>(a, from, smem, m, 0, 0);
  copies_commit();
  if (a.p.z.data) load(m.z, a.z, from.z, 0);
  copies_commit();
  Lane<Shape> lane;
  States<kPer> states;
  for (int64_t t0 = 0; t0 < a.p.length; t0 += kSteps) {
    const int exist = clamp_int(a.p.length - t0, 0, kSteps);
    const bool more = t0 + kSteps < a.p.length;
    for (int first = 0; first < n; first += kBlock) {
      // All but the newest copies (z, at a tile's first states) have arrived.
      if (first == 0) {
        copies_wait<1>();
      } else {
        copies_wait<0>();
      }
      __syncthreads();
      if (first == 0) {
        events.fill(a, at.row, t0);
        prepare_steps<Shape, K, kGeneral>(lane, a, at, smem, m, from, t0);
        write_pairs(lane, at, words(m.steps));
        if (kGeneral) __syncthreads();
      }
      const TileEvents* const seen = events.get(a);
      const int* const before = kGeneral && seen ? seen->before : nullptr;
      float* const projections = words(m.projections);
      if (!kGeneral || !a.p.constant_B) {
        convert_rows<K>(projections, smem + m.B_raw, a.B, exist, n - first, before);
      }
      if (!kGeneral || !a.p.constant_C) {
        convert_rows<K>(projections + Shape::kStates, smem + m.C_raw, a.C, exist, n - first,
                        before);
      }
      __syncthreads();
      const bool last = first + kBlock >= n;
      if (first == 0 && more) {
        load(m.u, a.u, from.u, t0 + kSteps);
        load(m.delta, a.delta, from.delta, t0 + kSteps);
      }
      if (!last || more) {
        load_projections<Shape, K, kGeneral>(a, from, smem, m, last ? t0 + kSteps : t0,
                                             last ? 0 : first + kBlock);
      }
      copies_commit();
      walker.enter(a, states, at.row, first, t0 == 0, many);
      if (a.every_chunk || t0 == 0) walker.keep_chunk(a, states, at.row, t0);
      General<kPer> general;
      if constexpr (kGeneral) general.load(a, states, walker.channel, walker.exists, seen);
      walk<kGeneral, kPer>(states, a, words(m.steps) + walker.c * kStepPitch, rows,
                           sums + walker.c * kOutPitch, exist, first > 0, general);
      walker.leave(a, states, at.row, !more, many);
    }
    // z has arrived; only the next tile's copies may be on their way.
    copies_wait<1>();
    __syncthreads();
    add_sums(lane, at, sums);
    finish_steps<Shape, K, kGeneral>(lane, a, at, smem, m);
    __syncthreads();
    if (a.p.z.data && more) load(m.z, a.z, from.z, t0 + kSteps);
    copies_commit();
    store_tile<K, Tile, Shape::kThreads>(smem + m.out, a.out, from.out, t0, a.p.length - t0,
                                         at.channels);
  }
}

template <int kPer>
struct Launch {
  template <class K, bool kGeneral>
  static const char* run(const ForwardArgs& a, cudaStream_t stream) {
    return launch_kernel<sequential_kernel<K, kGeneral, kPer>>(a, block_count(a), Shape::kThreads,
                                                               Memory(a).total, stream);
  }
};

}  // namespace
}  // namespace sequential

bool sequential_fits(const ScanParams& p) {
  using namespace sequential;
  return Memory(forward_args<Shape>(p, CudaScanEvents())).total <= shared_memory_limit();
}

const char* scan_forward_sequential(const ScanParams& p, const CudaScanEvents& events,
                                    cudaStream_t stream) {
  using namespace sequential;
  const ForwardArgs a = forward_args<Shape>(p, events);
  return p.state_dim <= 2 * kLanes ? launch_for<Launch<2>>(a, stream)
                                   : launch_for<Launch<4>>(a, stream);
}

}  // namespace mamba
