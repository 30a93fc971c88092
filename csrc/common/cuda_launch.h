// Launching kernels that need more shared memory than a kernel may take without asking.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <mutex>

namespace mamba {

// Lets a kernel take so much dynamic shared memory on the current device. The runtime, which takes
// microseconds to answer, is asked only for more than ever before.
template <auto kKernel>
cudaError_t allow_shared_memory(int bytes) {
  constexpr int kDevices = 64;  // remembered; on others the runtime is asked every time
  static std::atomic<int> allowed[kDevices];
  static std::mutex raising;
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const bool known = device < kDevices;
  if (known && bytes <= allowed[device].load(std::memory_order_acquire)) return cudaSuccess;
  const std::lock_guard<std::mutex> lock(raising);
  if (known && bytes <= allowed[device].load(std::memory_order_relaxed)) return cudaSuccess;
  error = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (known && error == cudaSuccess) allowed[device].store(bytes, std::memory_order_release);
  return error;
}

}  // namespace mamba
