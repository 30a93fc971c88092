// Products of a packed weight with 1 to kMaxTileRows rows, compiled per instruction set.
#pragma once

#include <cstdint>

#include "../../common/cpu_isa.h"
#include "../packed_weight.h"

namespace mamba {

constexpr int kMaxTileRows = 16;
constexpr int kMaxBlocksAtOnce = 4;
// Floats that one call of a product writes at most.
constexpr int64_t kProductFloats = kMaxTileRows * kBlock * kMaxBlocksAtOnce;

// Multiplies `blocks` adjacent blocks of a weight, from `block` on, with a tile of activations: x
// is [in][rows] in fp32, or [in / 2][rows][2] in bf16 where Product::pairs says so. Writes
// out[blocks][rows][kBlock] without the bias. Every row is summed over the input in the same order,
// whatever the number of rows and blocks: a row's result does not depend on its company.
using ProductFn = void (*)(const PackedWeight& w, int64_t block, const void* x, float* out);

struct Product {
  ProductFn many = nullptr;  // blocks_at_once blocks
  ProductFn one = nullptr;   // one block
  int64_t blocks_at_once = 1;
  bool pairs = false;  // activations in bf16 pairs
};

// The rows of the next tile when `rows` are left; tiles are padded to a number of rows for which
// there is a kernel. `select_product` takes such a number.
MAMBA_DECLARE_ISA_BF16(int64_t next_tile_rows(int64_t rows))
MAMBA_DECLARE_ISA_BF16(Product select_product(WeightKind kind, int64_t rows))

}  // namespace mamba
