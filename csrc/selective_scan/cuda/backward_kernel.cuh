// The kernel of the scan's backward, and its launch for one kind of tiles.
#pragma once

#include "backward_block.cuh"

namespace mamba {

// One staged state of all the warp's channels.
template <class S, class K, bool kGeneral, bool kExact>
__device__ __forceinline__ void run_state(const BackwardBlock<S, K, kGeneral>& block,
                                          const StateRun<S, kGeneral, kExact>& run, int state,
                                          const float* projections, const float* entering,
                                          float* record, float2* lane_sums, float4* sums_out) {
  using M = BackwardMemory<S, kGeneral>;
  const BackwardArgs& a = block.a;
  const BackwardPlace<S>& at = block.at;
  float B[S::L], C[S::L];
  if (!kGeneral || !a.p.constant_B) read_eight(B, projections);
  if (!kGeneral || !a.p.constant_C) read_eight(C, projections + M::kRowPitch);
  const float2 A = *reinterpret_cast<const float2*>(record);
  const float2 carry = *reinterpret_cast<const float2*>(record + S::kChannels);
  StateSums<S> sums;
  const auto channel = [&](auto which) {
    constexpr int k = decltype(which)::value;
    if constexpr (kGeneral) {
      const int64_t c = at.channel + min(at.c + k, at.channels - 1);
      const float b = a.p.constant_B ? load_at(a.p.B, c, state) : 0.0f;
      const float v = a.p.constant_C ? load_at(a.p.C, c, state) : 0.0f;
#pragma unroll
      for (int i = 0; i < S::L; ++i) {
        if (a.p.constant_B) B[i] = b;
        if (a.p.constant_C) C[i] = v;
      }
    }
    const float h = at.c + k < at.channels ? entering[k * M::kEnterPitch] : 0.0f;
    run.template channel<k>(state, B, C, k ? A.y : A.x, h, k ? carry.y : carry.x, sums);
  };
  channel(std::integral_constant<int, 0>{});
  channel(std::integral_constant<int, 1>{});
  const float (&d)[2][4] = sums.channels;
  *sums_out =
      make_float4(d[0][0] + d[1][0], d[0][1] + d[1][1], d[0][2] + d[1][2], d[0][3] + d[1][3]);
  *lane_sums = make_float2(sums.dA[0], sums.dA[1]);
  if constexpr (kGeneral) {
#pragma unroll
    for (int k = 0; k < S::C; ++k) {
      const float dB = sum_steps(sums.dB[k]), dC = sum_steps(sums.dC[k]);
      if (at.i != 0) continue;
      record[3 * S::kChannels + k] += dB;
      record[4 * S::kChannels + k] += dC;
    }
  }
  __syncwarp();  // every lane has read the carry
  if (at.i == 0) {
    *reinterpret_cast<float2*>(record + S::kChannels) =
        make_float2(sums.leaving[0], sums.leaving[1]);
  }
}

// All tiles of a unit.
template <class S, class K, bool kGeneral, bool kExact>
__device__ __forceinline__ void run_unit(const BackwardArgs& a,
                                         const BackwardMemory<S, kGeneral>& m, char* smem,
                                         int64_t unit) {
  using M = BackwardMemory<S, kGeneral>;
  BackwardBlock<S, K, kGeneral> block(a, m, smem, unit);
  const BackwardPlace<S>& at = block.at;
  const int n = block.n;
  const ChannelColumns columns(at.lane);
  const int64_t first_tile = at.segment * a.plan.segment_tiles;
  const int64_t last_tile = min(first_tile + a.plan.segment_tiles, a.tiles) - 1;
  block.load_inputs(smem, last_tile * S::kSteps);
  block.load_entering(last_tile * S::kSteps, 0, 0);
  copies_commit();
  ProjectionLoad<S> projections;
  block.load_projections(projections, last_tile * S::kSteps, 0);
  block.begin();
  int turn = 0, batch = 0, first_warp = 0;  // of entering states; of sums over the warps
  BackwardLane<S> lane;
  float* const lane_sums = block.floats(m.lane_sums) + at.warp * S::kBatch * M::kLaneSumPitch;
  for (int64_t tile = last_tile; tile >= first_tile; --tile) {
    const int64_t t0 = tile * S::kSteps;
    const int stage_at = a.plan.stages == 2 && (last_tile - tile) & 1 ? m.stage : 0;
    char* const stage = smem + stage_at;
    for (int first = 0; first < n; first += S::kStates, turn ^= 1) {
      const int states = min(n - first, S::kStates);
      const bool last = first + S::kStates >= n, more = tile > first_tile;
      block.store_projections(projections);
      copies_wait<0>();
      __syncthreads();
      if (first == 0 && a.plan.stages == 2 && more) {
        block.load_inputs(smem + m.stage - stage_at, t0 - S::kSteps);
      }
      if (!last || more) {
        block.load_entering(last ? t0 - S::kSteps : t0, last ? 0 : first + S::kStates, turn ^ 1);
      }
      copies_commit();
      if (first == 0) block.prepare(lane, stage, t0);
      const StateRun<S, kGeneral, kExact> run{a, at, lane, columns,
                                              at.row * a.p.length + t0 + at.i * S::L};
      const float* from = block.floats(m.projections) + at.i * M::kLanePitch;
      const float* entering =
          block.floats(m.entering) + (turn * S::kChannels + at.c) * M::kEnterPitch;
      float* record = block.floats(m.records) + first * M::kRecordPitch + at.c;
      for (int s0 = 0; s0 < states; s0 += S::kBatch, ++batch) {
        const int count = min(states - s0, S::kBatch);
        float4* sums = block.batch_sums(batch) + at.warp * 32 + at.lane;
        float2* own = reinterpret_cast<float2*>(lane_sums) + at.lane;
#pragma unroll 1
        for (int j = 0; j < count; ++j) {
          run_state<S, K, kGeneral, kExact>(block, run, first + s0 + j, from, entering, record, own,
                                            sums);
          from += M::kStatePitch, ++entering, record += M::kRecordPitch;
          own += M::kLaneSumPitch / 2, sums += S::kWarps * 32;
        }
        block.add_lane_sums(lane_sums, first + s0, count);
        __syncthreads();
        block.store_batch(batch, first_warp, t0, first + s0, count);
        first_warp = (first_warp + S::kBatch) % S::kWarps;
      }
      if (!last || more) {
        block.load_projections(projections, last ? t0 - S::kSteps : t0,
                               last ? 0 : first + S::kStates);
      }
    }
    block.finish(lane, stage);
    __syncthreads();
    block.store_outputs(stage, t0);
    if (a.plan.stages == 1 && tile > first_tile) {
      __syncthreads();
      block.load_inputs(smem, t0 - S::kSteps);
      copies_commit();
    }
  }
  block.end();
}

template <class S, class K, bool kGeneral, bool kExact>
__global__ void __launch_bounds__(S::kThreads, S::kMinBlocks)
    scan_backward_kernel(const __grid_constant__ BackwardArgs a, int64_t units) {
  extern __shared__ __align__(16) char smem[];
  const BackwardMemory<S, kGeneral> m(a, a.plan.stages);
  if constexpr (kGeneral) {
    // Rows that share an initial state add to its gradient one after the other.
    const bool in_turn = a.scratch.shared_starts && *a.scratch.shared_starts;
    if (in_turn && blockIdx.x >= a.plan.slices) return;
    const int64_t step = in_turn ? a.plan.slices : gridDim.x;
    for (int64_t unit = blockIdx.x; unit < units; unit += step) {
      run_unit<S, K, true, kExact>(a, m, smem, unit);
      __syncthreads();
    }
  } else {
    run_unit<S, K, false, kExact>(a, m, smem, blockIdx.x);
  }
}

inline const char* message(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <class S, class K, bool kGeneral, bool kExact>
const char* launch_backward(const BackwardArgs& a, cudaStream_t stream) {
  const BackwardMemory<S, kGeneral> m(a, a.plan.stages);
  const auto kernel = scan_backward_kernel<S, K, kGeneral, kExact>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, m.total);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  const int64_t units = a.p.batch * a.plan.segments * a.plan.slices;
  kernel<<<static_cast<unsigned>(units), S::kThreads, m.total, stream>>>(a, units);
  return message(cudaGetLastError());
}

template <class K, bool kExact>
const char* launch_backward_kind(const BackwardArgs& a, cudaStream_t stream) {
  return a.plan.warps == 12 ? launch_backward<BackwardShape<12>, K, false, kExact>(a, stream)
                            : launch_backward<BackwardShape<4>, K, false, kExact>(a, stream);
}

}  // namespace mamba
