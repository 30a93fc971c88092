#include "backward_kernel.cuh"

namespace mamba {

const char* backward_fp32(const BackwardArgs& a, cudaStream_t stream) {
  return a.plan.kind == BackwardKind::kFloat32Channel
             ? launch_backward_kind<TileKind<0, 1>, true>(a, stream)
             : launch_backward_kind<TileKind<0, 0>, true>(a, stream);
}

}  // namespace mamba
