#include "backward_kernel.cuh"

namespace mamba {

const char* backward_fp16(const BackwardArgs& a, cudaStream_t stream) {
  return a.plan.kind == BackwardKind::kFloat16Channel
             ? launch_backward_kind<TileKind<1, 1>, false>(a, stream)
             : launch_backward_kind<TileKind<1, 0>, false>(a, stream);
}

}  // namespace mamba
