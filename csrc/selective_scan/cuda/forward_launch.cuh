// From the arguments of a forward scan to the kernel that is compiled for them.
#pragma once

#include <cuda_runtime.h>

#include "../../common/cuda_launch.h"
#include "forward_tile.cuh"

namespace mamba {

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

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, attribute, device);
  return value;
}
inline int processor_count() { return device_attribute(cudaDevAttrMultiProcessorCount); }
inline int shared_memory_limit() {
  return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
}

template <auto kKernel>
const char* launch_kernel(const ForwardArgs& a, int64_t blocks, int threads, int memory,
                          cudaStream_t stream) {
  cudaError_t error = allow_shared_memory<kKernel>(memory);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  kKernel<<<static_cast<unsigned>(blocks), threads, memory, stream>>>(a);
  error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

inline int64_t block_count(const ForwardArgs& a) {
  return a.p.batch * a.p.groups * a.blocks_per_group;
}

template <class K>
bool fits(const ForwardArgs& a) {
  return K::fits(a.u) && K::fits(a.delta) && K::fits(a.out) && K::fits(a.B) && K::fits(a.C) &&
         (!a.p.z.data || K::fits(a.z));
}

// Calls Launch::run<Kind, general> with the kind of kernel that the tensors allow.
template <class Launch>
const char* launch_for(const ForwardArgs& a, cudaStream_t stream) {
  using Any = TileKind<-1, -1>;
  if (a.events.before || a.p.constant_B || a.p.constant_C)
    return Launch::template run<Any, true>(a, stream);
#define MAMBA_TRY(dtype, order)                                                           \
  using K##dtype##order =                                                                 \
      TileKind<static_cast<int>(DType::k##dtype), static_cast<int>(TileOrder::k##order)>; \
  if (fits<K##dtype##order>(a)) return Launch::template run<K##dtype##order, false>(a, stream)
  MAMBA_TRY(BFloat16, Channel);
  MAMBA_TRY(BFloat16, Time);
  MAMBA_TRY(Float16, Channel);
  MAMBA_TRY(Float16, Time);
  MAMBA_TRY(Float32, Channel);
  MAMBA_TRY(Float32, Time);
#undef MAMBA_TRY
  return Launch::template run<Any, false>(a, stream);
}

const char* scan_forward_sequential(const ScanParams& p, const CudaScanEvents& events,
                                    cudaStream_t stream);
bool sequential_fits(const ScanParams& p);
// The same for what is usual: variable B and C, up to 16 states, one order and dtype of all
// tensors, no seq_idx. Returns false where this is not so, or with `aligned` where tensors would be
// copied element by element.
bool try_forward_stream(const ScanParams& p, const CudaScanEvents& events, bool aligned,
                        cudaStream_t stream, const char** error);
// The same for as many states as fit shared memory, and rows of steps that begin anywhere.
// `output`: whether y is wanted, or what segments make of the states.
bool relay_fits(const ScanParams& p, const CudaScanEvents& events);
const char* scan_forward_relay(const ScanParams& p, const Segments& segments, bool output,
                               cudaStream_t stream);

}  // namespace mamba
