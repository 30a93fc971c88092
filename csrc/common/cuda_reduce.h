// Sums of partial results, always in the same order.
#pragma once

#include <cstdint>

namespace mamba {

// From rows (count, pitch) on the GPU: to[i] = the sum of column i for i < size, and second[i] =
// that of column size + i for i < second_size. No rows give 0. Returns null or the CUDA runtime's
// message.
const char* sum_rows_cuda(const float* rows, int64_t count, int64_t pitch, int64_t size, float* to,
                          int64_t second_size, float* second, void* stream);

}  // namespace mamba
