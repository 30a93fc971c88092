// Tiles of a strided tensor, steps x kLanes channels, as fp32 with the channel innermost. Both
// layouts are read and written by whole vectors: channels contiguous directly, steps contiguous
// through a transpose in registers.
#pragma once

#include <type_traits>
#include <utility>

#include "simd.h"

namespace mamba {
namespace MAMBA_ISA {

// Lane j of the result: with kHigh = 0 the pairs' first halves side by side, with 1 their second.
template <int kWidth, int kHigh, int... J>
MAMBA_INLINE Vec interleave(Vec a, Vec b, std::integer_sequence<int, J...>) {
#if defined(__clang__)
  return __builtin_shufflevector(
      a, b, ((J & kWidth) ? kLanes + J - (kHigh ? 0 : kWidth) : J + (kHigh ? kWidth : 0))...);
#else
  return __builtin_shuffle(
      a, b, VecI{((J & kWidth) ? kLanes + J - (kHigh ? 0 : kWidth) : J + (kHigh ? kWidth : 0))...});
#endif
}
using LaneSequence = std::make_integer_sequence<int, kLanes>;

template <int kWidth>
MAMBA_INLINE void transpose_stage(Vec* r) {
  if constexpr (kWidth < kLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if (i & kWidth) continue;
      const Vec a = r[i], b = r[i + kWidth];
      r[i] = interleave<kWidth, 0>(a, b, LaneSequence{});
      r[i + kWidth] = interleave<kWidth, 1>(a, b, LaneSequence{});
    }
    transpose_stage<kWidth * 2>(r);
  }
}

// r[i][j] <-> r[j][i].
MAMBA_INLINE void transpose(Vec* r) { transpose_stage<1>(r); }

template <int kCount, int kWidth>
MAMBA_INLINE void sum_stage(Vec* r) {
  if constexpr (kCount > 1) {
#pragma GCC unroll 8
    for (int i = 0; i < kCount / 2; ++i) {
      const Vec a = r[2 * i], b = r[2 * i + 1];
      r[i] =
          interleave<kWidth, 0>(a, b, LaneSequence{}) + interleave<kWidth, 1>(a, b, LaneSequence{});
    }
    sum_stage<kCount / 2, kWidth * 2>(r);
  }
}

// Lane i of the result is the sum of r[i]'s lanes, in a fixed order. Overwrites r.
MAMBA_INLINE Vec sum_each(Vec* r) {
  sum_stage<kLanes, 1>(r);
  return r[0];
}

// tile[t][lane] for t < steps, `pitch` floats from step to step; lanes past `count` become 0.
template <class E>
MAMBA_INLINE void read_tile_as(const typename E::T* p, int64_t stride_c, int64_t stride_t,
                               int count, int steps, float* tile, int64_t pitch = kLanes) {
  if (stride_c == 1) {
    for (int t = 0; t < steps; ++t, p += stride_t) {
      store(tile + t * pitch, count == kLanes ? E::read(p) : read_some<E>(p, count));
    }
    return;
  }
  int t = 0;
  if (stride_t == 1) {
    for (; t + kLanes <= steps; t += kLanes) {
      Vec r[kLanes];
      if (count == kLanes) {
        for (int c = 0; c < kLanes; ++c) r[c] = E::read(p + c * stride_c + t);
      } else {
        for (int c = 0; c < kLanes; ++c) r[c] = c < count ? E::read(p + c * stride_c + t) : Vec{};
      }
      transpose(r);
      for (int i = 0; i < kLanes; ++i) store(tile + (t + i) * pitch, r[i]);
    }
  }
  for (; t < steps; ++t) {
    typename E::T row[kLanes] = {};
    for (int c = 0; c < count; ++c) row[c] = p[c * stride_c + t * stride_t];
    store(tile + t * pitch, E::read(row));
  }
}

// A store around the caches writes a whole line of 64 bytes, which is then not read first.
#if defined(__AVX512F__)
constexpr bool kCanStream = true;
#else
constexpr bool kCanStream = false;
#endif

template <class E>
MAMBA_INLINE void write_line(typename E::T* p, Vec v, bool stream) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<E, F32>) {
    if (stream && reinterpret_cast<uintptr_t>(p) % 64 == 0) {
      return _mm512_stream_ps(p, (__m512)v);
    }
  }
#endif
  (void)stream;
  E::write(p, v);
}

// What was stored around the caches is visible to whoever is told that this thread is done.
MAMBA_INLINE void end_of_stream() {
#if defined(__AVX512F__)
  _mm_sfence();
#endif
}

// The reverse; with `stream`, whole lines of fp32 go around the caches.
template <class E>
MAMBA_INLINE void write_tile_as(typename E::T* p, int64_t stride_c, int64_t stride_t, int count,
                                int steps, const float* tile, int64_t pitch = kLanes,
                                bool stream = false) {
  if (stride_c == 1) {
    for (int t = 0; t < steps; ++t, p += stride_t) {
      const Vec v = load(tile + t * pitch);
      if (count == kLanes) {
        write_line<E>(p, v, stream);
      } else {
        write_some<E>(p, v, count);
      }
    }
    return;
  }
  int t = 0;
  if (stride_t == 1) {
    for (; t + kLanes <= steps; t += kLanes) {
      Vec r[kLanes];
      for (int i = 0; i < kLanes; ++i) r[i] = load(tile + (t + i) * pitch);
      transpose(r);
      for (int c = 0; c < count; ++c) write_line<E>(p + c * stride_c + t, r[c], stream);
    }
  }
  for (; t < steps; ++t) {
    typename E::T row[kLanes];
    E::write(row, load(tile + t * pitch));
    for (int c = 0; c < count; ++c) p[c * stride_c + t * stride_t] = row[c];
  }
}

// The same on a tensor whose dtype is known at run time; `offset` counts elements.
inline void read_tile(const TensorArg& x, int64_t offset, int64_t stride_c, int64_t stride_t,
                      int count, int steps, float* tile, int64_t pitch = kLanes) {
  with_dtype(x.dtype, [&](auto e) {
    using E = decltype(e);
    read_tile_as<E>(static_cast<const typename E::T*>(x.data) + offset, stride_c, stride_t, count,
                    steps, tile, pitch);
  });
}

inline void write_tile(const TensorArg& x, int64_t offset, int64_t stride_c, int64_t stride_t,
                       int count, int steps, const float* tile, int64_t pitch = kLanes,
                       bool stream = false) {
  with_dtype(x.dtype, [&](auto e) {
    using E = decltype(e);
    write_tile_as<E>(static_cast<typename E::T*>(x.data) + offset, stride_c, stride_t, count, steps,
                     tile, pitch, stream);
  });
}

#if defined(__AVX512F__)
// The sums of sixteen registers, each over its lanes: a tree in which every addition serves several
// of them.
MAMBA_INLINE Vec sums_of(const Vec (&v)[16]) {
  __m512 pairs[8], fours[4], halves[2];
  for (int i = 0; i < 8; ++i) {
    const __m512 a = (__m512)v[2 * i], b = (__m512)v[2 * i + 1];
    pairs[i] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  }
  for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(pairs[2 * i]), b = _mm512_castps_pd(pairs[2 * i + 1]);
    fours[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
                             _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  for (int i = 0; i < 2; ++i) {
    halves[i] = _mm512_add_ps(_mm512_shuffle_f32x4(fours[2 * i], fours[2 * i + 1], 0x88),
                              _mm512_shuffle_f32x4(fours[2 * i], fours[2 * i + 1], 0xdd));
  }
  return (Vec)_mm512_add_ps(_mm512_shuffle_f32x4(halves[0], halves[1], 0x88),
                            _mm512_shuffle_f32x4(halves[0], halves[1], 0xdd));
}
#endif

}  // namespace MAMBA_ISA
}  // namespace mamba
