// The forward selective scan for many channels. The warps of a block take turns in time: a warp
// runs kItem states over its steps and hands them on to the next warp while it runs the next kItem.
// So all warps are busy with different states, every exponential is computed once, and nothing is
// summed over lanes: a lane is a channel.
#include <climits>

#include "forward_launch.cuh"
#include "forward_relay.cuh"

namespace mamba {
namespace relay {
namespace {

__device__ __forceinline__ void read_item(float (&v)[kItem], const float* from) {
  const float4 four = *reinterpret_cast<const float4*>(from);
  v[0] = four.x, v[1] = four.y, v[2] = four.z, v[3] = four.w;
}
__device__ __forceinline__ void write_item(float* to, const float (&v)[kItem]) {
  *reinterpret_cast<float4*>(to) = make_float4(v[0], v[1], v[2], v[3]);
}

// A lane's steps of its channel.
struct Steps {
  float delta[kSteps], du[kSteps], y[kSteps];

  // An item's states over them; `rows`: B of the first step and state, C kStaged floats behind it.
  template <class P, bool kOutput>
  __device__ __forceinline__ void run(float (&h)[kItem], const float (&A)[kItem],
                                      const float* rows) {
#pragma unroll
    for (int t = 0; t < kSteps; ++t) {
      float B[kItem], C[kItem];
      read_item(B, rows + t * P::kPitch);
#pragma unroll
      for (int k = 0; k < kItem; ++k) {
        h[k] = fmaf(decay_of(delta[t], A[k]), h[k], du[t] * B[k]);
      }
      if constexpr (kOutput) {
        read_item(C, rows + t * P::kPitch + kStaged);
#pragma unroll
        for (int k = 0; k < kItem; ++k) y[t] = fmaf(C[k], h[k], y[t]);
      }
    }
  }
};

// A warp's part of the work. kOutput: y is wanted, not the states alone.
template <class P, bool kOutput>
struct Runner {
  const ForwardArgs& a;
  const Place<Shape>& at;
  const BlockConstants<Shape>& from;
  const int length;             // of the segment
  char* const mine;             // the warp's shared memory
  const int warp;               // its turn
  float bias = 0.0f, D = 0.0f;  // of the lane's channel

  __device__ __forceinline__ int first_step(int tile) const { return tile * kTile + warp * kSteps; }
  // Of the warp's steps that exist.
  __device__ __forceinline__ int exist(int tile) const {
    return min(max(length - first_step(tile), 0), kSteps);
  }
  __device__ __forceinline__ static int row_bytes(const TileSource& s) {
    return static_cast<int>(P::kByTime ? s.stride_c : s.stride_t) * P::kSize;
  }
  __device__ __forceinline__ const char* start(const TileSource& s, const char* data, int tile,
                                               int first = 0) const {
    const int step = P::kByTime ? P::kSize : row_bytes(s);
    const int state = P::kByTime ? row_bytes(s) : P::kSize;
    return data + int64_t{first_step(tile)} * step + int64_t{first} * state;
  }
  __device__ __forceinline__ void load_input(int offset, const TileSource& s, const char* data,
                                             int tile, int steps) const {
    InputCopies<P>::load(mine + offset, start(s, data, tile), row_bytes(s),
                         P::kByTime ? at.channels : steps, P::kByTime ? steps : at.channels);
  }
  __device__ __forceinline__ void load_projection(int offset, const TileSource& s, const char* data,
                                                  int tile, int steps, int first) const {
    const int states = min(static_cast<int>(a.p.state_dim) - first, kStaged);
    StateCopies<P>::load(mine + offset, start(s, data, tile, first), row_bytes(s),
                         P::kByTime ? states : steps, P::kByTime ? steps : states);
  }
  __device__ __forceinline__ void load_steps(int tile) const {
    const int steps = exist(tile);
    if (steps == 0) return;
    load_input(P::kU, a.u, from.u, tile, steps);
    load_input(P::kDelta, a.delta, from.delta, tile, steps);
  }
  __device__ __forceinline__ void load_gate(int tile) const {
    if (!kOutput || !a.p.z.data) return;
    const int steps = exist(tile);
    if (steps > 0) load_input(P::kZ, a.z, from.z, tile, steps);
  }
  __device__ __forceinline__ void load_projections(int tile, int first) const {
    const int steps = exist(tile);
    if (steps == 0) return;
    load_projection(P::kB, a.B, from.B, tile, steps, first);
    if (kOutput) load_projection(P::kC, a.C, from.C, tile, steps, first);
  }
  __device__ __forceinline__ void convert_projections(int tile, int first) const {
    float* const rows = reinterpret_cast<float*>(mine + P::kRows);
    convert<P>(rows, mine + P::kB, start(a.B, from.B, tile, first), row_bytes(a.B));
    if (kOutput) {
      convert<P>(rows + kStaged, mine + P::kC, start(a.C, from.C, tile, first), row_bytes(a.C));
    }
  }
  __device__ __forceinline__ void read(float (&v)[kSteps], int offset, const TileSource& s,
                                       const char* data, int tile) const {
    P::read_steps(v, mine + offset, row_shift<P>(start(s, data, tile), row_bytes(s), lane_id()));
  }

  __device__ __forceinline__ void load_channel() {
    const int64_t channel = at.channel + min(lane_id(), at.channels - 1);
    const TensorArg &b = a.p.delta_bias, &skip = a.p.D;
    if (b.data) bias = load_float(b.data, b.dtype, channel * b.stride[0]);
    if (skip.data) D = load_float(skip.data, skip.dtype, channel * skip.stride[0]);
  }
  // softplus and the skip.
  __device__ __forceinline__ void prepare(Steps& s, int tile, int exist) const {
    read(s.delta, P::kDelta, a.delta, from.delta, tile);
    read(s.du, P::kU, a.u, from.u, tile);
    // softplus(x) with 0; x itself with -inf.
    const float off = a.p.delta_softplus ? 0.0f : -INFINITY;
#pragma unroll
    for (int t = 0; t < kSteps; ++t) {
      const float x = s.delta[t] + bias;
      s.delta[t] = softplus(x, fast_exp2(fmaf(-kLog2e, fabsf(x), off)), off);
    }
    if (exist < kSteps) {
#pragma unroll
      for (int t = 0; t < kSteps; ++t) s.delta[t] = t < exist ? s.delta[t] : 0.0f;
    }
#pragma unroll
    for (int t = 0; t < kSteps; ++t) {
      s.y[t] = D * s.du[t], s.du[t] *= s.delta[t];
      // Else the compiler multiplies anew for every item, to save registers.
      asm("" : "+f"(s.du[t]));
    }
  }
  // The gate, and the output to global memory.
  __device__ __forceinline__ void finish(Steps& s, int tile, int exist) const {
    char* const out = mine + P::kZ;
    if (a.p.z.data) {
      float z[kSteps];
      read(z, P::kZ, a.z, from.z, tile);
#pragma unroll
      for (int t = 0; t < kSteps; ++t) s.y[t] *= z[t] * fast_sigmoid(z[t]);
    }
    P::write_steps(out, s.y);
    sync_warp();
    char* const to = const_cast<char*>(start(a.out, from.out, tile));
    __builtin_assume(__isGlobal(to));
    InputCopies<P>::store(out, to, row_bytes(a.out), P::kByTime ? at.channels : exist,
                          P::kByTime ? exist : at.channels);
    sync_warp();
  }
};

// The states that enter the block and A into shared memory; a warp takes whole items, a lane a
// channel.
__device__ __forceinline__ void load_states(const ForwardArgs& a, const Place<Shape>& at,
                                            const Segment& segment, bool fresh, float* h, float* A,
                                            int items) {
  const int n = static_cast<int>(a.p.state_dim), c = lane_id();
  const bool exists = c < at.channels;
  const int64_t row = at.row * a.p.channels + at.channel + c;
  const float* const given = fresh ? nullptr : a.p.initial_state;
  for (int item = threadIdx.x / 32; item < items; item += kWarps) {
    float state[kItem] = {}, A_here[kItem];
    const int first = item * kItem;
#pragma unroll
    for (int k = 0; k < kItem; ++k) {
      const bool valid = exists && first + k < n;
      A_here[k] = valid ? kLog2e * load_at(a.p.A, at.channel + c, first + k) : 0.0f;
      if (valid && given) state[k] = given[row * n + first + k];
    }
    if (exists && !fresh) enter_segment<kItem>(a, segment, row, first, A_here, state);
    write_item(h + (item * kChannels + c) * kItem, state);
    write_item(A + (item * kChannels + c) * kItem, A_here);
  }
}
// A lane's states of an item to its channel's row.
__device__ __forceinline__ void keep_item(float* row, const float (&h)[kItem], int item, int n) {
  float* const to = row + item * kItem;
  if (n % kItem == 0) {
    write_item(to, h);
  } else {
#pragma unroll
    for (int k = 0; k < kItem; ++k) {
      if (item * kItem + k < n) to[k] = h[k];
    }
  }
}
__device__ __forceinline__ void store_states(const ForwardArgs& a, const Place<Shape>& at,
                                             const float* h, float* to, int items) {
  const int n = static_cast<int>(a.p.state_dim), c = lane_id();
  if (c >= at.channels) return;
  for (int item = threadIdx.x / 32; item < items; item += kWarps) {
    float v[kItem];
    read_item(v, h + (item * kChannels + c) * kItem);
    keep_item(to + c * n, v, item, n);
  }
}

// The states on their way through a block, as a warp sees them.
struct Handover {
  uint32_t take;  // the barrier of the first item that the warp waits for
  int to_next;    // from there to the next warp's, in bytes
  int items;
  float* h;        // the lane's channel, of the first item
  const float* A;  // likewise

  __device__ __forceinline__ Handover(float* states, const float* decays, const float* end,
                                      int warp, int count)
      : take(shared_address(end) + warp * count * 8),
        to_next((warp + 1 < kWarps ? 1 : 1 - kWarps) * count * 8),
        items(count),
        h(states + lane_id() * kItem),
        A(decays + lane_id() * kItem) {
    if (lane_id() == 0) {
      for (int i = 0; i < items; ++i) barrier_init(take + 8 * i, 1);
    }
  }
};

// The items from `first` on whose B and C are staged. `chunk`: where to keep what enters, or null.
template <class P, bool kOutput>
__device__ __forceinline__ void run_items(Steps& steps, const Handover& way, const float* rows,
                                          int phase, bool exist, int first, float* chunk, int n) {
  const int count = min(kItems, way.items - first);
  int place = first * kChannels * kItem;
  uint32_t token = way.take + 8 * first;
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    float A[kItem], h[kItem];
    read_item(A, way.A + place);
    barrier_wait(token, phase);
    if (exist) {
      read_item(h, way.h + place);
      if (chunk) keep_item(chunk, h, first + i, n);
      steps.run<P, kOutput>(h, A, rows + i * kItem);
      write_item(way.h + place, h);
    }
    barrier_arrive_warp(token + way.to_next, lane_id());
    place += kChannels * kItem, token += 8;
  }
}

// A warp's steps of one tile.
template <class P, bool kOutput>
__device__ __forceinline__ void run_tile(const Runner<P, kOutput>& run, Steps& steps,
                                         const Handover& way, int tile, float* chunk) {
  const int exist = run.exist(tile), n = static_cast<int>(run.a.p.state_dim);
  const float* const rows = reinterpret_cast<const float*>(run.mine + P::kRows);
  // The first warp is a phase ahead: the states that enter the block are there for it.
  const int phase = (tile + (run.warp == 0)) & 1;
  // All but the newest copies (z) have arrived.
  copies_wait<1>();
  sync_warp();
  run.prepare(steps, tile, exist);
  sync_warp();
  run.load_steps(tile + 1);
#pragma unroll 1
  for (int first = 0; first < way.items; first += kItems) {
    if (first > 0) {
      copies_wait<0>();
      sync_warp();
    }
    run.convert_projections(tile, first * kItem);
    sync_warp();
    const bool last = first + kItems >= way.items;
    run.load_projections(last ? tile + 1 : tile, last ? 0 : (first + kItems) * kItem);
    copies_commit();
    run_items<P, kOutput>(steps, way, rows, phase, exist > 0, first, chunk, n);
  }
  // z has arrived.
  copies_wait<1>();
  sync_warp();
  if (kOutput && exist > 0) run.finish(steps, tile, exist);
  run.load_gate(tile + 1);
  copies_commit();
}

// kOutput false: what a segment makes of the states alone.
template <class K, bool kOutput, int kBlocks>
__global__ void __launch_bounds__(kThreads, kBlocks)
    relay_kernel(const __grid_constant__ ForwardArgs a) {
  using P = Plan<K>;
  extern __shared__ __align__(16) char smem[];
  __shared__ BlockConstants<Shape> from;
  const int blocks = static_cast<int>(a.p.batch * a.p.groups * a.blocks_per_group);
  const auto at = place<Shape>(a, blockIdx.x % blocks);
  const Segment segment(a, blockIdx.x / blocks);
  from.fill_places(a, at, segment.first);
  const int n = static_cast<int>(a.p.state_dim), items = (n + kItem - 1) / kItem;
  // Blocks of one multiprocessor begin with different warps, as those have more to do.
  const int warp = (threadIdx.x / 32 + blockIdx.x + blockIdx.x / 4) % kWarps;
  float* const states = reinterpret_cast<float*>(smem + kWarps * P::kWarpBytes);
  float* const decays = states + items * kItem * kChannels;
  const Handover way(states, decays, decays + items * kItem * kChannels, warp, items);
  __syncthreads();
  Runner<P, kOutput> run{a, at, from, segment.steps, smem + warp * P::kWarpBytes, warp};
  run.load_steps(0);
  run.load_projections(0, 0);
  copies_commit();
  run.load_gate(0);
  copies_commit();
  run.load_channel();
  load_states(a, at, segment, !kOutput, states, decays, items);
  __syncthreads();

  const int tiles = (segment.steps + kTile - 1) / kTile;
  const int64_t row = at.row * a.p.channels + at.channel, rows = a.p.batch * a.p.channels;
  float* chunk = nullptr;
  if (kOutput && warp == 0 && lane_id() < at.channels && (a.every_chunk || segment.index == 0)) {
    const int64_t first = at.row * a.p.chunks + segment.first / kCudaChunk;
    chunk = a.p.chunk_states + (first * a.p.channels + at.channel + lane_id()) * n;
  }
  float delta_sum = 0.0f;
  Steps steps;
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    run_tile<P, kOutput>(run, steps, way, tile, chunk);
    if (chunk) chunk = a.every_chunk ? chunk + a.p.channels * n : nullptr;
    if (!kOutput && run.exist(tile) > 0) {
#pragma unroll
      for (int t = 0; t < kSteps; ++t) delta_sum += steps.delta[t];
    }
  }
  if constexpr (!kOutput) {
    copies_wait<0>();
    sync_warp();
    reinterpret_cast<float*>(run.mine)[lane_id()] = delta_sum;
  }
  __syncthreads();
  if constexpr (kOutput) {
    if (a.p.final_state && segment.index == a.segments.count - 1) {
      store_states(a, at, states, a.p.final_state + row * n, items);
    }
  } else {
    store_states(a, at, states, a.segments.states + (segment.index * rows + row) * n, items);
    if (static_cast<int>(threadIdx.x) < at.channels) {
      float sum = 0.0f;
      for (int w = 0; w < kWarps; ++w) {
        sum += reinterpret_cast<const float*>(smem + w * P::kWarpBytes)[threadIdx.x];
      }
      a.segments.sums[segment.index * rows + row + threadIdx.x] = sum;
    }
  }
}

template <class K>
int shared_bytes(const ScanParams& p) {
  return Plan<K>::total(static_cast<int>((p.state_dim + kItem - 1) / kItem));
}

// Four blocks a multiprocessor where there are as many, if that leaves enough registers; else
// three.
template <class K, bool kOutput>
const char* launch(const ForwardArgs& a, cudaStream_t stream) {
  const int64_t segments = kOutput ? a.segments.count : a.segments.count - 1;
  const int64_t blocks = block_count(a) * segments;
  constexpr bool kFew = kOutput && Plan<K>::kShifted;
  if constexpr (!kFew) {
    if (!kOutput || blocks > 3 * processor_count()) {
      return launch_kernel<relay_kernel<K, kOutput, 4>>(a, blocks, kThreads, shared_bytes<K>(a.p),
                                                        stream);
    }
  }
  if constexpr (kOutput) {
    return launch_kernel<relay_kernel<K, kOutput, 3>>(a, blocks, kThreads, shared_bytes<K>(a.p),
                                                      stream);
  }
}

// Rows of steps that begin anywhere, where not all begin at multiples of 16 bytes.
template <class K>
bool shifted_fits(const ForwardArgs& a) {
  for (const TileSource* s : {&a.u, &a.delta, &a.z, &a.out, &a.B, &a.C}) {
    if (s->data && (static_cast<int>(s->dtype) != K::kDType || s->stride_t != 1)) return false;
  }
  return true;
}

// Calls f<Kind>() with the kind of kernel that serves the tensors; false where there is none.
template <class F>
bool with_kind(const ForwardArgs& a, F&& f) {
  if (a.events.before || a.p.constant_B || a.p.constant_C || a.p.length >= INT_MAX - kTile) {
    return false;
  }
  for (const TileSource* s : {&a.u, &a.delta, &a.z, &a.out, &a.B, &a.C}) {
    if (!strides_fit(*s)) return false;
  }
#define MAMBA_TRY(dtype, order)                                                           \
  using K##dtype##order =                                                                 \
      TileKind<static_cast<int>(DType::k##dtype), static_cast<int>(TileOrder::k##order)>; \
  if (fits<K##dtype##order>(a)) return f(K##dtype##order())
  MAMBA_TRY(BFloat16, Channel);
  MAMBA_TRY(BFloat16, Time);
  MAMBA_TRY(Float16, Channel);
  MAMBA_TRY(Float16, Time);
  MAMBA_TRY(Float32, Channel);
  MAMBA_TRY(Float32, Time);
#undef MAMBA_TRY
#define MAMBA_TRY(dtype)                                                                   \
  using K##dtype =                                                                         \
      TileKind<static_cast<int>(DType::k##dtype), static_cast<int>(TileOrder::kElements)>; \
  if (shifted_fits<K##dtype>(a)) return f(K##dtype())
  MAMBA_TRY(BFloat16);
  MAMBA_TRY(Float16);
  MAMBA_TRY(Float32);
#undef MAMBA_TRY
  return false;
}

}  // namespace
}  // namespace relay

bool relay_fits(const ScanParams& p, const CudaScanEvents& events) {
  using namespace relay;
  const int memory = shared_memory_limit();
  const int fixed = static_cast<int>(sizeof(BlockConstants<Shape>));
  return with_kind(forward_args<Shape>(p, events),
                   [&](auto k) { return shared_bytes<decltype(k)>(p) + fixed <= memory; });
}

const char* scan_forward_relay(const ScanParams& p, const Segments& segments, bool output,
                               cudaStream_t stream) {
  using namespace relay;
  ForwardArgs a = forward_args<Shape>(p, CudaScanEvents());
  a.segments = segments;
  const char* error = nullptr;
  with_kind(a, [&](auto k) {
    error = output ? launch<decltype(k), true>(a, stream) : launch<decltype(k), false>(a, stream);
    return true;
  });
  return error;
}

}  // namespace mamba
