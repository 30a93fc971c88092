#include "norm.h"

#include "../../common/cpu_isa.h"

namespace mamba {

MAMBA_DECLARE_ISA(void add_norm_fwd(const NormParams& p, int64_t begin, int64_t end,
                                    float* scratch))
MAMBA_DECLARE_ISA(void add_norm_bwd(const NormParams& p, int64_t begin, int64_t end,
                                    float* scratch))

void add_norm_fwd(const NormParams& p, int64_t begin, int64_t end, float* scratch) {
  MAMBA_FOR_ISA(add_norm_fwd, p, begin, end, scratch)
}
void add_norm_bwd(const NormParams& p, int64_t begin, int64_t end,
                  float* scratch){MAMBA_FOR_ISA(add_norm_bwd, p, begin, end, scratch)}

int64_t norm_scratch_size(const NormParams& p) {
  return 4 * (p.size + 16);
}

}  // namespace mamba
