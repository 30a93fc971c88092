// Products of small tiles on the tensor cores: 16 rows of a times 8 rows of b, sums in fp32.
//
// A lane (group g = lane / 4, place t = lane % 4) brings rows g and g + 8 of a and row g of b. The
// order of the inputs is free as long as a and b agree, so a lane takes neighbouring ones: 8 from
// 8 t on of every 32, or 4 from 4 t on of 16. It gets rows g (sums 0, 1) and g + 8 (2, 3) at
// columns 2 t and 2 t + 1.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace mamba {

template <typename T>
__device__ __forceinline__ void multiply_tile(float (&sum)[4], uint32_t a0, uint32_t a1,
                                              uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
}

// 32 inputs: rows g and g + 8 of a, row g of b.
template <typename T>
__device__ __forceinline__ void multiply_32(float (&sum)[4], const uint4& low, const uint4& high,
                                            const uint4& b) {
  multiply_tile<T>(sum, low.x, high.x, low.y, high.y, b.x, b.y);
  multiply_tile<T>(sum, low.z, high.z, low.w, high.w, b.z, b.w);
}

// 16 inputs.
template <typename T>
__device__ __forceinline__ void multiply_16(float (&sum)[4], const uint2& low, const uint2& high,
                                            const uint2& b) {
  multiply_tile<T>(sum, low.x, high.x, low.y, high.y, b.x, b.y);
}

}  // namespace mamba
