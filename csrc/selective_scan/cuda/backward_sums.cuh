// The sums of the scan's backward over time: of A, of constant B and C, of D and of delta's bias.
#pragma once

#include "backward_block.cuh"

namespace mamba {

// A sum in shared memory goes to global memory every so many tiles: one fp32 sum of thousands of
// tiles would lose digits. What rounding takes from the sum there stays here.
constexpr int kSumTiles = 32;

__device__ __forceinline__ float add_all(float a, float b, float& rest) {
  const float sum = a + b, of_b = sum - a;
  rest = (a - (sum - of_b)) + (b - of_b);
  return sum;
}

// Calls f(sums, place in a record) for the sums that a record holds.
template <bool kGeneral, class F>
__device__ __forceinline__ void each_sum(const BackwardArgs& a, F&& f) {
  f(a.dA, 2);
  if constexpr (kGeneral) {
    if (a.p.constant_B) f(a.dB, 3);
    if (a.p.constant_C) f(a.dC, 4);
  }
}

// Each sum by the lane that adds to it.
template <class S, class K, bool kGeneral>
__device__ __forceinline__ void move_sums(const BackwardBlock<S, K, kGeneral>& block, bool first) {
  using M = BackwardMemory<S, kGeneral>;
  const BackwardPlace<S>& at = block.at;
  const BackwardArgs& a = block.a;
  if (at.i() != 0 || at.c() >= block.channels()) return;
  const int64_t part = at.row * a.plan.segments + at.segment;
  const int64_t to = (part * a.p.channels + at.channel + at.c()) * block.n;
  float* const record = block.floats(block.m.records) + at.c();
#pragma unroll 1
  for (int s = 0; s < block.n; ++s) {
    each_sum<kGeneral>(a, [&](float* sums, int which) {
      float& sum = record[s * M::kRecordPitch + which * S::kChannels];
      float rest = 0.0f;
      sums[to + s] = first ? sum : add_all(sums[to + s], sum, rest);
      sum = rest;
    });
  }
}

// What is left of the sums, and what leaves the row's first step.
template <class S, class K, bool kGeneral>
__device__ __forceinline__ void end_sums(const BackwardBlock<S, K, kGeneral>& block) {
  using M = BackwardMemory<S, kGeneral>;
  const BackwardPlace<S>& at = block.at;
  const BackwardArgs& a = block.a;
  const int n = block.n;
  const int64_t part = at.row * a.plan.segments + at.segment;
  const int64_t size = a.p.channels * n, first = at.channel * n;
  const bool moved = block.tiles() > kSumTiles;
  for (int i = at.thread(); i < n * at.channels; i += S::kThreads) {
    const float* const record = block.floats(block.m.records) + i % n * M::kRecordPitch + i / n;
    each_sum<kGeneral>(a, [&](float* sums, int which) {
      float& sum = sums[part * size + first + i];
      const float rest = record[which * S::kChannels];
      sum = moved ? sum + rest : rest;
    });
    if (a.dinitial_state && !a.events.before && at.segment == 0) {
      a.dinitial_state[at.row * size + first + i] = record[S::kChannels];
    }
  }
  const float2 own = *block.totals();
  const float d = sum_steps(own.x), bias = sum_steps(own.y);
  if (at.i() != 0 || at.c() >= at.channels) return;
  const int64_t to = part * a.p.channels + at.channel + at.c();
  if (a.dD) a.dD[to] = d;
  if (a.ddelta_bias) a.ddelta_bias[to] = bias;
}

}  // namespace mamba
