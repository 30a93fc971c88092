// The forward selective scan (Mamba, arXiv 2312.00752, algorithm 2), parallel over time inside a
// warp. A lane owns L consecutive steps of C channels and runs each state's recurrence over them
// twice: from 0, which gives the affine map of its steps; and, after a shuffle scan of these maps
// over the lanes of its channel, from the state that enters them. Nothing of size (b, d, l, n)
// leaves the registers, and every lane of the chip is busy however few channels there are.
#include <cuda_runtime.h>

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

template <class S, class K, bool kGeneral>
__device__ __forceinline__ void finish_steps(Lane<S>& lane, const ForwardArgs& a,
                                             const Place<S>& at, char* smem,
                                             const typename Forward<S>::Memory& m) {
  using Tile = typename Forward<S>::Tile;
  const int t = at.g * S::L;
  if (a.p.z.data) {
    float z[S::C][S::L];
    read_steps<Tile, S::C, S::L>(z, smem + m.z, K::order(a.z), K::dtype(a.z), at.c, t);
#pragma unroll
    for (int k = 0; k < S::C; ++k) {
#pragma unroll
      for (int i = 0; i < S::L; ++i) lane.y[k][i] *= z[k][i] * sigmoid(z[k][i]);
    }
  }
  if constexpr (kGeneral) {
    if (lane.padding) {
#pragma unroll
      for (int k = 0; k < S::C; ++k) {
#pragma unroll
        for (int i = 0; i < S::L; ++i) {
          lane.y[k][i] = lane.padding >> i & 1 ? 0.0f : lane.y[k][i];
        }
      }
    }
  }
  write_steps<Tile, S::C, S::L>(lane.y, smem + m.B, K::order(a.out), K::dtype(a.out), at.c, t);
}

// The states that enter the block, and A in the base of exp2_fast.
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
__device__ __forceinline__ void load_projections(const ForwardArgs& a,
                                                 const BlockConstants<S>& from, char* smem,
                                                 const typename Forward<S>::Memory& m, int64_t t0,
                                                 int first_state) {
  using StateTile = typename Forward<S>::StateTile;
  const int states = min(static_cast<int>(a.p.state_dim) - first_state, S::kStates);
  if (!kGeneral || !a.p.constant_B) {
    load_tile<K, StateTile, S::kThreads>(smem + m.B_raw, a.B,
                                         from.B + first_state * a.B.stride_c * a.B.element_size(),
                                         t0, a.p.length - t0, states);
  }
  if (!kGeneral || !a.p.constant_C) {
    load_tile<K, StateTile, S::kThreads>(smem + m.C_raw, a.C,
                                         from.C + first_state * a.C.stride_c * a.C.element_size(),
                                         t0, a.p.length - t0, states);
  }
}

template <class S, class K, bool kGeneral>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks)
    scan_forward_kernel(const __grid_constant__ ForwardArgs a) {
  using F = Forward<S>;
  using Tile = typename F::Tile;
  extern __shared__ __align__(16) char smem[];
  const typename F::Memory m(a);
  const Place<S> at = place<S>(a);
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
ForwardArgs forward_args(const ScanParams& p, const CudaScanEvents& events) {
  ForwardArgs a;
  a.p = p, a.events = events, a.group_channels = p.group_channels();
  a.blocks_per_group = (p.group_channels() + S::kChannels - 1) / S::kChannels;
  a.every_chunk = p.chunks > 1;
  const auto source = [&](const TensorArg& t) {
    const int64_t size = t.dtype == DType::kFloat32 ? 4 : 2;
    const bool aligned = p.groups == 1 || p.group_channels() * size % 16 == 0;
    return tile_source(t.data, t.dtype, t.stride[0], t.stride[1], t.stride[2], S::kChannels,
                       aligned);
  };
  const auto projection = [&](const TensorArg& t) {
    const int64_t size = t.dtype == DType::kFloat32 ? 4 : 2;
    TileSource s =
        tile_source(t.data, t.dtype, t.stride[0], t.stride[2], t.stride[3], S::kStates, true);
    if (p.groups > 1 && t.stride[1] * size % 16 != 0) s.order = TileOrder::kElements;
    return s;
  };
  a.u = source(p.u), a.delta = source(p.delta), a.z = source(p.z), a.out = source(p.out);
  if (!p.constant_B) a.B = projection(p.B);
  if (!p.constant_C) a.C = projection(p.C);
  return a;
}

template <class S, class K, bool kGeneral>
const char* launch(const ForwardArgs& a, cudaStream_t stream) {
  const typename Forward<S>::Memory m(a);
  const auto kernel = scan_forward_kernel<S, K, kGeneral>;
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, m.total);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  const int64_t blocks = a.p.batch * a.p.groups * a.blocks_per_group;
  kernel<<<static_cast<unsigned>(blocks), S::kThreads, m.total, stream>>>(a);
  error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <class K>
bool fits(const ForwardArgs& a) {
  return K::fits(a.u) && K::fits(a.delta) && K::fits(a.out) && K::fits(a.B) && K::fits(a.C) &&
         (!a.p.z.data || K::fits(a.z));
}

template <class S>
const char* launch(const ForwardArgs& a, cudaStream_t stream) {
  using Any = TileKind<-1, -1>;
  if (a.events.before || a.p.constant_B || a.p.constant_C) return launch<S, Any, true>(a, stream);
#define MAMBA_TRY(dtype, order)                                                           \
  using K##dtype##order =                                                                 \
      TileKind<static_cast<int>(DType::k##dtype), static_cast<int>(TileOrder::k##order)>; \
  if (fits<K##dtype##order>(a)) return launch<S, K##dtype##order, false>(a, stream)
  MAMBA_TRY(BFloat16, Channel);
  MAMBA_TRY(BFloat16, Time);
  MAMBA_TRY(Float16, Channel);
  MAMBA_TRY(Float16, Time);
  MAMBA_TRY(Float32, Channel);
  MAMBA_TRY(Float32, Time);
#undef MAMBA_TRY
  return launch<S, Any, false>(a, stream);
}

}  // namespace

const char* scan_forward_cuda(const ScanParams& p, const CudaScanEvents& events,
                              void* stream_handle) {
  if (p.batch * p.channels * p.length == 0) return nullptr;
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  using Wide = ScanShape<8, 2, 8, 16, 1, 4>;   // many channels
  using Long = ScanShape<32, 1, 16, 4, 1, 3>;  // few: more lanes to each
  int device = 0, processors = 0, memory = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  cudaDeviceGetAttribute(&memory, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  const ForwardArgs wide = forward_args<Wide>(p, events);
  const int64_t blocks = p.batch * p.groups * wide.blocks_per_group;
  const bool fits = Forward<Wide>::Memory(wide).total <= memory;
  if (fits && (blocks >= 2 * processors || p.length <= Wide::kSteps)) {
    return launch<Wide>(wide, stream);
  }
  return launch<Long>(forward_args<Long>(p, events), stream);
}

}  // namespace mamba
