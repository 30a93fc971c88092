// Whatever the other kernels do not serve: packed rows, constant B or C, mixed dtypes and orders.
#include "backward_kernel.cuh"

namespace mamba {

const char* backward_any(const BackwardArgs& a, cudaStream_t stream) {
  using Any = TileKind<-1, -1>;
  return a.plan.warps == 4 ? launch_backward<BackwardShape<4>, Any, true, true>(a, stream)
                           : launch_backward<BackwardShape<1>, Any, true, true>(a, stream);
}

}  // namespace mamba
