#include "backward_kernel.cuh"

namespace mamba {

const char* backward_bf16(const BackwardArgs& a, cudaStream_t stream) {
  return a.plan.kind == BackwardKind::kBFloat16Channel
             ? launch_backward_kind<TileKind<2, 1>, false>(a, stream)
             : launch_backward_kind<TileKind<2, 0>, false>(a, stream);
}

}  // namespace mamba
