#pragma once

#include <cstdint>

#include "../packed_weight.h"

namespace mamba {

// Writes blocks [begin, end) of a weight (out, in) with contiguous rows into its place in a pack,
// whose padding is zero already (see PackedWeight for the layout). `w.data` is that place.
void pack_weight(const PackedWeight& w, const void* weight, int64_t in, int64_t begin, int64_t end);

}  // namespace mamba
