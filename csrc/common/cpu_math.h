// Scalar functions of the CPU kernels, without branches, so that loops over them vectorise on any
// instruction set.
#pragma once

#include <cstdint>

#include "cpu_convert.h"

namespace mamba {

// e^x within 1.5 units in the last place: x = k ln 2 + r with |r| <= ln 2 / 2, e^r by the degree-7
// Taylor polynomial, then two factors of 2^(k/2) so that results down to the smallest subnormal
// and up to infinity come out right. NaN stays NaN.
inline float exp_approx(float x) {
  // Written so that a NaN falls through both comparisons into k through a defined conversion.
  const float low = x > -104.0f ? x : -104.0f;
  const float clamped = low < 89.0f ? low : 89.0f;
  const float shifted = clamped * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer
  const float k = shifted - 12582912.0f;
  const int32_t exponent =
      static_cast<int32_t>(float_to_bits(shifted)) - static_cast<int32_t>(0x4b400000);
  float r = clamped - k * 0.693359375f;
  r = r - k * -2.12194440e-4f;
  float p = 1.9841270e-4f;
  p = p * r + 1.3888889e-3f;
  p = p * r + 8.3333333e-3f;
  p = p * r + 4.1666667e-2f;
  p = p * r + 1.6666667e-1f;
  p = p * r + 0.5f;
  p = p * r * r + r + 1.0f;
  const int32_t half = exponent >> 1;
  const float scale_a = bits_to_float(static_cast<uint32_t>(half + 127) << 23);
  const float scale_b = bits_to_float(static_cast<uint32_t>(exponent - half + 127) << 23);
  const float result = p * scale_a * scale_b;
  return x != x ? x : result;
}

// log(1 + e^x) = max(x, 0) + log(1 + u) with u = e^-|x|. log(1 + u) = 2 atanh(u / (2 + u)) by its
// series, which keeps full relative precision for the small results of very negative x, and
// vanishes beside x above 20, where torch's softplus is the identity.
inline float softplus(float x) {
  const float u = exp_approx(x < 0.0f ? x : -x);
  const float t = u / (2.0f + u);
  const float t2 = t * t;
  float p = 2.0f / 15.0f;
  p = p * t2 + 2.0f / 13.0f;
  p = p * t2 + 2.0f / 11.0f;
  p = p * t2 + 2.0f / 9.0f;
  p = p * t2 + 2.0f / 7.0f;
  p = p * t2 + 2.0f / 5.0f;
  p = p * t2 + 2.0f / 3.0f;
  const float log1p_u = t * t2 * p + 2.0f * t;
  return (x < 0.0f ? 0.0f : x) + log1p_u;
}

inline float silu(float x) { return x / (1.0f + exp_approx(-x)); }

}  // namespace mamba
