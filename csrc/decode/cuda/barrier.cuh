// A barrier over all blocks of a launch that are resident together. Arriving and waiting are two
// calls, so that a block can fetch what does not depend on the others in between.
#pragma once

#include <cuda_runtime.h>

namespace mamba {
namespace decode {

class GridBarrier {
 public:
  // `arrived` holds one zeroed word for each block.
  __device__ explicit GridBarrier(unsigned* arrived) : arrived_(arrived) {}

  // Everything that this block has written is visible to blocks that have waited.
  __device__ void arrive() {
    ++turn_;
    __syncthreads();
    if (threadIdx.x == 0) {
      asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(arrived_ + blockIdx.x), "r"(turn_)
                   : "memory");
    }
  }

  // One word for each block instead of a counter: no atomics queue up. A thread looks at one word,
  // so that waiting takes one trip to the L2 cache after the last arrival.
  __device__ void wait() {
    for (unsigned i = threadIdx.x; i < gridDim.x; i += blockDim.x) {
      unsigned seen;
      do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
                     : "=r"(seen)
                     : "l"(arrived_ + i)
                     : "memory");
      } while (seen < turn_);
    }
    __syncthreads();
  }

 private:
  unsigned* arrived_;
  unsigned turn_ = 0;
};

}  // namespace decode
}  // namespace mamba
