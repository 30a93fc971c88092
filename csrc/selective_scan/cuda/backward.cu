// The backward of the selective scan, parallel over time inside a warp and walking tiles of 64
// steps from the last to the first. The states of a tile are computed again from the state that
// enters it, which the forward kept; then the adjoint runs the other way. Sums over states stay in
// registers; sums over channels (dB, dC) go through tensor cores within a warp, shared memory
// within a block and partial sums in global memory, always in the same order.
//
// This file plans a call; backward_*.cu hold the kernels, backward_*.cuh their parts.
#include "backward_kernel.cuh"

#include <algorithm>

namespace mamba {
namespace {

// The gradients take their inputs' place in shared memory, so both need one order.
void use_one_order(TileSource& input, TileSource& output) {
  const bool by_channel = input.order == TileOrder::kChannel;
  if (by_channel != (output.order == TileOrder::kChannel)) {
    input.order = output.order = TileOrder::kElements;
  }
}

BackwardArgs backward_args(const ScanGradients& g, const CudaScanEvents& events) {
  BackwardArgs a;
  const ScanParams& p = g.forward;
  a.p = p, a.events = events;
  a.dfinal_state = g.dfinal_state, a.dinitial_state = g.dinitial_state;
  a.dA = g.dA, a.dB = g.dB, a.dC = g.dC, a.dD = g.dD, a.ddelta_bias = g.ddelta_bias;
  a.group_channels = p.group_channels();
  a.tiles = (p.length + kCudaChunk - 1) / kCudaChunk;
  a.wide_states = p.state_dim % 4 == 0 && reinterpret_cast<uintptr_t>(p.chunk_states) % 16 == 0;
  const auto source = [&](const TensorArg& t) {
    const int64_t size = t.dtype == DType::kFloat32 ? 4 : 2;
    const bool aligned = p.groups == 1 || p.group_channels() * size % 16 == 0;
    return tile_source(t.data, t.dtype, t.stride[0], t.stride[1], t.stride[2], 8, aligned);
  };
  a.u = source(p.u), a.delta = source(p.delta), a.z = source(p.z), a.dout = source(g.dout);
  a.du = source(g.du), a.ddelta = source(g.ddelta), a.dz = source(g.dz);
  const auto projection = [&](const TensorArg& t) {
    const int64_t size = t.dtype == DType::kFloat32 ? 4 : 2;
    TileSource s = tile_source(t.data, t.dtype, t.stride[0], t.stride[2], t.stride[3], 8, true);
    if (p.groups > 1 && t.stride[1] * size % 16 != 0) s.order = TileOrder::kElements;
    return s;
  };
  if (!p.constant_B) a.B = projection(p.B);
  if (!p.constant_C) a.C = projection(p.C);
  use_one_order(a.u, a.du), use_one_order(a.delta, a.ddelta), use_one_order(a.z, a.dz);
  a.aligned = true;
  for (const TileSource* s : {&a.u, &a.delta, &a.dout, &a.z, &a.du, &a.ddelta, &a.dz}) {
    if (s->data && s->order == TileOrder::kElements) a.aligned = false;
  }
  return a;
}

// Which states several starts share: those have no single adjoint to store.
__global__ void __launch_bounds__(256)
    count_starts_kernel(const int* before, int64_t steps, int* starts, int* shared) {
  const int64_t step = int64_t{gridDim.x} * 256;
  for (int64_t i = int64_t{blockIdx.x} * 256 + threadIdx.x; i < steps; i += step) {
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
  const int64_t steps = p.batch * p.length, blocks = std::min<int64_t>((steps + 255) / 256, 1024);
  count_starts_kernel<<<static_cast<unsigned>(blocks), 256, 0, stream>>>(
      events.before, steps, scratch.starts, scratch.shared_starts);
  return message(cudaGetLastError());
}

__global__ void __launch_bounds__(256)
    chain_segments_kernel(const __grid_constant__ BackwardArgs a) {
  const int64_t size = a.p.channels * a.p.state_dim, segments = a.plan.segments;
  const int64_t step = int64_t{gridDim.x} * 256;
  for (int64_t i = int64_t{blockIdx.x} * 256 + threadIdx.x; i < a.p.batch * size; i += step) {
    const int64_t row = i / size, at = i % size;
    float* const adjoint = a.scratch.adjoint + row * segments * size + at;
    const float* const decay = a.scratch.decay + row * segments * size + at;
    float x = a.dfinal_state && !a.events.before ? a.dfinal_state[row * size + at] : 0.0f;
    float g = adjoint[(segments - 1) * size];
    for (int64_t s = segments - 1; s > 0; --s) {
      const float next = s > 1 ? adjoint[(s - 1) * size] : 0.0f;
      x = fmaf(decay[s * size], x, g);
      adjoint[(s - 1) * size] = x;
      g = next;
    }
  }
}

struct Gpu {
  int processors = 0, block_memory = 0, processor_memory = 0;
  Gpu() {
    int device = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    cudaDeviceGetAttribute(&block_memory, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    cudaDeviceGetAttribute(&processor_memory, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  }
};

// Plans blocks of the shape, if they fit the GPU: two stages where they do not cost a block.
template <class S, bool kGeneral>
bool plan_blocks(const BackwardArgs& a, const Gpu& gpu, BackwardPlan* plan) {
  const int one = BackwardMemory<S, kGeneral>(a, 1).total;
  const int two = BackwardMemory<S, kGeneral>(a, 2).total;
  if (one > gpu.block_memory) return false;
  const auto blocks = [&](int bytes) {
    return bytes > gpu.block_memory
               ? 0
               : std::min(S::kMinBlocks, gpu.processor_memory / (bytes + 1024));
  };
  plan->warps = S::kWarps;
  plan->stages = blocks(two) >= blocks(one) ? 2 : 1;
  plan->blocks_per_group = (a.group_channels + S::kChannels - 1) / S::kChannels;
  plan->slices = a.p.groups * plan->blocks_per_group;
  return true;
}

template <class K>
bool serves_all(const BackwardArgs& a) {
  TileSource B = a.u, C = a.u;  // B and C may have any order
  B.dtype = a.p.B.dtype, C.dtype = a.p.C.dtype;
  const bool projections = !a.p.constant_B && !a.p.constant_C && serves<K>(B) && serves<K>(C);
  return projections && serves<K>(a.u) && serves<K>(a.delta) && serves<K>(a.dout) &&
         (!a.p.z.data || serves<K>(a.z));
}

BackwardKind kind_of(const BackwardArgs& a) {
  if (a.events.before) return BackwardKind::kAny;
  if (serves_all<TileKind<2, 1>>(a)) return BackwardKind::kBFloat16Channel;
  if (serves_all<TileKind<2, 0>>(a)) return BackwardKind::kBFloat16Time;
  if (serves_all<TileKind<1, 1>>(a)) return BackwardKind::kFloat16Channel;
  if (serves_all<TileKind<1, 0>>(a)) return BackwardKind::kFloat16Time;
  if (serves_all<TileKind<0, 1>>(a)) return BackwardKind::kFloat32Channel;
  if (serves_all<TileKind<0, 0>>(a)) return BackwardKind::kFloat32Time;
  return BackwardKind::kAny;
}

}  // namespace

const char* chain_segments(const BackwardArgs& a, cudaStream_t stream) {
  const int64_t states = a.p.batch * a.p.channels * a.p.state_dim;
  const int64_t blocks = std::min<int64_t>((states + 255) / 256, 65536);
  chain_segments_kernel<<<static_cast<unsigned>(blocks), 256, 0, stream>>>(a);
  return message(cudaGetLastError());
}

BackwardPlan backward_plan(const ScanGradients& g, const CudaScanEvents& events) {
  const ScanParams& p = g.forward;
  const BackwardArgs a = backward_args(g, events);
  const Gpu gpu;
  BackwardPlan plan;
  plan.padded_length = (p.length + 3) / 4 * 4;
  plan.kind = kind_of(a);
  bool planned = false;
  if (plan.kind != BackwardKind::kAny) {
    planned =
        (a.group_channels > 32 && plan_blocks<BackwardShape<kWideWarps>, false>(a, gpu, &plan)) ||
        plan_blocks<BackwardShape<4>, false>(a, gpu, &plan);
  }
  if (!planned) {
    plan.kind = BackwardKind::kAny;
    planned = plan_blocks<BackwardShape<4>, true>(a, gpu, &plan) ||
              plan_blocks<BackwardShape<1>, true>(a, gpu, &plan);
  }
  // Segments as far as processors would idle, but long enough to be worth the pass that joins them.
  constexpr int64_t kLeastTiles = 8;
  const int64_t units = std::max<int64_t>(1, p.batch * plan.slices);
  const int64_t most = gpu.processors * std::max(1, 12 / std::max(1, plan.warps)) / units;
  const int64_t wanted = std::max<int64_t>(1, std::min(most, a.tiles / kLeastTiles));
  plan.segment_tiles = (a.tiles + wanted - 1) / wanted;
  plan.segments = plan.segment_tiles ? (a.tiles + plan.segment_tiles - 1) / plan.segment_tiles : 1;
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
  BackwardArgs a = backward_args(g, events);
  a.plan = plan, a.scratch = scratch;
  switch (plan.kind) {
    case BackwardKind::kBFloat16Channel:
    case BackwardKind::kBFloat16Time:
      return backward_bf16(a, stream);
    case BackwardKind::kFloat16Channel:
    case BackwardKind::kFloat16Time:
      return backward_fp16(a, stream);
    case BackwardKind::kFloat32Channel:
    case BackwardKind::kFloat32Time:
      return backward_fp32(a, stream);
    default:
      return backward_any(a, stream);
  }
}

}  // namespace mamba
