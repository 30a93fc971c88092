// Vectors of floats for the CPU kernels, as wide as the instruction set that the file is compiled
// for. Only *.isa.cpp files include this: the builder compiles each of them once per instruction
// set, with MAMBA_ISA naming the namespace and MAMBA_LANES the floats in a register.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "cpu_convert.h"
#include "tensor_arg.h"

#if !defined(MAMBA_ISA) || !defined(MAMBA_LANES)
#error "compile *.isa.cpp files through the builder, which defines MAMBA_ISA and MAMBA_LANES"
#endif

#define MAMBA_INLINE inline __attribute__((always_inline))

namespace mamba {
namespace MAMBA_ISA {

constexpr int kLanes = MAMBA_LANES;

typedef float Vec __attribute__((vector_size(4 * MAMBA_LANES)));
typedef int32_t VecI __attribute__((vector_size(4 * MAMBA_LANES)));
typedef uint32_t VecU __attribute__((vector_size(4 * MAMBA_LANES)));
typedef uint16_t VecH __attribute__((vector_size(2 * MAMBA_LANES)));

MAMBA_INLINE Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
MAMBA_INLINE void store(float* p, Vec v) { std::memcpy(p, &v, sizeof(v)); }
// x - 0 is x itself to the compiler, also for -0; 0 + x would be a real addition.
MAMBA_INLINE Vec broadcast(float x) { return x - Vec{}; }

template <class To, class From>
MAMBA_INLINE To bits_as(From v) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  std::memcpy(&to, &v, sizeof(to));
  return to;
}

// 16-bit floats, kLanes at a time.
MAMBA_INLINE Vec load_bfloat16(const uint16_t* p) {
  VecH h;
  std::memcpy(&h, p, sizeof(h));
  return bits_as<Vec>(__builtin_convertvector(h, VecU) << 16);
}

MAMBA_INLINE void store_bfloat16(uint16_t* p, Vec v) {
#if defined(__AVX512BF16__)
  // Subnormal numbers become 0 here.
  const __m256bh rounded = _mm512_cvtneps_pbh((__m512)v);
  std::memcpy(p, &rounded, sizeof(rounded));
#else
  const VecU bits = bits_as<VecU>(v);
  const VecU rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest even
  const VecU nan = VecU{} + 0x7fc0u;
  const VecH h = __builtin_convertvector(v == v ? rounded : nan, VecH);
  std::memcpy(p, &h, sizeof(h));
#endif
}

MAMBA_INLINE Vec load_half(const uint16_t* p) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  Vec v;
  for (int i = 0; i < kLanes; ++i) v[i] = half_to_float(p[i]);
  return v;
#endif
}

MAMBA_INLINE void store_half(uint16_t* p, Vec v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; ++i) p[i] = float_to_half(v[i]);
#endif
}

// One element type of a tensor: how kLanes of it are read and written.
struct F32 {
  using T = float;
  static MAMBA_INLINE Vec read(const T* p) { return load(p); }
  static MAMBA_INLINE void write(T* p, Vec v) { store(p, v); }
};
struct F16 {
  using T = uint16_t;
  static MAMBA_INLINE Vec read(const T* p) { return load_half(p); }
  static MAMBA_INLINE void write(T* p, Vec v) { store_half(p, v); }
};
struct BF16 {
  using T = uint16_t;
  static MAMBA_INLINE Vec read(const T* p) { return load_bfloat16(p); }
  static MAMBA_INLINE void write(T* p, Vec v) { store_bfloat16(p, v); }
};

// Calls f with the element type that `dtype` names.
template <class F>
MAMBA_INLINE void with_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat16:
      f(F16{});
      break;
    case DType::kBFloat16:
      f(BF16{});
      break;
    default:
      f(F32{});
  }
}

// The first `count` lanes; the others are 0.
template <class E>
MAMBA_INLINE Vec read_some(const typename E::T* p, int count) {
  typename E::T all[kLanes] = {};
  std::memcpy(all, p, sizeof(typename E::T) * static_cast<size_t>(count));
  return E::read(all);
}
template <class E>
MAMBA_INLINE void write_some(typename E::T* p, Vec v, int count) {
  typename E::T all[kLanes];
  E::write(all, v);
  std::memcpy(p, all, sizeof(typename E::T) * static_cast<size_t>(count));
}

// a * b + c in one rounding where the processor can. Written as an expression, the compiler decides
// anew in every place whether it is one.
MAMBA_INLINE Vec multiply_add(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (Vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

MAMBA_INLINE Vec min(Vec a, float b) { return a < b ? a : broadcast(b); }
MAMBA_INLINE Vec max(Vec a, float b) { return a > b ? a : broadcast(b); }

// The sum of all lanes, always in the same order.
MAMBA_INLINE float sum(Vec v) {
  float lanes[kLanes];
  store(lanes, v);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

// The same, and NaN for a NaN.
MAMBA_INLINE Vec at_most(Vec x, float bound) {
#if defined(__AVX512F__)
  return (Vec)_mm512_min_ps((__m512)broadcast(bound), (__m512)x);  // the second one wins
#else
  return x > bound ? broadcast(bound) : x;
#endif
}
MAMBA_INLINE Vec at_least(Vec x, float bound) {
#if defined(__AVX512F__)
  return (Vec)_mm512_max_ps((__m512)broadcast(bound), (__m512)x);
#else
  return x < bound ? broadcast(bound) : x;
#endif
}

// 2^x within 1 unit in the last place of the normal range: x = k + f with |f| <= 1/2, 2^f by a
// degree-6 minimax polynomial (relative error 2e-9 before rounding). Overflows to infinity,
// underflows to 0, keeps NaN.
MAMBA_INLINE Vec exp2(Vec x) {
#if defined(__AVX512DQ__)
  // A product must be rounded before its integer part is taken off: fused, what is left of a huge
  // one would be its rounding error. There f = 0 and k = x, also for infinities, and scalef does
  // the rest.
  __asm__("" : "+v"(x));
  const Vec f = (Vec)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT);
  const Vec k = x - f;
#else
  const Vec magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  // Keeps the exponent arithmetic below in range; 2^-160 is 0 and 2^129 infinity in fp32.
  x = x < -160.0f ? broadcast(-160.0f) : x;
  x = x > 129.0f ? broadcast(129.0f) : x;
  const Vec shifted = x + magic;
  const Vec k = shifted - magic;
  const Vec f = x - k;
#endif
  Vec p = broadcast(1.535336196e-4f);
  p = p * f + 1.339887502e-3f;
  p = p * f + 9.618436918e-3f;
  p = p * f + 5.550332367e-2f;
  p = p * f + 2.402264774e-1f;
  p = p * f + 6.931471825e-1f;
  p = p * f + 1.0f;
#if defined(__AVX512DQ__)
  return (Vec)_mm512_scalef_ps((__m512)p, (__m512)k);
#else
  // Two factors, so that results down to the smallest subnormal come out right.
  const VecI exponent = bits_as<VecI>(shifted) - 0x4b400000;
  const VecI half = exponent >> 1;
  const Vec result =
      p * bits_as<Vec>((half + 127) << 23) * bits_as<Vec>((exponent - half + 127) << 23);
  return x == x ? result : x;
#endif
}

// 2^(a b) as exact as exp2, in half as many instructions, where |a b| <= kSmallExponent.
constexpr float kSmallExponent = 120.0f;
MAMBA_INLINE Vec exp2_small(Vec a, Vec b) {
  const Vec magic = broadcast(12582912.0f);
  const Vec shifted = a * b + magic;
  const Vec f = a * b - (shifted - magic);
  Vec p = broadcast(1.535336196e-4f);
  p = p * f + 1.339887502e-3f;
  p = p * f + 9.618436918e-3f;
  p = p * f + 5.550332367e-2f;
  p = p * f + 2.402264774e-1f;
  p = p * f + 6.931471825e-1f;
  p = p * f + 1.0f;
  // The integer part, in the last bits of `shifted`, goes to p's exponent; the others are shifted
  // out.
  return bits_as<Vec>(bits_as<VecU>(p) + (bits_as<VecU>(shifted) << 23));
}
MAMBA_INLINE Vec absolute(Vec x) { return bits_as<Vec>(bits_as<VecU>(x) & 0x7fffffffu); }

constexpr float kLog2e = 1.44269504f, kLn2 = 0.693147181f;

// e^x: the argument is reduced in two steps, so that large |x| keep full precision.
MAMBA_INLINE Vec exp(Vec x) {
  const Vec magic = broadcast(12582912.0f);
  x = at_least(at_most(x, 90.0f), -110.0f);
  const Vec shifted = x * kLog2e + magic;
  const Vec k = shifted - magic;
  Vec r = x - k * 0.693359375f;
  r = r - k * -2.12194440e-4f;
  Vec p = broadcast(1.9841270e-4f);
  p = p * r + 1.3888889e-3f;
  p = p * r + 8.3333333e-3f;
  p = p * r + 4.1666667e-2f;
  p = p * r + 1.6666667e-1f;
  p = p * r + 0.5f;
  p = p * r * r + r + 1.0f;
#if defined(__AVX512F__)
  return (Vec)_mm512_scalef_ps((__m512)p, (__m512)k);
#else
  const VecI exponent = bits_as<VecI>(shifted) - 0x4b400000;
  const VecI half = exponent >> 1;
  const Vec result =
      p * bits_as<Vec>((half + 127) << 23) * bits_as<Vec>((exponent - half + 127) << 23);
  return x == x ? result : x;
#endif
}

// 1 / x for positive x below 3e38, within 1 unit in the last place.
MAMBA_INLINE Vec reciprocal(Vec x) {
#if defined(__AVX512F__)
  const Vec r = (Vec)_mm512_rcp14_ps((__m512)x);
  return r + r * (1.0f - x * r);  // one Newton step takes 14 bits to 28
#else
  return 1.0f / x;
#endif
}

MAMBA_INLINE Vec sigmoid(Vec x) {
  const Vec d = 1.0f + exp(-x);
  return reciprocal(d > 3e38f ? broadcast(3e38f) : d);  // comparing so keeps a NaN
}
MAMBA_INLINE Vec silu(Vec x) { return x * sigmoid(x); }

// log(1 + e^x) = max(x, 0) + log(1 + u), u = e^-|x|; log(1 + u) = 2 atanh(u / (2 + u)) by its
// series, which keeps full relative precision for very negative x and vanishes beside x above 20,
// where torch's softplus is the identity.
MAMBA_INLINE Vec softplus(Vec x) {
  const Vec u = exp(x < 0.0f ? x : -x);
  const Vec t = u * reciprocal(2.0f + u);
  const Vec t2 = t * t;
  Vec p = broadcast(2.0f / 15.0f);
  p = p * t2 + 2.0f / 13.0f;
  p = p * t2 + 2.0f / 11.0f;
  p = p * t2 + 2.0f / 9.0f;
  p = p * t2 + 2.0f / 7.0f;
  p = p * t2 + 2.0f / 5.0f;
  p = p * t2 + 2.0f / 3.0f;
  return (x < 0.0f ? Vec{} : x) + (t * t2 * p + 2.0f * t);
}

}  // namespace MAMBA_ISA
}  // namespace mamba
