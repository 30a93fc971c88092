// Kernels that start while the one before them in the stream still runs (programmatic dependent
// launch, compute capability 9.0 on).
//
// A kernel launched so may read what was complete when its predecessor passed `wait_for_previous`,
// and must call it itself before anything else: before results of the predecessor are read, before
// any write, and before `start_next`.
#pragma once

#include <cuda_runtime.h>

namespace mamba {

__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void start_next() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Whether a device runs this library's code for compute capability 9.0 or later.
inline bool runs_code_for_90(int device) {
  int major = 0, minor = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  constexpr int kCompiled[] = {__CUDA_ARCH_LIST__};
  for (const int compiled : kCompiled) {
    if (compiled >= 900 && compiled <= major * 100 + minor * 10) return true;
  }
  return false;
}

inline bool chains_work() {
  int device = 0;
  cudaGetDevice(&device);
  return runs_code_for_90(device);
}

struct Link {
  bool early = true;  // starts before the kernel in front of it has ended
  int cluster = 1;    // neighbouring blocks of the first dimension that reach each other's memory
};

// A launch as a link of a chain; an ordinary one where those do not work, and without clusters.
template <typename... Types, typename... Values>
void launch_chained(void (*kernel)(Types...), dim3 grid, int threads, size_t shared, Link link,
                    cudaStream_t stream, const Values&... values) {
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = attributes;
  if (chains_work()) {
    if (link.early) {
      cudaLaunchAttribute& early = attributes[config.numAttrs++];
      early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      early.val.programmaticStreamSerializationAllowed = 1;
    }
    if (link.cluster > 1) {
      cudaLaunchAttribute& cluster = attributes[config.numAttrs++];
      cluster.id = cudaLaunchAttributeClusterDimension;
      cluster.val.clusterDim.x = static_cast<unsigned>(link.cluster);
      cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    }
  }
  cudaLaunchKernelEx(&config, kernel, values...);
}

}  // namespace mamba
