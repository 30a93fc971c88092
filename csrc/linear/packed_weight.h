// The weight of a linear layer, laid out for products with a few rows.
#pragma once

#include <cstdint>

namespace mamba {

enum class WeightKind : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2, kInt8 = 3 };
constexpr int kWeightKinds = 4;

// Outputs in a block: one AVX-512 register of fp32, the same on every machine, so that a pack does
// not depend on the instruction set.
constexpr int64_t kBlock = 16;

// data: [blocks][in][kBlock], so that a product reads it once from the first byte to the last; bf16
// in pairs along the input, [blocks][in / 2][kBlock][2] with an even (padded) `in`. Outputs beyond
// `out` are padding.
struct PackedWeight {
  WeightKind kind = WeightKind::kFloat32;
  int64_t out = 0, in = 0;
  int64_t group = 0;  // int8: inputs that share a scale
  const void* data = nullptr;
  const float* scales = nullptr;  // int8: [blocks][in / group][kBlock]
  const float* bias = nullptr;    // [blocks * kBlock], or null

  int64_t blocks() const { return (out + kBlock - 1) / kBlock; }
};

inline int64_t weight_bytes(WeightKind kind) {
  return kind == WeightKind::kFloat32 ? 4 : kind == WeightKind::kInt8 ? 1 : 2;
}

}  // namespace mamba
