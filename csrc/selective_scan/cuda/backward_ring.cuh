// How the warps of a block sum dB and dC, a ring of some states deep, so that none waits for the
// slowest of them at every state.
#pragma once

#include "backward_block.cuh"

namespace mamba {

// Before a block's first use of its barriers.
template <class S>
__device__ __forceinline__ void begin_barriers(const char* barriers) {
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2 * S::kRing; ++i) {
      barrier_init(shared_address(barriers) + 8 * i, i < S::kRing ? S::kWarps : 1);
    }
  }
}

// Where the warps' sums of a state go, [warp][C or B][lane]; `count` counts the states.
template <class S, class Block>
__device__ __forceinline__ float4* ring_sums(const Block& block, unsigned count) {
  return reinterpret_cast<float4*>(block.smem + block.m.sums) + count % S::kRing * (S::kWarps * 64);
}
// The barriers of its place in the ring: all warps have written (0), it has been read (1).
template <class S, class Block>
__device__ __forceinline__ uint32_t ring_barrier(const Block& block, unsigned count, int which) {
  return shared_address(block.smem + block.m.barriers) + (which * S::kRing + count % S::kRing) * 8;
}

// Hands a state's sums to the warp that adds them up.
template <class S, class Block>
__device__ __forceinline__ void write_sums(const Block& block, unsigned count,
                                           const StateSums& sums) {
  const BackwardPlace<S>& at = block.at;
  barrier_wait(ring_barrier<S>(block, count, 1), (count / S::kRing & 1) ^ 1);
  float4* const to = ring_sums<S>(block, count) + at.warp() * 64 + at.lane();
  to[0] = make_float4(sums.C[0], sums.C[1], sums.C[2], sums.C[3]);
  to[32] = make_float4(sums.B[0], sums.B[1], sums.B[2], sums.B[3]);
  barrier_arrive_warp(ring_barrier<S>(block, count, 0), at.lane());
}

// Sums a state's dC and dB over the warps and writes the block's share of them. Lanes 16 k + 4 i +
// j take the j-th four of the i-th steps, of C or B (k); each warp has two sums of them.
template <class S, class K, bool kGeneral>
__device__ __forceinline__ void store_sums(const BackwardBlock<S, K, kGeneral>& block,
                                           unsigned count, int64_t t0, int state) {
  using M = BackwardMemory<S, kGeneral>;
  const BackwardPlace<S>& at = block.at;
  const BackwardArgs& a = block.a;
  barrier_wait(ring_barrier<S>(block, count, 0), count / S::kRing & 1);
  const bool of_B = at.lane() & 16;
  const int i = at.lane() / 4 % 4;
  const float4* const from = ring_sums<S>(block, count) + (of_B ? 32 : 0) + 8 * i + at.lane() % 4;
  float4 sum = from[0];
#pragma unroll
  for (int w = 1; w < 2 * S::kWarps; ++w) {
    const float4 v = from[w / 2 * 64 + w % 2 * 4];
    sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
  }
  barrier_arrive_warp(ring_barrier<S>(block, count, 1), at.lane());
  if (kGeneral && (of_B ? a.p.constant_B : a.p.constant_C)) return;
  const int64_t t = t0 + i * S::L + at.lane() % 4 * 4;
  if (t >= a.plan.padded_length) return;
  float* const to = reinterpret_cast<float*>(block.start(M::kTensors + of_B));
  write_four(to + state * a.plan.padded_length + t, sum);
}

// Warps take turns at summing a state over them.
template <class S, class K, bool kGeneral>
__device__ __forceinline__ void add_in_turn(const BackwardBlock<S, K, kGeneral>& block, int k,
                                            int state, unsigned count) {
  if (count % S::kWarps == block.at.warp()) store_sums(block, count, block.step_of(k), state);
}

}  // namespace mamba
