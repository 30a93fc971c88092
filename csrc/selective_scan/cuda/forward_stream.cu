// The forward selective scan for many channels of up to 16 states: as in forward_sequential.cu four
// lanes walk the steps of a channel in order, but what is done for each element (softplus, gate,
// output) goes in between, four steps ahead of the walk and four behind it, so that all kinds of
// instructions are spread evenly over time. A block meets at one barrier a tile.
#include "forward_launch.cuh"
#include "forward_stream.cuh"

namespace mamba {
namespace stream {
namespace {

// Of the channel that a lane walks.
struct Channel {
  float bias, D;
  float below, off;  // softplus(x) with 0 and 0; x itself with -inf and -inf
  bool gated;

  // As in math.cuh.
  __device__ __forceinline__ float time_step(float x) const {
    x += bias;
    return softplus(x, fast_exp2(fmaf(-kLog2e, fabsf(x), off)), below);
  }
};

// Two of a tile's steps, with what they read from shared memory.
template <int kPer>
struct Pair {
  float delta[2], du[2], B[2][kPer], C[2][kPer];

  template <class P>
  __device__ __forceinline__ void read(const float* from, const float* rows) {
    const float4 four = *reinterpret_cast<const float4*>(from);
    delta[0] = four.x, du[0] = four.y, delta[1] = four.z, du[1] = four.w;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      sequential::read_states<kPer>(B[i], rows + i * P::kPitch);
      sequential::read_states<kPer>(C[i], rows + i * P::kPitch + P::kStates);
    }
  }
  __device__ __forceinline__ void run(States<kPer>& s, float* v) const {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      v[k] = sequential::run_step<kPer>(s, delta[k], du[k], B[k], C[k]);
    }
  }
};

// A lane's way through a tile. Of every four steps it prepares and finishes the one that
// walking_lane() says.
template <class P, int kPer, bool kWhole>
struct Walk {
  static constexpr int kNext = P::Inputs::at(P::kOrder, P::kSize, 0, 4);  // bytes
  const Channel& of;
  const char* elements;  // the lane's first, of u
  float *pairs_to, *pairs_from;
  const float* rows;
  int exist, j;

  // (delta, delta u) for the four lanes of the channel. Returns u and the gate.
  __device__ __forceinline__ float2 prepare(const char* from, int slot, int t) const {
    const float u = P::load(from + P::kU);
    float delta = of.time_step(P::load(from + P::kDelta)), du = delta * u;
    if constexpr (!kWhole) {
      const bool exists = t + j < exist;
      delta = exists ? delta : 0.0f, du = exists ? du : 0.0f;
    }
    *reinterpret_cast<float2*>(pairs_to + slot * P::kPairFloats) = make_float2(delta, du);
    const float z = P::load(from + P::kZ), gate = z * fast_sigmoid(z);
    return make_float2(of.D * u, of.gated ? gate : 1.0f);
  }
  // `at`: of the element whose sum over states is y.
  __device__ __forceinline__ void finish(char* at, float y, float2 kept, bool valid) const {
    if (valid) P::store(at + P::kOut, (y + kept.x) * kept.y);
  }

  __device__ __forceinline__ void run(States<kPer>& s) const {
    constexpr int kAll = P::kSteps / 16;
    const int quads = kWhole ? kAll : (exist + 15) / 16;
    const char* from = elements;
    const float* row = rows;
    float2 u[4];
    float v[4] = {};
    sync_warp();  // the pairs of the tile before have been read
    u[2] = u[3] = make_float2(0.0f, 0.0f);
    u[0] = prepare(from, 0, 0);
    u[1] = prepare(from + kNext, 1, 4);
    sync_warp();
    Pair<kPer> now;
    now.template read<P>(pairs_from, row);
    char* done = const_cast<char*>(from) - kNext;
#pragma unroll 1
    for (int q = 0; q < quads; ++q) {
      // After the last steps, the first ones once more.
      const bool last = q == kAll - 1;
      const char* const next_from = last ? elements : from + 4 * kNext;
      const float* const next_row = last ? rows : row + 16 * P::kPitch;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 u_before = u[(i + 3) % 4];
        const float y = sequential::join_lanes(v, j);
        const int ahead = i + 2;
        u[ahead % 4] =
            prepare(ahead < 4 ? from + ahead * kNext : next_from + (ahead - 4) * kNext, ahead % 4,
                    last && ahead >= 4 ? 4 * (ahead - 4) : 16 * q + 4 * ahead);
        sync_warp();
        const float* const pair = pairs_from + i * P::kPairFloats;
        Pair<kPer> next;
        next.template read<P>(pair + 32, row + (4 * i + 2) * P::kPitch);
        now.run(s, v);
        now = next;
        next.template read<P>(i < 3 ? pair + P::kPairFloats : pairs_from,
                              i < 3 ? row + 4 * (i + 1) * P::kPitch : next_row);
        now.run(s, v + 2);
        finish(done + i * kNext, y, u_before, i > 0 || q > 0);
        now = next;
      }
      from = next_from, row = next_row, done += 4 * kNext;
    }
    finish(done, sequential::join_lanes(v, j), u[3], true);
  }
};

// A block's tiles between global and shared memory.
template <class K, int kPer>
struct Block {
  using P = Plan<K, kPer>;
  using Shape = typename P::Shape;
  using Layout = typename P::Projections;
  using InputShare = Share<P, typename P::Inputs, P::kSteps, kChannels>;
  using StateShare = Share<P, Layout, P::kSteps, P::kStates>;
  const ForwardArgs& a;
  const BlockConstants<Shape>& from;
  char* const smem;
  const int channels, tiles, whole;  // how many of the tiles are whole

  __device__ __forceinline__ Block(const ForwardArgs& args, const BlockConstants<Shape>& constants,
                                   char* shared, int count)
      : a(args),
        from(constants),
        smem(shared),
        channels(count),
        tiles(static_cast<int>((args.p.length + P::kSteps - 1) / P::kSteps)),
        whole(static_cast<int>(args.p.length / P::kSteps)) {}

  __device__ __forceinline__ char* place(int tile) const { return smem + (tile & 1) * P::kPlace; }
  // That exist.
  __device__ __forceinline__ int steps(int tile) const {
    return clamp_int(a.p.length - int64_t{tile} * P::kSteps, 0, P::kSteps);
  }
  __device__ __forceinline__ int states() const { return static_cast<int>(a.p.state_dim); }
  __device__ __forceinline__ bool whole_inputs(int tile) const {
    return tile < whole && channels == kChannels && a.aligned;
  }
  __device__ __forceinline__ bool whole_projections(int tile) const {
    return tile < whole && states() == P::kStates && a.aligned;
  }

  // Calls f(place in shared memory, tensor, its data) for the inputs, or for B and C.
  template <class F>
  __device__ __forceinline__ void each_input(int tile, F&& f) const {
    char* const at = place(tile);
    f(at + P::kU, a.u, from.u);
    f(at + P::kDelta, a.delta, from.delta);
    if (a.p.z.data) f(at + P::kZ, a.z, from.z);
  }
  template <class F>
  __device__ __forceinline__ void each_projection(int tile, F&& f) const {
    char* const at = place(tile);
    f(at + P::kB, a.B, from.B), f(at + P::kC, a.C, from.C);
  }

  template <class Layout, bool kLoad>
  __device__ __forceinline__ void move_part(int tile, char* at, const TileSource& s,
                                            const char* data, int rows) const {
    char* const global =
        const_cast<char*>(data) + int64_t{tile} * P::kSteps * s.stride_t * P::kSize;
    stream::move_part<P, Layout, kLoad>(at, global, s, steps(tile), rows);
  }
  __device__ __forceinline__ void load_inputs(int tile) const {
    if (whole_inputs(tile)) {
      each_input(tile, [&](char* to, const TileSource& s, const char* data) {
        InputShare::load(to, s, data, tile);
      });
    } else if (tile < tiles) {
      each_input(tile, [&](char* to, const TileSource& s, const char* data) {
        move_part<typename P::Inputs, true>(tile, to, s, data, channels);
      });
    }
  }
  __device__ __forceinline__ void load_projections(int tile) const {
    if (whole_projections(tile)) {
      each_projection(tile, [&](char* to, const TileSource& s, const char* data) {
        StateShare::load(to, s, data, tile);
      });
    } else if (tile < tiles) {
      each_projection(tile, [&](char* to, const TileSource& s, const char* data) {
        move_part<Layout, true>(tile, to, s, data, states());
      });
    }
  }
  __device__ __forceinline__ void store_outputs(int tile) const {
    if (whole_inputs(tile)) {
      InputShare::store(place(tile) + P::kOut, a.out, from.out, tile);
    } else {
      move_part<typename P::Inputs, false>(tile, place(tile) + P::kOut, a.out, from.out, channels);
    }
  }
  __device__ __forceinline__ void convert(int tile) const {
    if (tile < whole && states() == P::kStates) {
      convert_both<false>(tile, P::kSteps);
    } else if (tile < tiles) {
      convert_both<true>(tile, steps(tile));
    }
  }
  template <bool kMask>
  __device__ __forceinline__ void convert_both(int tile, int steps) const {
    const char* const at = place(tile);
    float* const rows = reinterpret_cast<float*>(place(tile) + P::kRows);
    convert_rows<P, kMask>(rows, at + P::kB, steps, states());
    convert_rows<P, kMask>(rows + P::kStates, at + P::kC, steps, states());
  }
};

template <class K, int kPer>
__global__ void __launch_bounds__(kThreads, 3)
    stream_kernel(const __grid_constant__ ForwardArgs a) {
  using P = Plan<K, kPer>;
  extern __shared__ __align__(16) char smem[];
  __shared__ BlockConstants<typename P::Shape> from;
  const auto at = place<typename P::Shape>(a, blockIdx.x);
  from.fill(a, at);
  __syncthreads();
  const Block<K, kPer> block(a, from, smem, at.channels);
  block.load_inputs(0);
  block.load_projections(0);
  block.load_projections(1);
  copies_commit();

  const int c = sequential::walking_channel(), j = sequential::walking_lane();
  const bool exists = c < at.channels;
  const int64_t channel = at.channel + min(c, at.channels - 1), n = a.p.state_dim;
  const float off = a.p.delta_softplus ? 0.0f : -INFINITY;
  const Channel of{from.bias[c], from.D[c], off, off, a.p.z.data != nullptr};
  States<kPer> states;
  states.place(a, 0);
  states.load_A(a, static_cast<int>(channel));
  const int64_t size = a.p.channels * n, in_row = channel * n;
  states.load(a.p.initial_state ? a.p.initial_state + at.row * size + in_row : nullptr);
  const bool aligned = n % kPer == 0;
  float* chunk = a.p.chunk_states + at.row * a.p.chunks * size + in_row;
  float* const pairs = reinterpret_cast<float*>(smem + P::kPairs) +
                       threadIdx.x / 32 * 4 * P::kPairFloats + sequential::channel_in_warp() * 4;
  float* const pairs_to = pairs + j / 2 * 32 + j % 2 * 2;
  const int element = P::Inputs::at(P::kOrder, P::kSize, c, j);

  copies_wait<0>();
  __syncthreads();
  block.convert(0);
#pragma unroll 1
  for (int tile = 0; tile < block.tiles; ++tile) {
    // The tile and B and C of the next one have arrived, the output of the one before is there.
    copies_wait<0>();
    __syncthreads();
    block.load_inputs(tile + 1);
    block.load_projections(tile + 2);
    copies_commit();
    if (tile > 0) block.store_outputs(tile - 1);
    block.convert(tile + 1);
    if (tile * P::kSteps % kCudaChunk == 0 && (a.every_chunk || tile == 0)) {
      if (exists) states.store(chunk, aligned);
      chunk += size;
    }
    char* const here = block.place(tile);
    const float* const rows = reinterpret_cast<const float*>(here + P::kRows) + j * kPer;
    if (tile < block.whole) {
      Walk<P, kPer, true>{of, here + element, pairs_to, pairs, rows, P::kSteps, j}.run(states);
    } else {
      const int steps = block.steps(tile);
      Walk<P, kPer, false>{of, here + element, pairs_to, pairs, rows, steps, j}.run(states);
    }
  }
  __syncthreads();
  block.store_outputs(block.tiles - 1);
  if (exists && a.p.final_state) states.store(a.p.final_state + at.row * size + in_row, aligned);
}

template <class K, int kPer>
const char* launch(const ForwardArgs& a, cudaStream_t stream) {
  return launch_kernel<stream_kernel<K, kPer>>(a, block_count(a), kThreads, Plan<K, kPer>::kTotal,
                                               stream);
}

// The kernels of kTime also serve kElements, which lies in shared memory in the same way.
template <class K>
bool all_serve(const ForwardArgs& a) {
  for (const TileSource* s : {&a.u, &a.delta, &a.z, &a.out, &a.B, &a.C}) {
    TileSource staged = *s;
    if (staged.order == TileOrder::kElements) staged.order = TileOrder::kTime;
    if (s->data && !K::fits(staged)) return false;
  }
  return true;
}

template <int kPer>
bool try_launch(const ScanParams& p, const CudaScanEvents& events, bool aligned,
                cudaStream_t stream, const char** error) {
  // Tensors may be staged differently by kinds; what matters here is the same for all of them.
  ForwardArgs a = forward_args<ScanShape<8, 2, 8, kLanes * kPer, 1, 3>>(p, events);
  for (const TileSource* s : {&a.u, &a.delta, &a.z, &a.out, &a.B, &a.C}) {
    if (!strides_fit(*s)) return false;
    if (s->data && s->order == TileOrder::kElements) a.aligned = false;
  }
  if (aligned && !a.aligned) return false;
#define MAMBA_TRY(dtype, order)                                                           \
  using K##dtype##order =                                                                 \
      TileKind<static_cast<int>(DType::k##dtype), static_cast<int>(TileOrder::k##order)>; \
  if (all_serve<K##dtype##order>(a)) return *error = launch<K##dtype##order, kPer>(a, stream), true
  MAMBA_TRY(BFloat16, Channel);
  MAMBA_TRY(BFloat16, Time);
  MAMBA_TRY(Float16, Channel);
  MAMBA_TRY(Float16, Time);
  MAMBA_TRY(Float32, Channel);
  MAMBA_TRY(Float32, Time);
#undef MAMBA_TRY
  return false;
}

}  // namespace
}  // namespace stream

bool try_forward_stream(const ScanParams& p, const CudaScanEvents& events, bool aligned,
                        cudaStream_t stream, const char** error) {
  if (events.before || p.constant_B || p.constant_C || p.state_dim > 16) return false;
  return p.state_dim <= 8 ? stream::try_launch<2>(p, events, aligned, stream, error)
                          : stream::try_launch<4>(p, events, aligned, stream, error);
}

}  // namespace mamba
