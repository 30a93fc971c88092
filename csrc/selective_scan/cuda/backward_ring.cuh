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

// The turns at the ring, state after state: eight times the place in the ring, and in the highest
// bit whether the ring has gone round an odd number of times.
constexpr unsigned kRound = 1u << 31;
template <class S>
__device__ __forceinline__ unsigned next_turn(unsigned turn) {
  constexpr unsigned kLast = 8 * (S::kRing - 1);
  return (turn & ~kRound) == kLast ? turn + (kRound - kLast) : turn + 8;
}
template <class S>
__device__ __forceinline__ unsigned turn_before(unsigned turn) {
  constexpr unsigned kLast = 8 * (S::kRing - 1);
  return (turn & ~kRound) == 0 ? turn - (kRound - kLast) : turn - 8;
}

// Where the warps' sums of a state go, as SumsPlace says, in bytes from the first turn's.
template <class S>
__device__ __forceinline__ unsigned ring_offset(unsigned turn) {
  return (turn & ~kRound) * (S::kWarps * kSumsPitch * 2);
}
// The barriers of its place in the ring: all warps have written (0), it has been read (1).
template <class S, class Block>
__device__ __forceinline__ uint32_t ring_barrier(const Block& block, unsigned turn, int which) {
  return shared_address(block.smem + block.m.barriers) + which * S::kRing * 8 + (turn & ~kRound);
}

// Hands a state's sums to the warp that adds them up: dC (0) and dB (1). `free`: what place_is_free
// said earlier.
template <class S, class Block>
__device__ __forceinline__ bool place_is_free(const Block& block, unsigned turn) {
  return barrier_passed(ring_barrier<S>(block, turn, 1), ~turn / kRound);
}
template <class S, class Block>
__device__ __forceinline__ void wait_for_place(const Block& block, unsigned turn, bool free) {
  if (!free) barrier_wait(ring_barrier<S>(block, turn, 1), ~turn / kRound);
}
template <class S, class Block>
__device__ __forceinline__ void hand_over_sums(const Block& block, unsigned turn) {
  barrier_arrive_warp(ring_barrier<S>(block, turn, 0), block.at.lane());
}

// Sums a state's dC and dB over the warps and writes the block's share of them. Lanes 16 k + 4 i +
// j take the j-th four of the i-th steps, of C or B (k); each warp has two sums of them.
template <class S, class K, bool kGeneral>
__device__ __forceinline__ void store_sums(const BackwardBlock<S, K, kGeneral>& block,
                                           unsigned turn, int64_t t0, int state) {
  using M = BackwardMemory<S, kGeneral>;
  const BackwardPlace<S>& at = block.at;
  const BackwardArgs& a = block.a;
  barrier_wait(ring_barrier<S>(block, turn, 0), turn / kRound);
  const bool of_B = at.lane() & 16;
  const int i = at.lane() / 4 % 4;
  const float4* const from =
      reinterpret_cast<const float4*>(block.smem + block.m.sums + ring_offset<S>(turn)) +
      SumsPlace::at(of_B, at.lane() % 4) + i;
  float4 sum = from[0];
#pragma unroll
  for (int w = 1; w < 2 * S::kWarps; ++w) {
    const float4 v = from[w / 2 * kSumsPitch + w % 2 * 4];
    sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
  }
  barrier_arrive_warp(ring_barrier<S>(block, turn, 1), at.lane());
  if (kGeneral && (of_B ? a.p.constant_B : a.p.constant_C)) return;
  const int64_t t = t0 + i * S::L + at.lane() % 4 * 4;
  if (t >= a.plan.padded_length) return;
  float* const to = reinterpret_cast<float*>(block.start(M::kTensors + of_B));
  write_four(to + state * a.plan.padded_length + t, sum);
}

}  // namespace mamba
