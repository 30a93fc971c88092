// The sequential forward scan's inner part: four lanes walk the steps of a channel in order.
#pragma once

#include "forward_tile.cuh"

namespace mamba {
namespace sequential {

// How steps are prepared and finished: as in the parallel kernel, lanes own steps then.
using Shape = ScanShape<8, 2, 8, 16, 1, 3>;
constexpr int kSteps = Shape::kSteps, kChannels = Shape::kChannels;
constexpr int kLanes = 4;  // of a channel
static_assert(Shape::kWarpChannels * kLanes == 32, "a warp prepares what it walks");
// Words of shared memory; the odd multiples of 4 spread neighbouring rows over the banks.
constexpr int kStepPitch = 2 * kSteps + 4;                // (delta, delta u) of a channel
constexpr int kProjectionPitch = 2 * Shape::kStates + 4;  // (B, C) of a step
constexpr int kOutPitch = kSteps + 4;                     // C h of a channel

// Which of the kLanes lanes of its channel this thread is, and the channel's place in the block.
// Lanes that differ in bit 0 walk the same channel and so read the same steps, those that differ in
// bit 1 the same states and so read the same B and C: either way 16-byte reads of a warp then take
// two accesses instead of four.
constexpr int kWarpRows = 32 / kLanes;
__device__ __forceinline__ int walking_lane() { return threadIdx.x % 2 + threadIdx.x / 16 % 2 * 2; }
__device__ __forceinline__ int channel_in_warp() { return threadIdx.x / 2 % kWarpRows; }
__device__ __forceinline__ int walking_channel() {
  return threadIdx.x / 32 * kWarpRows + channel_in_warp();
}

// What seq_idx says about the steps of a tile, and which groups of four steps it concerns.
struct TileEvents {
  int before[kSteps], after[kSteps];
  unsigned concerned;

  __device__ void fill(const ForwardArgs& a, int row, int64_t t0) {
    if (threadIdx.x == 0) concerned = 0;
    __syncthreads();
    if (threadIdx.x < kSteps) {
      const int t = threadIdx.x;
      const bool exists = t0 + t < a.p.length;
      const int64_t step = row * a.p.length + t0 + t;
      before[t] = exists ? a.events.before[step] : CudaScanEvents::kNothing;
      after[t] = exists ? a.events.after[step] : CudaScanEvents::kNothing;
      const bool starts = before[t] >= 0 || before[t] == CudaScanEvents::kFreshStart;
      if (starts || after[t] >= 0) atomicOr(&concerned, 1u << t / 4);
    }
  }
};

// A lane's states of one channel: kPer of them from `first`.
template <int kPer>
struct States {
  float h[kPer], A[kPer];  // A in the base of fast_exp2
  int first, count;        // count of them exist

  __device__ __forceinline__ void place(const ForwardArgs& a, int block) {
    first = block + walking_lane() * kPer;
    count = clamp_int(a.p.state_dim - first, 0, kPer);
  }
  __device__ __forceinline__ void load_A(const ForwardArgs& a, int channel) {
#pragma unroll
    for (int k = 0; k < kPer; ++k)
      A[k] = k < count ? kLog2e * load_at(a.p.A, channel, first + k) : 0.0f;
  }
  // To and from rows of state_dim states.
  __device__ __forceinline__ void load(const float* row) {
#pragma unroll
    for (int k = 0; k < kPer; ++k) h[k] = row && k < count ? row[first + k] : 0.0f;
  }
  __device__ __forceinline__ void store(float* row, bool aligned) const {
    if (aligned && count == kPer) {
      if constexpr (kPer == 4) {
        *reinterpret_cast<float4*>(row + first) = make_float4(h[0], h[1], h[2], h[3]);
      } else {
        *reinterpret_cast<float2*>(row + first) = make_float2(h[0], h[1]);
      }
      return;
    }
#pragma unroll
    for (int k = 0; k < kPer; ++k) {
      if (k < count) row[first + k] = h[k];
    }
  }
};

template <int kPer>
__device__ __forceinline__ void read_states(float (&v)[kPer], const float* from) {
  if constexpr (kPer == 4) {
    const float4 four = *reinterpret_cast<const float4*>(from);
    v[0] = four.x, v[1] = four.y, v[2] = four.z, v[3] = four.w;
  } else {
    const float2 two = *reinterpret_cast<const float2*>(from);
    v[0] = two.x, v[1] = two.y;
  }
}

// Returns C h of the lane's states after the step.
template <int kPer>
__device__ __forceinline__ float run_step(States<kPer>& s, float delta, float du,
                                          const float (&B)[kPer], const float (&C)[kPer]) {
  float sum = 0.0f;
#pragma unroll
  for (int k = 0; k < kPer; ++k) {
    s.h[k] = fmaf(decay_of(delta, s.A[k]), s.h[k], du * B[k]);
    sum = k ? fmaf(C[k], s.h[k], sum) : C[k] * s.h[k];
  }
  return sum;
}

// The sums of four steps over the four lanes of a channel; lane j returns that of step j.
__device__ __forceinline__ float join_lanes(const float (&v)[4], int j) {
  const bool odd = j & 1, high = j & 2;
  float first = odd ? v[1] : v[0], second = odd ? v[3] : v[2];
  first += __shfl_xor_sync(0xffffffffu, odd ? v[0] : v[1], 1);
  second += __shfl_xor_sync(0xffffffffu, odd ? v[2] : v[3], 1);
  const float kept = high ? second : first;
  return kept + __shfl_xor_sync(0xffffffffu, high ? first : second, 16);
}

// seq_idx and constant B and C, where a kernel serves them.
template <int kPer>
struct General {
  const TileEvents* events;
  float B[kPer], C[kPer];
  int channel;  // -1: it does not exist

  __device__ __forceinline__ void load(const ForwardArgs& a, const States<kPer>& s, int at,
                                       bool exists, const TileEvents* seen) {
    events = seen, channel = exists ? at : -1;
#pragma unroll
    for (int k = 0; k < kPer; ++k) {
      const int state = s.first + min(k, max(s.count, 1) - 1);
      const bool valid = k < s.count;
      B[k] = valid && a.p.constant_B ? load_at(a.p.B, at, state) : 0.0f;
      C[k] = valid && a.p.constant_C ? load_at(a.p.C, at, state) : 0.0f;
    }
  }

  // Replaces the state where a sequence starts, and hands it out where one ends.
  __device__ __forceinline__ void before_step(const ForwardArgs& a, States<kPer>& s, int t) const {
    const int id = events->before[t];
    if (id < 0 && id != CudaScanEvents::kFreshStart) return;
    const bool given = id >= 0 && channel >= 0;
    s.load(given ? a.p.initial_state + (id * a.p.channels + channel) * a.p.state_dim : nullptr);
  }
  __device__ __forceinline__ void after_step(const ForwardArgs& a, const States<kPer>& s,
                                             int t) const {
    const int id = events->after[t];
    if (id < 0 || channel < 0) return;
    s.store(a.p.final_state + (id * a.p.channels + channel) * a.p.state_dim, false);
  }
};

// What four steps of a walk read from shared memory.
template <int kPer>
struct FourSteps {
  float pairs[8], B[4][kPer], C[4][kPer];

  __device__ __forceinline__ void read(const float* steps, const float* rows, int t) {
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      const float4 four = *reinterpret_cast<const float4*>(steps + 2 * t + i);
      pairs[i] = four.x, pairs[i + 1] = four.y, pairs[i + 2] = four.z, pairs[i + 3] = four.w;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      read_states<kPer>(B[i], rows + (t + i) * kProjectionPitch);
      read_states<kPer>(C[i], rows + (t + i) * kProjectionPitch + Shape::kStates);
    }
  }
};

// Walks the tile: `steps` (delta, delta u) and `sums` are rows of the lane's channel, `rows` the
// lane's place in (B, C) of the first step. `add`: onto the sums of the states before. Reads run
// one group of four steps ahead and sums across lanes one behind, so that neither is waited for.
template <bool kGeneral, int kPer>
__device__ __forceinline__ void walk(States<kPer>& s, const ForwardArgs& a, const float* steps,
                                     const float* rows, float* sums, int exist, bool add,
                                     const General<kPer>& general) {
  const int j = walking_lane();
  float* to = sums + j;
  FourSteps<kPer> now;
  now.read(steps, rows, 0);
  float v[4] = {};
#pragma unroll 2
  for (int t = 0; t < exist; t += 4) {
    FourSteps<kPer> next;
    next.read(steps, rows, min(t + 4, kSteps - 4));
    float sum = join_lanes(v, j);
    if (add && t > 0) sum += to[t - 4];
    const bool concerned = kGeneral && general.events && general.events->concerned >> t / 4 & 1;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (kGeneral) {
#pragma unroll
        for (int k = 0; k < kPer; ++k) {
          now.B[i][k] = a.p.constant_B ? general.B[k] : now.B[i][k];
          now.C[i][k] = a.p.constant_C ? general.C[k] : now.C[i][k];
        }
        if (concerned) general.before_step(a, s, t + i);
      }
      v[i] = run_step<kPer>(s, now.pairs[2 * i], now.pairs[2 * i + 1], now.B[i], now.C[i]);
      if (concerned) general.after_step(a, s, t + i);
    }
    if (t > 0) to[t - 4] = sum;
    now = next;
  }
  const int last = (exist - 1) / 4 * 4;
  const float sum = join_lanes(v, j);
  to[last] = add ? to[last] + sum : sum;
}

}  // namespace sequential
}  // namespace mamba
