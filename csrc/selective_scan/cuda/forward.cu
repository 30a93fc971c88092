// The forward selective scan (Mamba, arXiv 2312.00752, algorithm 2), parallel over time inside a
// warp. A lane owns L consecutive steps of C channels and runs each state's recurrence over them
// twice: from 0, which gives the affine map of its steps; and, after a shuffle scan of these maps
// over the lanes of its channel, from the state that enters them. Nothing of size (b, d, l, n)
// leaves the registers, and every lane of the chip is busy however few channels there are.
#include <algorithm>

#include "forward_launch.cuh"
#include "forward_states.cuh"

namespace mamba {
namespace {

// Writes the gathered chunk states, [slot][channel][state], to (b, k, d, n).
template <class S>
__device__ __forceinline__ void store_chunk_states(const ForwardArgs& a, const Place<S>& at,
                                                   const float* slots, int64_t t0, int first,
                                                   int states) {
  using F = Forward<S>;
  constexpr int kQuads = S::kStates / 4;
  const int n = static_cast<int>(a.p.state_dim);
  int64_t chunk = at.row * a.p.chunks;
  int count = 1;
  if (a.every_chunk) {
    chunk += t0 / kCudaChunk;
    count = clamp_int((a.p.length - t0 + kCudaChunk - 1) / kCudaChunk, 0, F::kSlots);
  }
  for (int i = threadIdx.x; i < count * S::kChannels * kQuads; i += S::kThreads) {
    const int s = i % kQuads * 4, c = i / kQuads % S::kChannels, slot = i / (kQuads * S::kChannels);
    if (s >= states || c >= at.channels) continue;
    const float* from = slots + (slot * S::kChannels + c) * F::kSlotPitch + s;
    float* to = a.p.chunk_states + ((chunk + slot) * a.p.channels + at.channel + c) * n + first + s;
    if (n % 4 == 0) {
      *reinterpret_cast<float4*>(to) = *reinterpret_cast<const float4*>(from);
    } else {
      for (int k = 0; k < min(4, states - s); ++k) to[k] = from[k];
    }
  }
}

// The same where a tile is one chunk: what enters the tile, [state][channel].
template <class S>
__device__ __forceinline__ void store_carry(const ForwardArgs& a, const Place<S>& at,
                                            const float* carry, int64_t t0, int first, int states) {
  const int n = static_cast<int>(a.p.state_dim);
  const int64_t chunk = at.row * a.p.chunks + (a.every_chunk ? t0 / kCudaChunk : 0);
  float* const to = a.p.chunk_states + (chunk * a.p.channels + at.channel) * n + first;
#pragma unroll
  for (int i = threadIdx.x; i < S::kChannels * S::kStates; i += S::kThreads) {
    const int s = i % S::kStates, c = i / S::kStates;
    if (s < states && c < at.channels) to[c * n + s] = carry[(first + s) * S::kChannels + c];
  }
}

// The states that enter the block, and A in the base of fast_exp2.
template <class S>
__device__ __forceinline__ void load_states(const ForwardArgs& a, const Place<S>& at, float* A,
                                            float* carry) {
  const int n = static_cast<int>(a.p.state_dim);
  for (int i = threadIdx.x; i < n * S::kChannels; i += S::kThreads) {
    const int c = i / n, state = i % n;
    const bool exists = c < at.channels;
    float entering = 0.0f;
    if (exists && a.p.initial_state && !a.events.before) {
      entering = a.p.initial_state[(at.row * a.p.channels + at.channel + c) * n + state];
    }
    A[state * S::kChannels + c] = exists ? kLog2e * load_at(a.p.A, at.channel + c, state) : 0.0f;
    carry[state * S::kChannels + c] = entering;
  }
}

template <class S, class K, bool kGeneral>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks)
    scan_forward_kernel(const __grid_constant__ ForwardArgs a) {
  using F = Forward<S>;
  using Tile = typename F::Tile;
  extern __shared__ __align__(16) char smem[];
  const typename F::Memory m(a);
  const Place<S> at = place<S>(a, blockIdx.x);
  __shared__ BlockConstants<S> from;
  from.fill(a, at);
  __syncthreads();
  const int n = static_cast<int>(a.p.state_dim);
  const auto load = [&](int offset, const TileSource& s, const char* data, int64_t t0) {
    load_tile<K, Tile, S::kThreads>(smem + offset, s, data, t0, a.p.length - t0, at.channels);
  };
  load(m.u, a.u, from.u, 0);
  load(m.delta, a.delta, from.delta, 0);
  load_projections<S, K, kGeneral>(a, from, smem, m, 0, 0);
  copies_commit();
  if (a.p.z.data) load(m.z, a.z, from.z, 0);
  copies_commit();
  load_states<S>(a, at, reinterpret_cast<float*>(smem + m.A),
                 reinterpret_cast<float*>(smem + m.carry));
  float* const slots = reinterpret_cast<float*>(smem + m.slots);
  Lane<S> lane;
  for (int64_t t0 = 0; t0 < a.p.length; t0 += S::kSteps) {
    const int exist = clamp_int(a.p.length - t0, 0, S::kSteps);
    const bool keep = a.every_chunk || t0 == 0;
    for (int first = 0; first < n; first += S::kStates) {
      const int states = min(n - first, S::kStates);
      // All but the newest copies (z, at a tile's first states) have arrived.
      if (first == 0) {
        copies_wait<1>();
      } else {
        copies_wait<0>();
      }
      __syncthreads();
      if (first == 0) prepare_steps<S, K, kGeneral>(lane, a, at, smem, m, from, t0);
      float* const B = reinterpret_cast<float*>(smem + m.B);
      float* const C = reinterpret_cast<float*>(smem + m.C);
      if (!kGeneral || !a.p.constant_B) convert_projection<S, K>(B, smem + m.B_raw, a.B, exist);
      if (!kGeneral || !a.p.constant_C) convert_projection<S, K>(C, smem + m.C_raw, a.C, exist);
      __syncthreads();
      const bool last = first + S::kStates >= n;
      if (first == 0 && t0 + S::kSteps < a.p.length) {
        load(m.u, a.u, from.u, t0 + S::kSteps);
        load(m.delta, a.delta, from.delta, t0 + S::kSteps);
      }
      if (!last || t0 + S::kSteps < a.p.length) {
        load_projections<S, K, kGeneral>(a, from, smem, m, last ? t0 + S::kSteps : t0,
                                         last ? 0 : first + S::kStates);
      }
      copies_commit();
      if (F::kSlots == 0 && keep) {
        store_carry<S>(a, at, reinterpret_cast<const float*>(smem + m.carry), t0, first, states);
        __syncthreads();
      }
      const int lane_offset = at.g * F::kLanePitch, slot = at.g * S::L / kCudaChunk;
      StatePlace in;
      in.B = B + lane_offset, in.C = C + lane_offset;
      in.A = reinterpret_cast<const float*>(smem + m.A) + first * S::kChannels + at.c;
      in.carry = reinterpret_cast<float*>(smem + m.carry) + first * S::kChannels + at.c;
      in.entering = slots + (slot * S::kChannels + at.c) * F::kSlotPitch;
      in.keeps = keep && at.g * S::L % kCudaChunk == 0;
      const int64_t first_step = at.row * a.p.length + t0 + at.g * S::L;
      int s = 0;
#pragma unroll 1
      for (; s + S::kAtOnce <= states; s += S::kAtOnce) {
        run_states<S, kGeneral, S::kAtOnce>(lane, a, at, in, first_step, first + s);
        in.advance<S>(S::kAtOnce);
      }
#pragma unroll 1
      for (; s < states; ++s) {
        run_states<S, kGeneral, 1>(lane, a, at, in, first_step, first + s);
        in.advance<S>(1);
      }
      if (F::kSlots > 0 && keep) {
        __syncthreads();
        store_chunk_states<S>(a, at, slots, t0, first, states);
      }
    }
    // z has arrived; only the next tile's copies may be on their way.
    copies_wait<1>();
    __syncthreads();
    finish_steps<S, K, kGeneral>(lane, a, at, smem, m);
    __syncthreads();
    if (a.p.z.data && t0 + S::kSteps < a.p.length) load(m.z, a.z, from.z, t0 + S::kSteps);
    copies_commit();
    store_tile<K, Tile, S::kThreads>(smem + m.B, a.out, from.out, t0, a.p.length - t0, at.channels);
  }
  if (a.p.final_state && !a.events.before) {
    const float* carry = reinterpret_cast<const float*>(smem + m.carry);
    for (int i = threadIdx.x; i < n * at.channels; i += S::kThreads) {
      a.p.final_state[(at.row * a.p.channels + at.channel) * n + i] =
          carry[i % n * S::kChannels + i / n];
    }
  }
}

template <class S>
struct Launch {
  template <class K, bool kGeneral>
  static const char* run(const ForwardArgs& a, cudaStream_t stream) {
    return launch_kernel<scan_forward_kernel<S, K, kGeneral>>(
        a, block_count(a), S::kThreads, typename Forward<S>::Memory(a).total, stream);
  }
};

template <class S>
bool wide_fits(const ForwardArgs& a) {
  const int memory = typename Forward<S>::Memory(a).total + sizeof(BlockConstants<S>);
  return 10 * block_count(a) >= 9 * processor_count() && memory <= shared_memory_limit();
}

// The blocks of the kernels in which a lane walks a channel's steps in order.
int64_t walking_blocks(const ScanParams& p) {
  constexpr int64_t kChannels = 32;
  return p.batch * p.groups * ((p.group_channels() + kChannels - 1) / kChannels);
}

// Blocks share the length of long rows where their channels are too few for the GPU: two passes,
// the first for the states alone, take less time than its idle part wastes. Not in fp32: over
// thousands of steps the roundings of a walk's decays add up, those of the kernel below do not.
Segments segments_of(const ScanParams& p, const CudaScanEvents& events) {
  constexpr int64_t kLeastLength = 8192, kLeastSteps = 1024, kLeast = 4;
  Segments segments;
  if (p.length < kLeastLength || p.u.dtype == DType::kFloat32) return segments;
  const int64_t blocks = walking_blocks(p), processors = processor_count();
  const int64_t count = std::min(4 * processors / blocks, p.length / kLeastSteps);
  if (count < kLeast || !relay_fits(p, events)) return segments;
  const int64_t tiles = (p.length + kCudaChunk - 1) / kCudaChunk;
  segments.steps = static_cast<int>((tiles + count - 1) / count * kCudaChunk);
  segments.count = static_cast<int>((p.length + segments.steps - 1) / segments.steps);
  return segments;
}

}  // namespace

int64_t scan_forward_scratch(const ScanParams& p, const CudaScanEvents& events) {
  if (p.batch * p.channels * p.length == 0) return 0;
  return (segments_of(p, events).count - 1) * p.batch * p.channels * (p.state_dim + 1);
}

const char* scan_forward_cuda(const ScanParams& p, const CudaScanEvents& events, float* scratch,
                              void* stream_handle) {
  if (p.batch * p.channels * p.length == 0) return nullptr;
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  Segments segments = segments_of(p, events);
  if (segments.count > 1) {
    segments.states = scratch;
    segments.sums = scratch + (segments.count - 1) * p.batch * p.channels * p.state_dim;
    if (const char* error = scan_forward_relay(p, segments, false, stream)) return error;
    return scan_forward_relay(p, segments, true, stream);
  }
  if (2 * walking_blocks(p) >= processor_count() || p.length <= 4 * kCudaChunk) {
    // Over short rows, the time until states have come to the last warp of a relay counts.
    constexpr int64_t kShort = 512;
    const char* error = nullptr;
    const bool relay = relay_fits(p, events);
    if ((!relay || p.length <= kShort) && try_forward_stream(p, events, relay, stream, &error)) {
      return error;
    }
    if (relay) return scan_forward_relay(p, segments, true, stream);
    if (sequential_fits(p)) return scan_forward_sequential(p, events, stream);
  }
  // Twelve warps share the work on B and C, where that leaves no processor without a block.
  using Wide = ScanShape<32, 1, 16, 8, 1, 1, 12>;
  const ForwardArgs wide = forward_args<Wide>(p, events);
  if (wide_fits<Wide>(wide)) return launch_for<Launch<Wide>>(wide, stream);
  using Shape = ScanShape<32, 1, 16, 4, 1, 3>;
  return launch_for<Launch<Shape>>(forward_args<Shape>(p, events), stream);
}

}  // namespace mamba
