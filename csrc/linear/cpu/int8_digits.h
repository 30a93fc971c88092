// Products of int8 weights in integers, with vpdpbusd: four products and their sum in an
// instruction, where floats take a widening, a conversion and a multiply-add for each of them.
// Included by one file per instruction set.
//
// A row of activations becomes integers of 24 bits, q = round(x / step) with step = (largest |x|) /
// kLargest, so each is off by at most 2^-24 of the row's largest. q is written as three signed
// digits, q = (high * 256 + middle) * 256 + low, of a byte each. The instruction takes one factor
// unsigned, so weights are read as w + 128 and a sum starts at -128 * (the digits' sum). Sums are
// exact, hence the same whatever the number of rows, blocks and threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "../../common/simd.h"
#include "product.h"

namespace mamba {
namespace MAMBA_ISA {
namespace {

constexpr int kDigits = 3;
constexpr float kLargest = 127 * 65536;
// Inputs of a group for which 127 * 128 * inputs, the most that a sum ends with (weights are at
// least -127), fits 32 bits; on the way there it may wrap around.
constexpr int64_t kMostSummed = 1 << 17;
// Sums in registers at a time.
constexpr int kDigitSums = 24;

constexpr int digit_blocks(int rows) {
  const int fits = kDigitSums / (rows * kDigits);
  return fits >= 4 ? 4 : fits >= 2 ? 2 : 1;
}

// How a tile of rows lies in memory: [groups][1 + fours][rows][kPlaces] of 32 bits. A four is the
// digits of four inputs, lowest first, one place empty; before a group's fours comes what its sums
// start with and, as a float, the step.
constexpr int64_t kPlaces = kDigits + 1;
inline int64_t places_of_group(const PackedWeight& w) { return ((w.group + 3) / 4 + 1) * kPlaces; }
inline int64_t digit_bytes(const PackedWeight& w) {
  return w.in / w.group * places_of_group(w) * 4;
}

MAMBA_INLINE Vec read_up_to(const float* p, int64_t count) {
  return count >= kLanes ? load(p) : read_some<F32>(p, static_cast<int>(count));
}

// The largest |x|; NaN if one is infinite or NaN.
inline float largest_of(const float* x, int64_t count) {
  Vec largest{}, finite{};
  for (int64_t i = 0; i < count; i += kLanes) {
    const Vec v = (Vec)_mm512_abs_ps((__m512)read_up_to(x + i, count - i));
    largest = v > largest ? v : largest;
    finite += v - v;
  }
  return _mm512_reduce_max_ps((__m512)largest) + _mm512_reduce_add_ps((__m512)finite);
}

// The digits of a group of one row; `to` is its place in the group's first row of places.
inline void write_group(const float* x, int64_t count, float steps, float step, int64_t rows,
                        int32_t* to) {
  const __m512i by_four = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  VecU sums[kDigits] = {};
  int32_t* four = to + rows * kPlaces;
  for (int64_t k = 0; k < count; k += kLanes) {
    // Inputs beyond the group's end are 0.
    VecI rest = (VecI)_mm512_cvtps_epi32((__m512)(read_up_to(x + k, count - k) * steps));
    __m512i digits = _mm512_setzero_si512();
    for (int digit = 0; digit < kDigits; ++digit) {
      const __m512i bytes = _mm512_broadcast_i32x4(_mm512_cvtepi32_epi8((__m512i)rest));
      digits = _mm512_mask_mov_epi32(digits, static_cast<__mmask16>(15 << 4 * digit), bytes);
      sums[digit] += bits_as<VecU>(rest);
      rest = (rest + 128) >> 8;
    }
    int32_t places[kLanes];
    _mm512_storeu_si512(places, _mm512_permutexvar_epi32(by_four, digits));
    const int64_t fours = std::min<int64_t>(4, (count - k + 3) / 4);
    for (int64_t i = 0; i < fours; ++i, four += rows * kPlaces) {
      std::memcpy(four, places + i * kPlaces, kPlaces * 4);
    }
  }
  // A rest is 256 * (the next rest) + its digit, also modulo 2^32.
  uint32_t totals[kDigits + 1] = {};
  for (int digit = 0; digit < kDigits; ++digit) {
    uint32_t lanes[kLanes];
    std::memcpy(lanes, &sums[digit], sizeof(lanes));
    for (const uint32_t lane : lanes) totals[digit] += lane;
  }
  for (int digit = 0; digit < kDigits; ++digit) {
    const uint32_t start = (totals[digit] - 256 * totals[digit + 1]) * uint32_t(-128);
    std::memcpy(to + digit, &start, sizeof(start));
  }
  std::memcpy(to + kDigits, &step, sizeof(step));
}

// `Product::prepare`. A row with an input that is infinite or NaN gives NaN everywhere.
inline void write_digits(const PackedWeight& w, const float* x, int64_t rows, int64_t tile_rows,
                         void* to) {
  for (int64_t r = 0; r < rows; ++r, x += w.in) {
    const float largest = largest_of(x, w.in);
    // Where everything is tiny, steps stay normal numbers.
    const float steps = largest == largest ? std::min(kLargest / largest, 0x1p126f) : 0.0f;
    const float step = largest == largest ? 1.0f / steps : NAN;
    for (int64_t group = 0; group < w.in / w.group; ++group) {
      write_group(x + group * w.group, w.group, steps, step, tile_rows,
                  static_cast<int32_t*>(to) + group * places_of_group(w) * tile_rows + r * kPlaces);
    }
  }
}

// Four inputs of a block, [4][kBlock] in memory, side by side for each output and made unsigned.
MAMBA_INLINE __m512i by_output(__m512i w) {
  const __m512i fours = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i bytes =
      _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  const __m512i turned = _mm512_shuffle_epi8(_mm512_permutexvar_epi32(fours, w), bytes);
  return _mm512_xor_si512(turned, _mm512_set1_epi8(-128));
}

// sums[block][row][digit] += the products of four inputs.
template <int kRows, int kBlocks>
MAMBA_INLINE void add_four(const __m512i* w, const int32_t* x, VecI (*sums)[kRows][kDigits]) {
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
    for (int digit = 0; digit < kDigits; ++digit) {
      const __m512i four = _mm512_set1_epi32(x[r * kPlaces + digit]);
#pragma GCC unroll 4
      for (int b = 0; b < kBlocks; ++b) {
        VecI& sum = sums[b][r][digit];
        sum = (VecI)_mm512_dpbusd_epi32((__m512i)sum, w[b], four);
      }
    }
  }
}

// out[block][row] += step * scale * (the sums' value), or = for the first group.
template <int kRows, int kBlocks>
MAMBA_INLINE void add_group(const PackedWeight& weight, int64_t block, int64_t group,
                            const int32_t* x, int64_t out_rows, const VecI (*sums)[kRows][kDigits],
                            float* out) {
  const int64_t groups = weight.in / weight.group;
  for (int b = 0; b < kBlocks; ++b) {
    const Vec scale = load(weight.scales + ((block + b) * groups + group) * kBlock);
    for (int r = 0; r < kRows; ++r) {
      Vec total = (Vec)_mm512_cvtepi32_ps((__m512i)sums[b][r][kDigits - 1]);
      for (int digit = kDigits - 2; digit >= 0; --digit) {
        const Vec next = (Vec)_mm512_cvtepi32_ps((__m512i)sums[b][r][digit]);
        total = multiply_add(total, broadcast(256.0f), next);
      }
      float* const to = out + (b * out_rows + r) * kBlock;
      const Vec scaled = scale * bits_as<float>(x[r * kPlaces + kDigits]);
      store(to, multiply_add(total, scaled, group ? load(to) : Vec{}));
    }
  }
}

// Part of a tile's rows: those from `x` and `out` on.
template <int kRows, int kBlocks>
void sum_digits(const PackedWeight& weight, int64_t block, const int32_t* x, int64_t tile_rows,
                float* out) {
  constexpr int64_t kAhead = 2048;  // bytes
  const int64_t stride = weight.in * kBlock, past_end = (kBlocks - 1) * stride;
  const auto* w = static_cast<const char*>(weight.data) + block * stride;
  for (int64_t group = 0; group < weight.in / weight.group; ++group) {
    const int32_t* const start = x;
    VecI sums[kBlocks][kRows][kDigits];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
      for (int digit = 0; digit < kDigits; ++digit) {
#pragma GCC unroll 4
        for (int b = 0; b < kBlocks; ++b) {
          sums[b][r][digit] = (VecI)_mm512_set1_epi32(x[r * kPlaces + digit]);
        }
      }
    }
    x += tile_rows * kPlaces;
    const char* from = w + group * weight.group * kBlock;
    for (int64_t left = weight.group; left > 0; left -= 4, x += tile_rows * kPlaces) {
      // The last inputs of a group may be fewer than four.
      const __mmask64 some = left >= 4 ? ~uint64_t{0} : (uint64_t{1} << left * kBlock) - 1;
      const int64_t ahead = from - w + kAhead;
      const char* const next = w + (ahead < stride ? ahead : ahead + past_end);
      __m512i four[kBlocks];
#pragma GCC unroll 4
      for (int b = 0; b < kBlocks; ++b) {
        __builtin_prefetch(next + b * stride, 0, 2);
        four[b] = by_output(_mm512_maskz_loadu_epi8(some, from + b * stride));
      }
      add_four<kRows, kBlocks>(four, x, sums);
      from += 4 * kBlock;
    }
    add_group<kRows, kBlocks>(weight, block, group, start, tile_rows, sums, out);
  }
}

// With more rows than have sums in registers, one half after the other: weights then come from the
// first cache.
template <int kRows, int kBlocks>
void product_digits(const PackedWeight& weight, int64_t block, const void* x, float* out) {
  constexpr int kParts = kRows * kDigits > kDigitSums ? 2 : 1, kPart = kRows / kParts;
  static_assert(kPart * kParts == kRows && kPart * kDigits <= kDigitSums, "rows in equal parts");
  for (int part = 0; part < kParts; ++part) {
    sum_digits<kPart, kBlocks>(weight, block,
                               static_cast<const int32_t*>(x) + part * kPart * kPlaces, kRows,
                               out + part * kPart * kBlock);
  }
}

}  // namespace
}  // namespace MAMBA_ISA
}  // namespace mamba
