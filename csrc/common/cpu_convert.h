// Loads and stores of fp32, fp16 and bf16 through fp32 on the CPU, for any stride.
// Written with integer operations only, so that the baseline instruction set suffices.
#pragma once

#include <cstdint>
#include <cstring>

#include "tensor_arg.h"

namespace mamba {

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float bfloat16_to_float(uint16_t h) { return bits_to_float(static_cast<uint32_t>(h) << 16); }

inline uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest even
  return (bits & 0x7fffffffu) > 0x7f800000u ? uint16_t(0x7fc0) : static_cast<uint16_t>(rounded);
}

inline float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t magnitude = h & 0x7fffu;
  if (magnitude >= 0x7c00u) {  // infinity and NaN keep their payload
    return bits_to_float(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  }
  // Scaling by 2^112 moves the exponent bias from 15 to 127 and normalises subnormal numbers.
  const float scaled = bits_to_float(magnitude << 13) * bits_to_float(0x77800000u);
  return bits_to_float(sign | float_to_bits(scaled));
}

inline uint16_t float_to_half(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return sign | 0x7e00u;   // NaN
  if (magnitude >= 0x477ff000u) return sign | 0x7c00u;  // rounds to infinity
  if (magnitude < 0x38800000u) {
    // Subnormal in fp16: adding 0.5 lets the float adder round to a multiple of 2^-24.
    const float rounded = bits_to_float(magnitude) + 0.5f;
    return sign | static_cast<uint16_t>(float_to_bits(rounded) - 0x3f000000u);
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return sign | static_cast<uint16_t>((rounded - 0x38000000u) >> 13);
}

inline float load_float(const void* data, DType dtype, int64_t offset) {
  switch (dtype) {
    case DType::kFloat16:
      return half_to_float(static_cast<const uint16_t*>(data)[offset]);
    case DType::kBFloat16:
      return bfloat16_to_float(static_cast<const uint16_t*>(data)[offset]);
    default:
      return static_cast<const float*>(data)[offset];
  }
}

inline void store_float(void* data, DType dtype, int64_t offset, float value) {
  switch (dtype) {
    case DType::kFloat16:
      static_cast<uint16_t*>(data)[offset] = float_to_half(value);
      break;
    case DType::kBFloat16:
      static_cast<uint16_t*>(data)[offset] = float_to_bfloat16(value);
      break;
    default:
      static_cast<float*>(data)[offset] = value;
  }
}

// The row of `n` elements that starts at `offset`, as contiguous fp32: the tensor's own memory when
// it already is that, else a converted copy in `scratch`.
inline const float* row_as_float(const TensorArg& t, int64_t offset, int64_t stride, int64_t n,
                                 float* scratch) {
  if (t.dtype == DType::kFloat32 && stride == 1) return static_cast<const float*>(t.data) + offset;
  switch (t.dtype) {  // the switch stands outside the loops so that each loop can be vectorised
    case DType::kFloat16: {
      const auto* p = static_cast<const uint16_t*>(t.data) + offset;
      for (int64_t i = 0; i < n; ++i) scratch[i] = half_to_float(p[i * stride]);
      break;
    }
    case DType::kBFloat16: {
      const auto* p = static_cast<const uint16_t*>(t.data) + offset;
      for (int64_t i = 0; i < n; ++i) scratch[i] = bfloat16_to_float(p[i * stride]);
      break;
    }
    default: {
      const auto* p = static_cast<const float*>(t.data) + offset;
      for (int64_t i = 0; i < n; ++i) scratch[i] = p[i * stride];
    }
  }
  return scratch;
}

inline void store_row(const TensorArg& t, int64_t offset, int64_t stride, int64_t n,
                      const float* row) {
  switch (t.dtype) {
    case DType::kFloat16: {
      auto* p = static_cast<uint16_t*>(t.data) + offset;
      for (int64_t i = 0; i < n; ++i) p[i * stride] = float_to_half(row[i]);
      break;
    }
    case DType::kBFloat16: {
      auto* p = static_cast<uint16_t*>(t.data) + offset;
      for (int64_t i = 0; i < n; ++i) p[i * stride] = float_to_bfloat16(row[i]);
      break;
    }
    default: {
      auto* p = static_cast<float*>(t.data) + offset;
      if (p == row) return;  // updated in place
      for (int64_t i = 0; i < n; ++i) p[i * stride] = row[i];
    }
  }
}

}  // namespace mamba
