// Barriers in shared memory that count arrivals and bytes, for blocks and clusters of blocks
// (compute capability 9.0 on). cooperative_groups' barrier of a cluster waits until all writes to
// global memory have arrived there; these do not.
#pragma once

#include <cstdint>

namespace mamba {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// The same place in block `rank` of the cluster.
__device__ __forceinline__ uint32_t address_at(uint32_t shared, int rank) {
  uint32_t there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared), "r"(rank));
  return there;
}

__device__ __forceinline__ void init_barrier(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// An arrival that says how many bytes its phase waits for.
__device__ __forceinline__ void arrive_expecting(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void wait_barrier(uint32_t barrier, int phase) {
  asm volatile(
      "{\n.reg .pred done;\nAGAIN:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra AGAIN;\n}" ::"r"(
          barrier),
      "r"(phase)
      : "memory");
}

// A value to a block of the cluster, which counts its bytes.
__device__ __forceinline__ void store_at(uint32_t to, uint32_t barrier, int rank, float value) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(
          address_at(to, rank)),
      "r"(__float_as_uint(value)), "r"(address_at(barrier, rank))
      : "memory");
}

// Every block of the cluster comes to `wait_for_cluster` after each has been to this. What threads
// wrote is not ordered by it.
__device__ __forceinline__ void arrive_at_cluster() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void wait_for_cluster() {
  asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
}

#endif

}  // namespace mamba
