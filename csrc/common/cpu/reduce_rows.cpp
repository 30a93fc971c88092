#include "../reduce_rows.h"

namespace mamba {

void reduce_rows(float* rows, int64_t count, int64_t size, int64_t begin, int64_t end) {
  for (int64_t step = 1; step < count; step *= 2) {
    for (int64_t i = 0; i + step < count; i += 2 * step) {
      float* __restrict to = rows + i * size;
      const float* __restrict from = rows + (i + step) * size;
      for (int64_t c = begin; c < end; ++c) to[c] += from[c];
    }
  }
}

}  // namespace mamba
