// The elementwise functions of the scan in fp32: special-function instructions where they are
// accurate, polynomials where they are not.
#pragma once

#include "../../common/cuda_math.cuh"

namespace mamba {

constexpr float kLog2e = 1.44269504088896340736f;

// exp(delta a), a = A in the base of fast_exp2, which is 2e-8 too small on average where its result
// is near 1 (measured on an H100): products of thousands of decays would be off by many roundings.
// A shift of the exponent makes up for that. Without a time step the result is 1 all the same.
__device__ __forceinline__ float decay_of(float delta, float a) {
  constexpr float kShift = 2e-8f;
  return fast_exp2(fmaf(delta, a, kShift));
}

// log(1 + exp(x)) with a relative error below 3e-7 for every x: the logarithm of 1 + e, e in (0,
// 1], is e times a polynomial (weighted minimax fit, 3e-8), so that tiny results keep their digits.
// Above 20 it is x itself in fp32, which is the field's convention.
// `e` is exp(-|x|). With e = 0 and `below` = -inf this is x.
__device__ __forceinline__ float softplus(float x, float e, float below) {
  float q = 0.005232669413089752f;
  q = fmaf(q, e, -0.029505137354135513f);
  q = fmaf(q, e, 0.07822578400373459f);
  q = fmaf(q, e, -0.1366323083639145f);
  q = fmaf(q, e, 0.19105999171733856f);
  q = fmaf(q, e, -0.2484298050403595f);
  q = fmaf(q, e, 0.3331909775733948f);
  q = fmaf(q, e, -0.4999949336051941f);
  q = fmaf(q, e, 0.9999999403953552f);
  return fmaf(q, e, fmaxf(x, below));
}
__device__ __forceinline__ float softplus(float x) {
  return softplus(x, fast_exp2(-kLog2e * fabsf(x)), 0.0f);
}

}  // namespace mamba
