// Sums of products of one unit of weights with the inputs of every batch row. fp16 and bf16 weights
// go through the tensor cores: products are exact and sums fp32. With fp32 weights it is plain fp32
// arithmetic.
#pragma once

#include <type_traits>

#include "../../common/cuda_convert.cuh"
#include "stream.cuh"

namespace mamba {
namespace decode {

template <typename T>
__device__ __forceinline__ void multiply_add(float (&d)[4], uint4 a, uint2 b) {
  if constexpr (std::is_same_v<T, __half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y));
  }
}

// 16 bytes of inputs, in the order in which they lie in shared memory: words 0, 2, 1, 3 of halves.
template <typename T>
__device__ __forceinline__ uint4 arranged(uint4 v) {
  return sizeof(T) == 4 ? v : make_uint4(v.x, v.z, v.y, v.w);
}

// Where input `i` of a row lies in that order.
template <typename T>
__device__ __forceinline__ int arranged_index(int i) {
  if (sizeof(T) == 4) return i;
  const int word = i / 2 % 4;
  return i + (word == 1 ? 2 : word == 2 ? -2 : 0);
}

// The sums of a warp for a tile of eight outputs and up to kRows batch rows.
//
// A lane's piece of weights, words w0 to w3 of row g, is used as it lies in its registers as a
// quarter of the 16 x 16 matrix A: the upper eight rows of A are words 0 and 2 of the eight weight
// rows, the lower ones words 1 and 3. Columns of B are the same halves of the batch rows. With up
// to four rows B holds both halves and one instruction does all; the parts of the result where
// different halves meet are not used. More rows take two instructions, one for each half.
template <typename T, int kRows>
class TileSums {
  static_assert(kRows == 4 || kRows == 8, "rows are columns of B");
  static constexpr int kSets = kRows / 4;  // accumulators

 public:
  // Where a lane's inputs begin; the rows are `pitch` bytes apart.
  __device__ static const char* lane_inputs(const char* inputs, int pitch, int batch) {
    const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
    const int row = kRows == 4 ? g % 4 : g;
    // A row that does not exist gives results that nobody reads.
    const char* from = inputs + (row < batch ? row : batch - 1) * pitch + t * 16;
    return kRows == 4 ? from + g / 4 * 8 : from;
  }

  using Inputs = std::conditional_t<kRows == 4, uint2, uint4>;

  __device__ static __forceinline__ Inputs load(const char* from) {
    return *reinterpret_cast<const Inputs*>(from);
  }

  __device__ __forceinline__ void add(uint4 w, const Inputs& v) {
    multiply_add<T>(sum_[0], w, make_uint2(v.x, v.y));
    if constexpr (kRows == 8) multiply_add<T>(sum_[1], w, make_uint2(v.z, v.w));
  }

  // Writes (batch, 8) sums.
  __device__ __forceinline__ void store(float* to, int batch) const {
    const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
    if constexpr (kRows == 4) {
      const float first = sum_[0][0] + __shfl_down_sync(0xffffffffu, sum_[0][2], 2);
      const float second = sum_[0][1] + __shfl_down_sync(0xffffffffu, sum_[0][3], 2);
      if (2 * t < batch && t < 2) to[2 * t * kTileRows + g] = first;
      if (2 * t + 1 < batch && t < 2) to[(2 * t + 1) * kTileRows + g] = second;
    } else {
      const int b = 2 * t;
      if (b < batch) to[b * kTileRows + g] = sum_[0][0] + sum_[1][2];
      if (b + 1 < batch) to[(b + 1) * kTileRows + g] = sum_[0][1] + sum_[1][3];
    }
  }

 private:
  float sum_[kSets][4] = {};
};

template <int kRows>
class TileSums<float, kRows> {
 public:
  __device__ static const char* lane_inputs(const char* inputs, int, int) {
    return inputs + threadIdx.x % 4 * 16;
  }

  struct Inputs {
    const char* from;
  };
  __device__ static __forceinline__ Inputs load(const char* from) { return {from}; }

  __device__ __forceinline__ void add(uint4 w, const Inputs& v, int pitch, int batch) {
    const float4 weights = make_float4(__uint_as_float(w.x), __uint_as_float(w.y),
                                       __uint_as_float(w.z), __uint_as_float(w.w));
#pragma unroll
    for (int b = 0; b < kRows; ++b) {
      if (b >= batch) break;
      const float4 x = *reinterpret_cast<const float4*>(v.from + b * pitch);
      sum_[b] = fmaf(weights.x, x.x, sum_[b]);
      sum_[b] = fmaf(weights.y, x.y, sum_[b]);
      sum_[b] = fmaf(weights.z, x.z, sum_[b]);
      sum_[b] = fmaf(weights.w, x.w, sum_[b]);
    }
  }

  __device__ __forceinline__ void store(float* to, int batch) const {
    const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int b = 0; b < kRows; ++b) {
      if (b >= batch) break;
      float sum = sum_[b];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      if (t == 0) to[b * kTileRows + g] = sum;
    }
  }

 private:
  float sum_[kRows] = {};
};

// Adds up to kGroup units: weights lie `step` bytes apart, inputs a unit.
template <typename T, int kRows>
__device__ __forceinline__ void add_units(TileSums<T, kRows>& sums, const char* weights, int step,
                                          const char* inputs, int pitch, int batch, int units) {
  uint4 w[kGroup];
  typename TileSums<T, kRows>::Inputs v[kGroup];
  // What lies behind the last unit is read and not used.
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    w[i] = *reinterpret_cast<const uint4*>(weights + i * step);
    v[i] = TileSums<T, kRows>::load(inputs + i * kUnitBytes);
  }
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    if (i >= units) break;
    if constexpr (sizeof(T) == 4) {
      sums.add(w[i], v[i], pitch, batch);
    } else {
      sums.add(w[i], v[i]);
    }
  }
}

}  // namespace decode
}  // namespace mamba
