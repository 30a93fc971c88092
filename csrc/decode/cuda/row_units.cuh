// Weights of a single row's step on their way into registers. A unit is a piece of a row of weights
// that a warp multiplies at once, kVectors times 16 bytes a lane. A warp takes the same piece of
// several rows, so that it keeps its inputs in registers, and holds two units: while one is
// multiplied the others are on their way, and at the end of a product those of the next product
// are, which then arrive while the blocks exchange results.
#pragma once

#include "../../common/cuda_convert.cuh"
#include "row_layout.h"

namespace mamba {
namespace decode {

// A warp's units of a weight.
struct Units {
  int64_t first, gap;      // offset of the first unit; added from unit number `split` on
  int step, split, count;  // bytes between units
  int piece, piece_bytes;  // of each row

  __device__ __forceinline__ int64_t offset(int i) const {
    return first + static_cast<int64_t>(i) * step + (i >= split ? gap : 0);
  }

  // 16 bytes each, of this lane in a unit.
  __device__ __forceinline__ int vectors() const {
    return (piece_bytes / 16 - static_cast<int>(threadIdx.x) % 32 + 31) / 32;
  }
};

// Rows `first` to `first` + `count` of a weight, the second half of them `gap` rows later.
template <int kVectors>
__device__ __forceinline__ Units units_of_rows(int warp, int first, int count, int gap,
                                               int row_bytes, int pieces) {
  constexpr int kPieceBytes = 32 * kVectors * 16;
  const int at_once = kRowWarps / pieces, slot = warp / pieces;
  Units u;
  u.piece = warp % pieces;
  const int begin = u.piece * kPieceBytes, left = row_bytes - begin;
  u.piece_bytes = left < 0 ? 0 : left < kPieceBytes ? left : kPieceBytes;
  u.first = static_cast<int64_t>(first + slot) * row_bytes + begin;
  u.gap = static_cast<int64_t>(gap) * row_bytes;
  u.step = at_once * row_bytes;
  u.split = gap > 0 ? (count / 2 - slot + at_once - 1) / at_once : 1 << 30;
  u.count = count > slot ? (count - slot - 1) / at_once + 1 : 0;
  return u;
}

template <int kVectors>
struct Unit {
  uint4 v[kVectors];

  __device__ __forceinline__ void load(const char* from, int vectors) {
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      v[j] = make_uint4(0, 0, 0, 0);
      if (j < vectors) {
        asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(v[j].x), "=r"(v[j].y), "=r"(v[j].z), "=r"(v[j].w)
                     : "l"(from + j * 512));
      }
    }
  }
};

__device__ __forceinline__ void multiply(uint4 w, const float* x, float& even, float& odd,
                                         float /*dtype*/) {
  even = fmaf(__uint_as_float(w.x), x[0], even);
  odd = fmaf(__uint_as_float(w.y), x[1], odd);
  even = fmaf(__uint_as_float(w.z), x[2], even);
  odd = fmaf(__uint_as_float(w.w), x[3], odd);
}

__device__ __forceinline__ float2 both_of(unsigned bits, __half) {
  return __half22float2(*reinterpret_cast<const __half2*>(&bits));
}

__device__ __forceinline__ float2 both_of(unsigned bits, __nv_bfloat16) {
  return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u));
}

template <typename T>
__device__ __forceinline__ void multiply(uint4 w, const float* x, float& even, float& odd,
                                         T dtype) {
  const unsigned words[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 two = both_of(words[i], dtype);
    even = fmaf(two.x, x[2 * i], even);
    odd = fmaf(two.y, x[2 * i + 1], odd);
  }
}

// A row's inputs in shared memory, as fp32. Lanes take 16 bytes of weights each; in halves that is
// eight inputs, which lie in two planes of four each: no lanes' reads collide.
template <typename T>
class Inputs {
 public:
  static constexpr int kPlanes = 4 / sizeof(T);

  __device__ Inputs(float* data, int size) : data_(data), vectors_(size / (4 * kPlanes)) {}

  // Where input `i` is; the rest of its four follows.
  __device__ __forceinline__ float* at(int i) const {
    const int four = i / 4;
    return data_ + 4 * (four % kPlanes * vectors_ + four / kPlanes) + i % 4;
  }

  // This lane's inputs of a unit.
  template <int kVectors>
  __device__ __forceinline__ void load(float (&x)[kVectors * 4 * kPlanes], const Units& u) const {
    const int first = u.piece * 32 * kVectors + static_cast<int>(threadIdx.x) % 32;
    const int vectors = u.vectors();
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
#pragma unroll
      for (int plane = 0; plane < kPlanes; ++plane) {
        float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (j < vectors) {
          v = reinterpret_cast<const float4*>(data_)[plane * vectors_ + first + 32 * j];
        }
        float* to = x + 4 * (j * kPlanes + plane);
        to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
      }
    }
  }

 private:
  float* data_;
  int vectors_;
};

// The weights' way through a warp.
template <typename T, int kVectors>
class UnitStream {
 public:
  static constexpr int kInputs = kVectors * 16 / static_cast<int>(sizeof(T));

  // The first units of a product.
  __device__ __forceinline__ void start(const char* weight, const Units& u) {
    const int vectors = u.vectors();
#pragma unroll
    for (int h = 0; h < kHeld; ++h) {
      if (h < u.count) held_[h].load(lane_address(weight) + u.offset(h), vectors);
    }
  }

  // Multiplies all units, of which the first are held, and holds the first of `next` afterwards.
  // The sum of unit i goes to sums[i * kRowWarps].
  __device__ __forceinline__ void run(const char* weight, const Units& u, const char* next,
                                      const Units& next_units, const float (&x)[kInputs],
                                      float* sums) {
    const int vectors = u.vectors(), next_vectors = next_units.vectors();
    int i = 0;
#pragma unroll 1
    do {
#pragma unroll
      for (int h = 0; h < kHeld; ++h) {
        const int unit = i + h;
        const bool held = unit < u.count;
        if (held) multiply_unit(held_[h], x, sums + unit * kRowWarps);
        // The next product's unit waits in its place for the end of this product.
        const bool own = unit + kHeld < u.count;
        if (own || ((held || i == 0) && h < next_units.count)) {
          const int64_t offset = own ? u.offset(unit + kHeld) : next_units.offset(h);
          held_[h].load(lane_address(own ? weight : next) + offset, own ? vectors : next_vectors);
        }
      }
      i += kHeld;
    } while (i < u.count);
  }

 private:
  __device__ __forceinline__ static const char* lane_address(const char* weight) {
    return weight + threadIdx.x % 32 * 16;
  }

  __device__ __forceinline__ static void multiply_unit(const Unit<kVectors>& unit,
                                                       const float (&x)[kInputs], float* to) {
    constexpr int kPer = kInputs / kVectors;
    float even = 0.0f, odd = 0.0f;
#pragma unroll
    for (int j = 0; j < kVectors; ++j) multiply(unit.v[j], x + j * kPer, even, odd, T());
    float sum = even + odd;
#pragma unroll
    for (int width = 16; width > 0; width /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, width);
    if (threadIdx.x % 32 == 0) *to = sum;
  }

  Unit<kVectors> held_[kHeld];
};

}  // namespace decode
}  // namespace mamba
