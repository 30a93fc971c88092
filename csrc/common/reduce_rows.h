// Sums of partial results in an order that depends on their number only.
#pragma once

#include <cstdint>

namespace mamba {

// Columns [begin, end) of rows (count, size), contiguous, added up pairwise into row 0. The other
// rows are overwritten. Zero rows are left alone.
void reduce_rows(float* rows, int64_t count, int64_t size, int64_t begin, int64_t end);

}  // namespace mamba
