// The forward selective scan for many channels: each lane walks the steps in order with a few
// states of one channel in registers, four lanes to a channel. No state is ever visited twice, and
// the exponentials, which bind here, are spread evenly over the multiply-adds.
#include "forward_launch.cuh"

namespace mamba {
namespace {

// How steps are prepared and finished: as in the parallel kernel, lanes own steps then.
using Shape = ScanShape<8, 2, 8, 16, 1, 3>;
constexpr int kSteps = Shape::kSteps, kChannels = Shape::kChannels;
constexpr int kLanes = 4;  // of a channel
static_assert(Shape::kWarpChannels * kLanes == 32, "a warp prepares what it walks");
// Words of shared memory; the odd multiples of 4 spread neighbouring rows over the banks.
constexpr int kStepPitch = 2 * kSteps + 4;                // (delta, delta u) of a channel
constexpr int kProjectionPitch = 2 * Shape::kStates + 4;  // (B, C) of a step
constexpr int kOutPitch = kSteps + 4;                     // C h of a channel

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
  // What does not exist becomes 0.
  __device__ __forceinline__ void mask(int steps, const int* before) {
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const int step = kByState ? t : t + q;
      const bool exists = step < steps && !(before && before[step] == CudaScanEvents::kPadding);
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
                                             const int* before) {
  constexpr int kCount = Shape::kStates * kSteps / 4 / Shape::kThreads;
  Quad<kSize, kByState> quads[kCount];
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    quads[k].place(threadIdx.x + k * Shape::kThreads);
    quads[k].read(tile, bf16);
  }
  if (steps < kSteps || before) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) quads[k].mask(steps, before);
  }
#pragma unroll
  for (int k = 0; k < kCount; ++k) quads[k].write(to);
}

template <class K>
__device__ __forceinline__ void convert_rows(float* to, const char* tile, const TileSource& s,
                                             int steps, const int* before) {
  const bool bf16 = K::dtype(s) == DType::kBFloat16, by_state = K::order(s) == TileOrder::kChannel;
  if (K::size(s) == 4) {
    if (by_state) {
      convert_rows<4, true>(to, tile, bf16, steps, before);
    } else {
      convert_rows<4, false>(to, tile, bf16, steps, before);
    }
  } else if (by_state) {
    convert_rows<2, true>(to, tile, bf16, steps, before);
  } else {
    convert_rows<2, false>(to, tile, bf16, steps, before);
  }
}

// Which of the kLanes lanes of its channel this thread is, and the channel's place in the block.
// Neighbouring threads walk neighbouring channels: those that read the same B and C then sit in the
// same quarter of a warp, which costs shared memory one access.
constexpr int kWarpRows = 32 / kLanes;
__device__ __forceinline__ int walking_lane() { return threadIdx.x % 32 / kWarpRows; }
__device__ __forceinline__ int walking_channel() {
  return threadIdx.x / 32 * kWarpRows + threadIdx.x % kWarpRows;
}

// What seq_idx says about the steps of a tile, and which groups of four steps it concerns.
struct TileEvents {
  int before[kSteps], after[kSteps];
  unsigned concerned;

  __device__ void fill(const ForwardArgs& a, int row, int64_t t0) {
    if (threadIdx.x == 0) concerned = 0;
    __syncthreads();
    if (threadIdx.x < kSteps) {
      const int t = threadIdx.x;
      const bool exists = t0 + t < a.p.length;
      const int64_t step = row * a.p.length + t0 + t;
      before[t] = exists ? a.events.before[step] : CudaScanEvents::kNothing;
      after[t] = exists ? a.events.after[step] : CudaScanEvents::kNothing;
      const bool starts = before[t] >= 0 || before[t] == CudaScanEvents::kFreshStart;
      if (starts || after[t] >= 0) atomicOr(&concerned, 1u << t / 4);
    }
  }
};

// A lane's states of one channel: kPer of them from `first`.
template <int kPer>
struct States {
  float h[kPer], A[kPer];  // A in the base of exp2_fast
  int first, count;        // count of them exist

  __device__ __forceinline__ void place(const ForwardArgs& a, int block) {
    first = block + walking_lane() * kPer;
    count = clamp_int(a.p.state_dim - first, 0, kPer);
  }
  __device__ __forceinline__ void load_A(const ForwardArgs& a, int channel) {
#pragma unroll
    for (int k = 0; k < kPer; ++k)
      A[k] = k < count ? kLog2e * load_at(a.p.A, channel, first + k) : 0.0f;
  }
  // To and from rows of state_dim states.
  __device__ __forceinline__ void load(const float* row) {
#pragma unroll
    for (int k = 0; k < kPer; ++k) h[k] = row && k < count ? row[first + k] : 0.0f;
  }
  __device__ __forceinline__ void store(float* row, bool aligned) const {
    if (aligned && count == kPer) {
      if constexpr (kPer == 4) {
        *reinterpret_cast<float4*>(row + first) = make_float4(h[0], h[1], h[2], h[3]);
      } else {
        *reinterpret_cast<float2*>(row + first) = make_float2(h[0], h[1]);
      }
      return;
    }
#pragma unroll
    for (int k = 0; k < kPer; ++k) {
      if (k < count) row[first + k] = h[k];
    }
  }
};

template <int kPer>
__device__ __forceinline__ void read_states(float (&v)[kPer], const float* from) {
  if constexpr (kPer == 4) {
    const float4 four = *reinterpret_cast<const float4*>(from);
    v[0] = four.x, v[1] = four.y, v[2] = four.z, v[3] = four.w;
  } else {
    const float2 two = *reinterpret_cast<const float2*>(from);
    v[0] = two.x, v[1] = two.y;
  }
}

// Returns C h of the lane's states after the step.
template <int kPer>
__device__ __forceinline__ float run_step(States<kPer>& s, float delta, float du,
                                          const float (&B)[kPer], const float (&C)[kPer]) {
  float sum = 0.0f;
#pragma unroll
  for (int k = 0; k < kPer; ++k) {
    s.h[k] = fmaf(exp2_fast(delta * s.A[k]), s.h[k], du * B[k]);
    sum = k ? fmaf(C[k], s.h[k], sum) : C[k] * s.h[k];
  }
  return sum;
}

// The sums of four steps over the four lanes of a channel; lane j returns that of step j.
__device__ __forceinline__ float join_lanes(const float (&v)[4], int j) {
  const bool odd = j & 1, high = j & 2;
  float first = odd ? v[1] : v[0], second = odd ? v[3] : v[2];
  first += __shfl_xor_sync(0xffffffffu, odd ? v[0] : v[1], kWarpRows);
  second += __shfl_xor_sync(0xffffffffu, odd ? v[2] : v[3], kWarpRows);
  const float kept = high ? second : first;
  return kept + __shfl_xor_sync(0xffffffffu, high ? first : second, 2 * kWarpRows);
}

// seq_idx and constant B and C, where a kernel serves them.
template <int kPer>
struct General {
  const TileEvents* events;
  float B[kPer], C[kPer];
  int channel;  // -1: it does not exist

  __device__ __forceinline__ void load(const ForwardArgs& a, const States<kPer>& s, int at,
                                       bool exists, const TileEvents* seen) {
    events = seen, channel = exists ? at : -1;
#pragma unroll
    for (int k = 0; k < kPer; ++k) {
      const int state = s.first + min(k, max(s.count, 1) - 1);
      const bool valid = k < s.count;
      B[k] = valid && a.p.constant_B ? load_at(a.p.B, at, state) : 0.0f;
      C[k] = valid && a.p.constant_C ? load_at(a.p.C, at, state) : 0.0f;
    }
  }

  // Replaces the state where a sequence starts, and hands it out where one ends.
  __device__ __forceinline__ void before_step(const ForwardArgs& a, States<kPer>& s, int t) const {
    const int id = events->before[t];
    if (id < 0 && id != CudaScanEvents::kFreshStart) return;
    const bool given = id >= 0 && channel >= 0;
    s.load(given ? a.p.initial_state + (id * a.p.channels + channel) * a.p.state_dim : nullptr);
  }
  __device__ __forceinline__ void after_step(const ForwardArgs& a, const States<kPer>& s,
                                             int t) const {
    const int id = events->after[t];
    if (id < 0 || channel < 0) return;
    s.store(a.p.final_state + (id * a.p.channels + channel) * a.p.state_dim, false);
  }
};

// What four steps of a walk read from shared memory.
template <int kPer>
struct FourSteps {
  float pairs[8], B[4][kPer], C[4][kPer];

  __device__ __forceinline__ void read(const float* steps, const float* rows, int t) {
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      const float4 four = *reinterpret_cast<const float4*>(steps + 2 * t + i);
      pairs[i] = four.x, pairs[i + 1] = four.y, pairs[i + 2] = four.z, pairs[i + 3] = four.w;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      read_states<kPer>(B[i], rows + (t + i) * kProjectionPitch);
      read_states<kPer>(C[i], rows + (t + i) * kProjectionPitch + Shape::kStates);
    }
  }
};

// Walks the tile: `steps` (delta, delta u) and `sums` are rows of the lane's channel, `rows` the
// lane's place in (B, C) of the first step. `add`: onto the sums of the states before. Reads run
// one group of four steps ahead and sums across lanes one behind, so that neither is waited for.
template <bool kGeneral, int kPer>
__device__ __forceinline__ void walk(States<kPer>& s, const ForwardArgs& a, const float* steps,
                                     const float* rows, float* sums, int exist, bool add,
                                     const General<kPer>& general) {
  const int j = walking_lane();
  float* to = sums + j;
  FourSteps<kPer> now;
  now.read(steps, rows, 0);
  float v[4] = {};
#pragma unroll 2
  for (int t = 0; t < exist; t += 4) {
    FourSteps<kPer> next;
    next.read(steps, rows, min(t + 4, kSteps - 4));
    float sum = join_lanes(v, j);
    if (add && t > 0) sum += to[t - 4];
    const bool concerned = kGeneral && general.events && general.events->concerned >> t / 4 & 1;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (kGeneral) {
#pragma unroll
        for (int k = 0; k < kPer; ++k) {
          now.B[i][k] = a.p.constant_B ? general.B[k] : now.B[i][k];
          now.C[i][k] = a.p.constant_C ? general.C[k] : now.C[i][k];
        }
        if (concerned) general.before_step(a, s, t + i);
      }
      v[i] = run_step<kPer>(s, now.pairs[2 * i], now.pairs[2 * i + 1], now.B[i], now.C[i]);
      if (concerned) general.after_step(a, s, t + i);
    }
    if (t > 0) to[t - 4] = sum;
    now = next;
  }
  const int last = (exist - 1) / 4 * 4;
  const float sum = join_lanes(v, j);
  to[last] = add ? to[last] + sum : sum;
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
  const Place<Shape> at = place<Shape>(a);
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
        convert_rows<K>(projections, smem + m.B_raw, a.B, exist, before);
      }
      if (!kGeneral || !a.p.constant_C) {
        convert_rows<K>(projections + Shape::kStates, smem + m.C_raw, a.C, exist, before);
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
    return launch_kernel(sequential_kernel<K, kGeneral, kPer>, a, Shape::kThreads, Memory(a).total,
                         stream);
  }
};

}  // namespace

bool sequential_fits(const ScanParams& p) {
  int device = 0, processors = 0, memory = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  cudaDeviceGetAttribute(&memory, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  const ForwardArgs a = forward_args<Shape>(p, CudaScanEvents());
  const int64_t blocks = p.batch * p.groups * a.blocks_per_group;
  return Memory(a).total <= memory && (2 * blocks >= processors || p.length <= 4 * kSteps);
}

const char* scan_forward_sequential(const ScanParams& p, const CudaScanEvents& events,
                                    cudaStream_t stream) {
  const ForwardArgs a = forward_args<Shape>(p, events);
  return p.state_dim <= 2 * kLanes ? launch_for<Launch<2>>(a, stream)
                                   : launch_for<Launch<4>>(a, stream);
}

}  // namespace mamba
