#pragma once

#include "../params.h"

namespace mamba {

constexpr int64_t kNormGroup = 32;  // rows whose share of dweight and dbias is added up in one go

int64_t norm_scratch_size(const NormParams& p);

// Rows [begin, end).
void add_norm_fwd(const NormParams& p, int64_t begin, int64_t end, float* scratch);

// Groups of rows [begin, end).
void add_norm_bwd(const NormParams& p, int64_t begin, int64_t end, float* scratch);

}  // namespace mamba
