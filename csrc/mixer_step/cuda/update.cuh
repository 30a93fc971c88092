// dt_proj and the recurrence's step. A block has 64 channels and walks over groups of eight rows:
// the tensor cores give delta to the lanes that have the channels' states, two lanes a channel.
#pragma once

#include "../../common/cuda_chain.cuh"
#include "../../common/cuda_math.cuh"
#include "../../common/cuda_mma.cuh"
#include "../../state_update/cuda/rows.cuh"
#include "../params.h"

namespace mamba {

constexpr int kStepRows = 8;  // of a group: the tensor cores' tile
constexpr int kStepStates = 16, kEachLane = kStepStates / 2;
constexpr int kUpdateThreads = 128, kUpdateChannels = kUpdateThreads / 2;
constexpr int kMostProjected = 512, kPieces = kStepRows * kMostProjected / 8 / kUpdateThreads;

__device__ __forceinline__ void copy_ahead_16(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(to))),
               "l"(from)
               : "memory");
}

// The block's rows of dt_proj, and what x_proj and dt_proj give for a group of rows.
template <typename T>
struct UpdateShared {
  float* delta;                 // (rows, channels)
  float* selected;              // (rows, B and C)
  T* low;                       // (rows, low_pitch)
  T* weight;                    // (channels, weight_pitch)
  int weight_pitch, low_pitch;  // so that a matrix product's rows lie on different banks

  __host__ __device__ UpdateShared(void* memory, int64_t rank) {
    weight_pitch = static_cast<int>((rank + 15) / 32 * 32 + 16);
    low_pitch = static_cast<int>((rank + 31) / 64 * 64 + 32);
    delta = static_cast<float*>(memory);
    selected = delta + kStepRows * kUpdateChannels;
    low = reinterpret_cast<T*>(selected + kStepRows * 2 * kStepStates);
    weight = low + kStepRows * low_pitch;
  }
  size_t bytes() const {
    return reinterpret_cast<size_t>(weight + kUpdateChannels * weight_pitch) -
           reinterpret_cast<size_t>(delta);
  }
};

// What a lane has of a group of rows. Offsets are of (row, channel); z is that of every second row.
template <typename T, typename TState>
struct UpdateRows {
  uint32_t offset[kStepRows];
  Bits<TState, kEachLane> state[kStepRows];
  T z[kStepRows / 2], x[kStepRows];
  uint4 pieces[kPieces];
};

// What a lane has of its channel, and of the pair of channels that it computes delta of. Converted
// only when all loads are under way: they come from memory one after the other else.
struct UpdateParameters {
  RawFloats<kEachLane> A_log;
  RawFloats<2> D, bias;
};

template <typename T, typename TState>
struct UpdateBlock {
  const MixerStepParams& p;
  const UpdateShared<T>& shared;
  uint32_t channel, channels, batch;
  float A[kEachLane], D, bias[2];

  __device__ __forceinline__ UpdateBlock(const MixerStepParams& params,
                                         const UpdateShared<T>& memory)
      : p(params), shared(memory) {
    channels = static_cast<uint32_t>(p.channels), batch = static_cast<uint32_t>(p.batch);
    channel = blockIdx.x * kUpdateChannels + threadIdx.x / 2;
  }
  __device__ __forceinline__ TState* place(uint32_t offset) const {
    return static_cast<TState*>(p.state) + (offset * kStepStates + threadIdx.x % 2 * kEachLane);
  }
  // What is older than the convolution's step.
  __device__ __forceinline__ void load_old(UpdateRows<T, TState>& rows, uint32_t first) const {
#pragma unroll
    for (int r = 0; r < kStepRows; ++r) {
      rows.offset[r] = min(first + r, batch - 1) * channels + channel;
      rows.state[r].load(place(rows.offset[r]));
    }
#pragma unroll
    for (int r = 0; r < kStepRows / 2; ++r) {
      const uint32_t row = min(first + 2 * r + threadIdx.x % 2, batch - 1);
      rows.z[r] = static_cast<const T*>(p.xz)[(row * 2 + 1) * channels + channel];
    }
  }
  __device__ __forceinline__ void load_new(UpdateRows<T, TState>& rows, uint32_t first) const {
    const uint32_t each = static_cast<uint32_t>(p.projected) / 8;
#pragma unroll
    for (int k = 0; k < kPieces; ++k) {
      const uint32_t i = threadIdx.x + k * kUpdateThreads;
      if (i >= kStepRows * each) break;
      const uint32_t row = min(first + i / each, batch - 1);
      rows.pieces[k] = reinterpret_cast<const uint4*>(p.selected)[row * each + i % each];
    }
#pragma unroll
    for (int r = 0; r < kStepRows; ++r) rows.x[r] = static_cast<const T*>(p.x)[rows.offset[r]];
  }
  // x_proj's results into shared memory: for dt_proj as they are, B and C as floats.
  __device__ __forceinline__ void share(const UpdateRows<T, TState>& rows) const {
    const uint32_t each = static_cast<uint32_t>(p.projected) / 8, rank = p.rank;
#pragma unroll
    for (int k = 0; k < kPieces; ++k) {
      const uint32_t i = threadIdx.x + k * kUpdateThreads;
      if (i >= kStepRows * each) break;
      const uint32_t row = i / each, column = i % each * 8;
      if (column < rank) {
        *reinterpret_cast<uint4*>(shared.low + row * shared.low_pitch + column) = rows.pieces[k];
        continue;
      }
      const uint32_t words[4] = {rows.pieces[k].x, rows.pieces[k].y, rows.pieces[k].z,
                                 rows.pieces[k].w};
      float* const to = shared.selected + row * 2 * kStepStates + column - rank;
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        reinterpret_cast<float2*>(to)[w] =
            halves_to_floats(words[w], std::is_same_v<T, __nv_bfloat16>);
      }
    }
  }
  __device__ __forceinline__ void load_weight() const {
    const uint32_t each = static_cast<uint32_t>(p.rank) / 8;
    const T* const from =
        static_cast<const T*>(p.dt_proj) + int64_t{blockIdx.x} * kUpdateChannels * p.rank;
    for (uint32_t i = threadIdx.x; i < kUpdateChannels * each; i += kUpdateThreads) {
      copy_ahead_16(shared.weight + i / each * shared.weight_pitch + i % each * 8, from + i * 8);
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  }
  __device__ __forceinline__ void load_parameters(UpdateParameters& raw) const {
    const uint32_t pair = channel / 2 * 2;
    raw.A_log.load(p.A_log.data, p.A_log.dtype,
                   channel * kStepStates + threadIdx.x % 2 * kEachLane);
    raw.D.load(p.D.data, p.D.dtype, pair);
    if (p.dt_bias.data) raw.bias.load(p.dt_bias.data, p.dt_bias.dtype, pair);
  }
  __device__ __forceinline__ void take_parameters(const UpdateParameters& raw) {
    raw.A_log.floats(A, p.A_log.dtype);
    float two[2];
    raw.D.floats(two, p.D.dtype);
    D = channel % 2 != 0 ? two[1] : two[0];
    bias[0] = bias[1] = 0.0f;
    if (p.dt_bias.data) raw.bias.floats(bias, p.dt_bias.dtype);
#pragma unroll
    for (int j = 0; j < kEachLane; ++j) A[j] = -1.44269504088896341f * expf(A[j]);
  }

  // The warp's 16 channels for eight rows. The tile's rows g and g + 8 are neighbouring channels.
  __device__ __forceinline__ void project_delta() const {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int rank = static_cast<int>(p.rank), pair = threadIdx.x / 32 * 16 + g * 2;
    const T* const weight = shared.weight + pair * shared.weight_pitch;
    const T* const low = shared.low + g * shared.low_pitch;
    float sum[4] = {};
    int k = 0;
#pragma unroll 2
    for (; k + 32 <= rank; k += 32) {
      const T* const at = weight + k + 8 * t;
      multiply_32<T>(sum, *reinterpret_cast<const uint4*>(at),
                     *reinterpret_cast<const uint4*>(at + shared.weight_pitch),
                     *reinterpret_cast<const uint4*>(low + k + 8 * t));
    }
    if (k < rank) {
      const T* const at = weight + k + 4 * t;
      multiply_16<T>(sum, *reinterpret_cast<const uint2*>(at),
                     *reinterpret_cast<const uint2*>(at + shared.weight_pitch),
                     *reinterpret_cast<const uint2*>(low + k + 4 * t));
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sum[i] += bias[i / 2];
      if (sum[i] <= 20.0f) sum[i] = log1pf(__expf(sum[i]));
    }
    float* const to = shared.delta + 2 * t * kUpdateChannels + pair;
    *reinterpret_cast<float2*>(to) = make_float2(sum[0], sum[2]);
    *reinterpret_cast<float2*>(to + kUpdateChannels) = make_float2(sum[1], sum[3]);
    __syncwarp();
  }

  // One row of the lane's states: its part of C . s, and D x.
  __device__ __forceinline__ float step_row(UpdateRows<T, TState>& rows, int r) const {
    const float delta = shared.delta[r * kUpdateChannels + threadIdx.x / 2];
    const float* const B = shared.selected + r * 2 * kStepStates + threadIdx.x % 2 * kEachLane;
    const float u = to_float(rows.x[r]), du = delta * u;
    float h[kEachLane], b[kEachLane], c[kEachLane], y = 0.0f;
    rows.state[r].floats(h);
#pragma unroll
    for (int j = 0; j < kEachLane; j += 4) {
      const float4 four_b = *reinterpret_cast<const float4*>(B + j);
      const float4 four_c = *reinterpret_cast<const float4*>(B + kStepStates + j);
      b[j] = four_b.x, b[j + 1] = four_b.y, b[j + 2] = four_b.z, b[j + 3] = four_b.w;
      c[j] = four_c.x, c[j + 1] = four_c.y, c[j + 2] = four_c.z, c[j + 3] = four_c.w;
    }
#pragma unroll
    for (int j = 0; j < kEachLane; ++j) {
      h[j] = fmaf(h[j], fast_exp2(delta * A[j]), du * b[j]);
      y = fmaf(h[j], c[j], y);
    }
    rows.state[r].take(h);
    return y;
  }

  // The step of the group of rows from `first` on. Of every two rows each lane of a channel
  // finishes one.
  __device__ __forceinline__ void step(UpdateRows<T, TState>& rows, uint32_t first) const {
    const bool second = threadIdx.x % 2 != 0;
    project_delta();
#pragma unroll
    for (int r = 0; r < kStepRows; r += 2) {
      const float y0 = step_row(rows, r), y1 = step_row(rows, r + 1);
      const float other = __shfl_xor_sync(0xffffffffu, second ? y0 : y1, 1);
      float y = (second ? y1 : y0) + other;
      if (first + r < batch) rows.state[r].store(place(rows.offset[r]));
      if (first + r + 1 < batch) rows.state[r + 1].store(place(rows.offset[r + 1]));
      const float gate = to_float(rows.z[r / 2]);
      y = fmaf(to_float(second ? rows.x[r + 1] : rows.x[r]), D, y) * (gate * fast_sigmoid(gate));
      if (first + r + second >= batch) continue;
      static_cast<T*>(p.y)[second ? rows.offset[r + 1] : rows.offset[r]] = from_float<T>(y);
    }
  }
};

// kMany: more than one group of rows, whose next one's states come while one is worked on.
template <typename T, typename TState, bool kMany>
__global__ void __launch_bounds__(kUpdateThreads)
    step_update_kernel(const __grid_constant__ MixerStepParams p, int groups_each) {
  extern __shared__ float4 memory[];
  const UpdateShared<T> shared(memory, p.rank);
  UpdateBlock<T, TState> block(p, shared);
  const uint32_t begin = blockIdx.y * groups_each * kStepRows;
  // The states and z are older than the projections: they come while those are computed.
  UpdateRows<T, TState> rows;
  block.load_weight();
  block.load_old(rows, begin);
  UpdateParameters parameters;
  block.load_parameters(parameters);
  wait_for_previous();
  start_next();
  block.load_new(rows, begin);
  block.take_parameters(parameters);
  block.share(rows);
  asm volatile("cp.async.wait_group 0;" ::: "memory");
  __syncthreads();
  uint32_t first = begin;
  if constexpr (kMany) {
    const uint32_t end = min(begin + groups_each * kStepRows, block.batch);
    for (; first + kStepRows < end; first += kStepRows) {
      UpdateRows<T, TState> next;
      block.load_old(next, first + kStepRows);
      block.load_new(next, first + kStepRows);
      block.step(rows, first);
      rows = next;
      __syncthreads();
      block.share(rows);
      __syncthreads();
    }
  }
  block.step(rows, first);
}

}  // namespace mamba
