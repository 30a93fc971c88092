// Barriers in shared memory that some threads arrive at and others wait for.
#pragma once

#include <cstdint>

namespace mamba {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// A warp arrives as one lane, after its others. compute-sanitizer's racecheck does not follow an
// order that goes through __syncwarp, so a library that it shall check lets every lane arrive.
#ifdef MAMBA_RACECHECK
constexpr int kWarpArrivals = 32;
#else
constexpr int kWarpArrivals = 1;
#endif

// What lanes have written or read before, the others see after. In a library for racecheck, which
// does not see __syncwarp where the compiler makes nothing of it, as a barrier of the block.
__device__ __forceinline__ void sync_warp() {
#ifdef MAMBA_RACECHECK
  asm volatile("bar.sync %0, 32;" ::"r"(1 + threadIdx.x / 32) : "memory");
#else
  __syncwarp();
#endif
}

__device__ __forceinline__ void barrier_init(uint32_t barrier, int warps) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(warps * kWarpArrivals)
               : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("{.reg .b64 t; mbarrier.arrive.shared.b64 t, [%0];}" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void barrier_arrive_warp(uint32_t barrier, int lane) {
  __syncwarp();
  if (lane < kWarpArrivals) barrier_arrive(barrier);
}
// Whether the phase is over; asked ahead of barrier_wait, the answer need not be waited for.
__device__ __forceinline__ bool barrier_passed(uint32_t barrier, uint32_t phase) {
  uint32_t done;
  asm volatile(
      "{.reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.b32 %0, 1, 0, p;}"
      : "=r"(done)
      : "r"(barrier), "r"(phase)
      : "memory");
  return done;
}
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t phase) {
#if __CUDA_ARCH__ >= 900
  uint32_t done;
  do {
    asm volatile(
        "{.reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.b32 %0, 1, 0, p;}"
        : "=r"(done)
        : "r"(barrier), "r"(phase)
        : "memory");
  } while (!done);
#else
  while (!barrier_passed(barrier, phase)) {
  }
#endif
}

}  // namespace mamba
