// A matrix-vector product of a single row's step: weights from the ring, inputs in registers.
#pragma once

#include "../../common/cuda_convert.cuh"
#include "row_ring.cuh"

namespace mamba {
namespace decode {

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

// A row's inputs in shared memory, as fp32. Lanes take 16 bytes of weights, of dtype W, each; in
// halves that is eight inputs, which lie in two planes of four each: no lanes' reads collide.
template <typename W>
class Inputs {
 public:
  static constexpr int kPlanes = 4 / sizeof(W);
  static constexpr int kPer = 4 * kPlanes;  // inputs of a lane's 16 bytes

  __device__ Inputs(float* data, int size) : data_(data), vectors_(size / kPer) {}

  // Where input `i` is; the rest of its four follows.
  __device__ __forceinline__ unsigned offset(unsigned i) const {
    const unsigned four = i / 4;
    return 4 * (four % kPlanes * vectors_ + four / kPlanes) + i % 4;
  }

  __device__ __forceinline__ void put_two(unsigned offset, float2 v) const {
    *reinterpret_cast<float2*>(data_ + offset) = v;
  }
  __device__ __forceinline__ void put_four(unsigned offset, float4 v) const {
    *reinterpret_cast<float4*>(data_ + offset) = v;
  }
  __device__ __forceinline__ float2 two(unsigned i) const {
    return *reinterpret_cast<const float2*>(data_ + offset(i));
  }

  // Of 16 bytes of weights; zeros beyond the row.
  __device__ __forceinline__ void load(float* to, unsigned vector) const {
#pragma unroll
    for (int plane = 0; plane < kPlanes; ++plane) {
      float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (vector < vectors_) {
        v = reinterpret_cast<const float4*>(data_)[plane * vectors_ + vector];
      }
      to[4 * plane] = v.x, to[4 * plane + 1] = v.y, to[4 * plane + 2] = v.z,
             to[4 * plane + 3] = v.w;
    }
  }

 private:
  float* data_;
  unsigned vectors_;
};

// A warp's part of a product.
struct WarpPart {
  int piece, team;
};

__device__ __forceinline__ WarpPart part_of(const Product& c) {
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int team = static_cast<int>(c.team_of_warps >> 4 * warp & 15);
  return {warp - team * c.pieces, team};
}

// Multiplies `rows` rows. Piece k of row i goes to sums[i * pieces + k].
template <typename W, int kVectors>
__device__ __forceinline__ void multiply_rows(const Product& c, int rows, Inputs<W> inputs,
                                              RingReader& ring, float* sums) {
  constexpr int kPer = Inputs<W>::kPer;
  constexpr int kAtOnce = kVectors <= 2 ? 2 : 1;
  const int lane = static_cast<int>(threadIdx.x) % 32, lanes = 1 << c.lanes_log2;
  const int of_row = lane & (lanes - 1), own_row = lane >> c.lanes_log2;
  const WarpPart part = part_of(c);
  const int first = part.piece * lanes * kVectors + of_row;
  float x[kVectors * kPer];
  bool exists[kVectors];
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    inputs.load(x + j * kPer, first + j * lanes);
    exists[j] = first + j * lanes < c.row_vectors;
  }
  const int height = 32 >> c.lanes_log2, step = c.teams * height, row_bytes = c.row_vectors * 16;
  int row = part.team < c.teams ? part.team * height : rows;
#pragma unroll 1
  for (int begin = 0; begin < rows; begin += c.slot_rows) {
    const int end = begin + c.slot_rows < rows ? begin + c.slot_rows : rows;
    const char* from = ring.wait() + (own_row - begin) * row_bytes + first * 16;
#pragma unroll 1
    while (row < end) {
      uint4 w[kAtOnce][kVectors];
#pragma unroll
      for (int t = 0; t < kAtOnce; ++t) {
#pragma unroll
        for (int j = 0; j < kVectors; ++j) {
          w[t][j] = make_uint4(0, 0, 0, 0);
          if (exists[j] && row + t * step < end) {
            w[t][j] = *reinterpret_cast<const uint4*>(from + (row + t * step) * row_bytes +
                                                      (j << c.lanes_log2) * 16);
          }
        }
      }
      float sum[kAtOnce];
#pragma unroll
      for (int t = 0; t < kAtOnce; ++t) {
        float even = 0.0f, odd = 0.0f;
#pragma unroll
        for (int j = 0; j < kVectors; ++j) multiply(w[t][j], x + j * kPer, even, odd, W());
        sum[t] = even + odd;
      }
#pragma unroll 1
      for (int width = lanes / 2; width > 0; width /= 2) {
#pragma unroll
        for (int t = 0; t < kAtOnce; ++t) sum[t] += __shfl_xor_sync(0xffffffffu, sum[t], width);
      }
#pragma unroll
      for (int t = 0; t < kAtOnce; ++t) {
        if (of_row == 0 && row + own_row < end) {
          sums[(row + own_row) * c.pieces + part.piece] = sum[t];
        }
        if (row < end) row += step;
      }
    }
    ring.release();
  }
}

template <typename W>
__device__ __forceinline__ void multiply_rows(const Product& c, int rows, Inputs<W> inputs,
                                              RingReader& ring, float* sums) {
  switch (c.vectors) {
    case 1:
      return multiply_rows<W, 1>(c, rows, inputs, ring, sums);
    case 2:
      return multiply_rows<W, 2>(c, rows, inputs, ring, sums);
    case 3:
      return multiply_rows<W, 3>(c, rows, inputs, ring, sums);
    default:
      return multiply_rows<W, kMaxVectors>(c, rows, inputs, ring, sums);
  }
}

}  // namespace decode
}  // namespace mamba
