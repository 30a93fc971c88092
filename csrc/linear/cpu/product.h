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

// How a tile of activations lies in memory.
enum class ActivationLayout {
  kFloats,  // [in][rows] in fp32
  kPairs,   // [in / 2][rows][2] in bf16
  kTiles,   // [in / 32][rows][32] in bf16; a last incomplete 32 has its place
  kRows,    // [rows][in] in fp32, of which `prepare` makes what the product reads
};

constexpr int64_t kTileInputs = 32;

// Multiplies `blocks` adjacent blocks of a weight, from `block` on, with a tile of activations x,
// laid out as Product::layout says. Writes
// out[blocks][rows][kBlock] without the bias. Every row is summed over the input in the same order,
// whatever the number of rows and blocks: a row's result does not depend on its company.
using ProductFn = void (*)(const PackedWeight& w, int64_t block, const void* x, float* out);

struct Product {
  ProductFn many = nullptr;  // blocks_at_once blocks
  ProductFn one = nullptr;   // one block
  int64_t blocks_at_once = 1;
  ActivationLayout layout = ActivationLayout::kFloats;
  // Layout kRows: writes `rows` rows as the product of a tile of `tile_rows` reads them, into
  // tile_rows * prepared_bytes(w).
  void (*prepare)(const PackedWeight& w, const float* x, int64_t rows, int64_t tile_rows,
                  void* to) = nullptr;
};

// To be called by a thread before its first product and after its last one: tile registers belong
// to whoever has set them up, and slow the thread down until they are released.
MAMBA_DECLARE_ISA_BF16(void begin_products())
MAMBA_DECLARE_ISA_BF16(void end_products())

// The rows of the next tile when `rows` are left; tiles are
// padded to a number of rows for which there is a kernel. `select_product` takes such a number.
MAMBA_DECLARE_ISA_BF16(int64_t next_tile_rows(int64_t rows))
MAMBA_DECLARE_ISA_BF16(Product select_product(const PackedWeight& w, int64_t rows))

// Bytes of a prepared row, a multiple of 4; 0 where products read activations as they are.
MAMBA_DECLARE_ISA_BF16(int64_t prepared_bytes(const PackedWeight& w))

}  // namespace mamba
