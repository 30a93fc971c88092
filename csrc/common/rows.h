// Rows of elements of any dtype and stride, through fp32. Only *.isa.cpp files include this.
#pragma once

#include "simd.h"

// One copy per file and instruction set is enough, and is what keeps compiling fast.
#define MAMBA_NOINLINE [[maybe_unused]] static __attribute__((noinline))

namespace mamba {
namespace MAMBA_ISA {

// kLanes or fewer elements that lie `stride` apart; the lanes past `count` are 0.
template <class E>
MAMBA_INLINE Vec read_lanes(const typename E::T* p, int64_t stride, int64_t count) {
  if (stride == 1 && count >= kLanes) return E::read(p);
  typename E::T all[kLanes] = {};
  for (int i = 0; i < kLanes && i < count; ++i) all[i] = p[i * stride];
  return E::read(all);
}

template <class E>
MAMBA_INLINE void write_lanes(typename E::T* p, int64_t stride, int64_t count, Vec v) {
  if (stride == 1 && count >= kLanes) return E::write(p, v);
  typename E::T all[kLanes];
  E::write(all, v);
  for (int i = 0; i < kLanes && i < count; ++i) p[i * stride] = all[i];
}

// Calls f(i, lanes) for the n elements of t from `offset` on; lanes past the last are 0.
template <class F>
MAMBA_INLINE void for_lanes(const TensorArg& t, int64_t offset, int64_t stride, int64_t n, F&& f) {
  with_dtype(t.dtype, [&](auto e) {
    using E = decltype(e);
    const auto* p = static_cast<const typename E::T*>(t.data) + offset;
    for (int64_t i = 0; i < n; i += kLanes) f(i, read_lanes<E>(p + i * stride, stride, n - i));
  });
}

// The smallest multiple of kLanes that is not below n.
MAMBA_INLINE int64_t whole_lanes(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// Writes whole_lanes(n) floats at `to`: the row, then zeros.
MAMBA_NOINLINE void read_row(const TensorArg& t, int64_t offset, int64_t stride, int64_t n,
                             float* to) {
  for_lanes(t, offset, stride, n, [&](int64_t i, Vec v) { store(to + i, v); });
}

// Reads whole_lanes(n) floats at `from`.
MAMBA_NOINLINE void write_row(const TensorArg& t, int64_t offset, int64_t stride, int64_t n,
                              const float* from) {
  with_dtype(t.dtype, [&](auto e) {
    using E = decltype(e);
    auto* p = static_cast<typename E::T*>(t.data) + offset;
    for (int64_t i = 0; i < n; i += kLanes) {
      write_lanes<E>(p + i * stride, stride, n - i, load(from + i));
    }
  });
}

MAMBA_NOINLINE float read_one(const TensorArg& t, int64_t offset) {
  if (t.dtype == DType::kFloat32) return static_cast<const float*>(t.data)[offset];
  float value = 0.0f;
  with_dtype(t.dtype, [&](auto e) {
    using E = decltype(e);
    value = read_some<E>(static_cast<const typename E::T*>(t.data) + offset, 1)[0];
  });
  return value;
}

MAMBA_INLINE void fill(float* to, float value, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = value;
}

}  // namespace MAMBA_ISA
}  // namespace mamba
