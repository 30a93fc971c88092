// The product of a single row's step with int8 weights, on the tensor cores: converting weights to
// fp32 one by one would take longer than reading them. Weights become bf16, which is exact; an
// input is the sum of two bf16 numbers, which has 16 bits. Sums are fp32.
#pragma once

#include "row_product.cuh"

namespace mamba {
namespace decode {

// A row's inputs in shared memory: the upper and the lower halves of the even and of the odd ones.
template <>
class Inputs<int8_t> {
 public:
  __device__ Inputs(float* data, int size) : data_(reinterpret_cast<char*>(data)), size_(size) {}

  // Of input `i`, which is even.
  __device__ __forceinline__ unsigned offset(unsigned i) const { return i; }

  __device__ __forceinline__ void put_two(unsigned offset, float2 v) const {
    const Halves x(v.x, v.y);
    put<unsigned short>(0, offset, x.upper & 0xffffu);
    put<unsigned short>(1, offset, x.upper >> 16);
    put<unsigned short>(2, offset, x.lower & 0xffffu);
    put<unsigned short>(3, offset, x.lower >> 16);
  }
  __device__ __forceinline__ void put_four(unsigned offset, float4 v) const {
    const Halves even(v.x, v.z), odd(v.y, v.w);
    put<unsigned>(0, offset, even.upper);
    put<unsigned>(1, offset, odd.upper);
    put<unsigned>(2, offset, even.lower);
    put<unsigned>(3, offset, odd.lower);
  }
  __device__ __forceinline__ float2 two(unsigned i) const {
    return make_float2(half(0, i) + half(2, i), half(1, i) + half(3, i));
  }

  // Of 16 inputs, all in a plane; zeros beyond the row.
  __device__ __forceinline__ uint4 load(unsigned plane, unsigned vector) const {
    if (16 * vector >= size_) return make_uint4(0, 0, 0, 0);
    return *reinterpret_cast<const uint4*>(data_ + plane * size_ + 16 * vector);
  }

 private:
  // Of two numbers the nearest in bf16, and of what is left of them.
  struct Halves {
    unsigned upper, lower;
    __device__ __forceinline__ Halves(float first, float second) {
      upper = bits_of(first, second);
      lower = bits_of(first - __uint_as_float(upper << 16),
                      second - __uint_as_float(upper & 0xffff0000u));
    }
    __device__ __forceinline__ static unsigned bits_of(float first, float second) {
      const __nv_bfloat162 both = __floats2bfloat162_rn(first, second);
      return *reinterpret_cast<const unsigned*>(&both);
    }
  };

  template <typename V>
  __device__ __forceinline__ void put(unsigned plane, unsigned offset, unsigned v) const {
    *reinterpret_cast<V*>(data_ + plane * size_ + offset) = static_cast<V>(v);
  }
  __device__ __forceinline__ float half(unsigned plane, unsigned offset) const {
    const unsigned bits = *reinterpret_cast<const unsigned short*>(data_ + plane * size_ + offset);
    return __uint_as_float(bits << 16);
  }

  char* data_;
  unsigned size_;  // inputs; also the bytes of a plane
};

// bf16 of 128, twice. ptxas must not know it (gridDim.y is 1): beside the masks of even_weights()
// it makes two instructions of an AND and an OR with constants, but one if the second is a
// register.
__device__ __forceinline__ unsigned twice_128() { return 0x43004300u * gridDim.y; }

// Bytes 0 and 2 of four int8 weights as bf16. A number from 128 on has the seven lower bits of its
// byte at the end; subtracted are 128, or 256 where the byte is negative.
__device__ __forceinline__ unsigned even_weights(unsigned bytes, unsigned twice_128) {
  const unsigned v = (bytes & 0x007f007fu) | twice_128;
  const unsigned offset = (bytes & 0x00800080u) | twice_128;
  const __nv_bfloat162 both = __hsub2(*reinterpret_cast<const __nv_bfloat162*>(&v),
                                      *reinterpret_cast<const __nv_bfloat162*>(&offset));
  return *reinterpret_cast<const unsigned*>(&both);
}

// Eight weights of each lane, as two words: what lies in the first word's even bytes and in the
// second's makes the upper rows of A, the odd bytes make the lower ones.
__device__ __forceinline__ void multiply_eight(float (&d)[4], unsigned first, unsigned second,
                                               unsigned x_first, unsigned x_second, unsigned k) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(even_weights(first, k)), "r"(even_weights(first >> 8, k)), "r"(even_weights(second, k)),
        "r"(even_weights(second >> 8, k)), "r"(x_first), "r"(x_second));
}

// Multiplies `rows` rows, four at a time, of which eight lanes take 16 bytes each at a time. Piece
// k of row i goes to sums[i * pieces + k].
//
// Of A's 16 rows, weight row g / 2 fills rows g and g + 8: its lanes' even weights the upper, the
// odd ones the lower, four lanes' in one of the rows and the other four's in the other. B's columns
// are the inputs of these four sets, each as upper and lower halves. Of the result, each row uses
// two columns.
__device__ __forceinline__ void multiply_rows(const Product& c, int rows, Inputs<int8_t> inputs,
                                              RingReader& ring, float* sums) {
  constexpr int kLanes = 8, kHeight = 32 / kLanes;
  const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  const int own_row = lane / kLanes;
  const WarpPart part = part_of(c);
  const int first = part.piece * kLanes * c.vectors;
  uint4 x[kMaxVectorsInt8];
#pragma unroll
  for (int j = 0; j < kMaxVectorsInt8; ++j) {
    const int plane = g % 2 * 2 + g / 2 % 2, vector = first + j * kLanes + g / 4 * 4 + t;
    x[j] = j < c.vectors ? inputs.load(plane, vector) : make_uint4(0, 0, 0, 0);
  }
  const unsigned k = twice_128();
  // A lane's own pieces of 16 bytes.
  const int vectors = (c.row_vectors - first - lane % kLanes + kLanes - 1) / kLanes;
  const int step = c.teams * kHeight, row_bytes = c.row_vectors * 16;
  int row = part.team < c.teams ? part.team * kHeight : rows;
#pragma unroll 1
  for (int begin = 0; begin < rows; begin += c.slot_rows) {
    const int end = begin + c.slot_rows < rows ? begin + c.slot_rows : rows;
    const char* slot = ring.wait() + (first + lane % kLanes) * 16;
#pragma unroll 1
    for (; row < end; row += step) {
      const int own = row + own_row < end ? row + own_row : end - 1;
      const uint4* from = reinterpret_cast<const uint4*>(slot + (own - begin) * row_bytes);
      float d[4] = {};
      uint4 w = make_uint4(0, 0, 0, 0);
      if (vectors > 0) w = *from;
#pragma unroll
      for (int j = 0; j < kMaxVectorsInt8; ++j) {
        if (j >= c.vectors) break;
        const uint4 v = w;
        // Beyond the row anything meets zeros.
        if (j + 1 < kMaxVectorsInt8 && j + 1 < vectors) w = from[(j + 1) * kLanes];
        multiply_eight(d, v.x, v.y, x[j].x, x[j].y, k);
        multiply_eight(d, v.z, v.w, x[j].z, x[j].w, k);
      }
      float sum = t % 2 == 0 ? d[0] + d[1] : d[2] + d[3];
      if (t / 2 != g % 2) sum = 0.0f;
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 6);
      if (lane % kLanes == 0 && row + own_row < end) {
        sums[(row + own_row) * c.pieces + part.piece] = sum;
      }
    }
    ring.release();
  }
}

}  // namespace decode
}  // namespace mamba
