// Special functions through the GPU's units for them, results below the normal numbers flushed to
// 0.
#pragma once

namespace mamba {

__device__ __forceinline__ float fast_exp2(float v) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(v));
  return power;
}

__device__ __forceinline__ float fast_reciprocal(float v) {
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(v));
  return inverse;
}

__device__ __forceinline__ float fast_sigmoid(float v) {
  return fast_reciprocal(1.0f + fast_exp2(-1.4426950408889634f * v));
}

}  // namespace mamba
