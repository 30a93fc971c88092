// The kernel of the scan's backward, and its launch for one kind of tiles.
#pragma once

#include "backward_adjoint.cuh"

namespace mamba {

// One staged state of all the warp's channels.
template <class S, class K, bool kGeneral, bool kExact>
__device__ __forceinline__ void run_state(const BackwardBlock<S, K, kGeneral>& block,
                                          const StateRun<S, kGeneral>& run, int state,
                                          const float* projections, const float* entering,
                                          float* record, float2* lane_sum, float4* sums_out) {
  using M = BackwardMemory<S, kGeneral>;
  const BackwardArgs& a = block.a;
  const BackwardPlace<S>& at = block.at;
  float B[8], C[8];
  block.read_projections(B, C, projections, 0, state);
  StateSums sums;
  const float2 A = *reinterpret_cast<const float2*>(record);
  const float2 carry = *reinterpret_cast<const float2*>(record + S::kChannels);
  const auto channel = [&](auto which) {
    constexpr int k = decltype(which)::value;
    if (kGeneral && k > 0) block.read_projections(B, C, projections, k, state);
    const float h = entering[k * M::kEnterPitch];
    run.template channel<k>(state, B, C, k ? A.y : A.x, h, k ? carry.y : carry.x, sums);
  };
  channel(std::integral_constant<int, 0>{});
  channel(std::integral_constant<int, 1>{});
  // Two sums side by side, since each product waits for the last one of its sum.
  const float4* const columns = reinterpret_cast<const float4*>(block.smem + block.m.columns);
  const float4 of_C = columns[at.lane], of_B = columns[32 + at.lane];
  const float (&c)[8] = sums.terms_C;
  const float (&b)[8] = sums.terms_B;
  float d[4] = {}, e[4] = {};
  add_channels<kExact>(d, c[0], c[1], c[2], c[3], of_C.x, of_C.y);
  add_channels<kExact>(e, c[4], c[5], c[6], c[7], of_C.z, of_C.w);
  add_channels<kExact>(d, b[0], b[1], b[2], b[3], of_B.x, of_B.y);
  add_channels<kExact>(e, b[4], b[5], b[6], b[7], of_B.z, of_B.w);
  *sums_out = make_float4(d[0] + e[0], d[1] + e[1], d[2] + e[2], d[3] + e[3]);
  *lane_sum = make_float2(sums.dA[0], sums.dA[1]);
  if constexpr (kGeneral) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
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
  const int64_t first_tile = at.segment * a.plan.segment_tiles;
  const int64_t last_tile = min(first_tile + a.plan.segment_tiles, a.tiles) - 1;
  block.locate();
  block.load_inputs(smem, last_tile * S::kSteps);
  block.load_projections(last_tile * S::kSteps, 0);
  block.load_entering(last_tile * S::kSteps, 0, 0);
  copies_commit();
  block.template begin<false>();
  int turn = 0, batch = 0, first_warp = 0;  // of entering states; of sums over the warps
  BackwardLane lane;
  float* const lane_sums = block.floats(m.lane_sums) + at.warp * S::kBatch * M::kLaneSumPitch;
  for (int64_t tile = last_tile; tile >= first_tile; --tile) {
    const int64_t t0 = tile * S::kSteps;
    const int stage_at = a.plan.stages == 2 && (last_tile - tile) & 1 ? m.stage : 0;
    char* const stage = smem + stage_at;
    for (int first = 0; first < n; first += S::kStates, turn ^= 1) {
      const int states = min(n - first, S::kStates);
      const bool last = first + S::kStates >= n, more = tile > first_tile;
      copies_wait<0>();
      __syncthreads();
      block.convert_projections(t0, first);
      if (first == 0) block.prepare(lane, stage, t0);
      __syncthreads();
      if (first == 0 && a.plan.stages == 2 && more) {
        block.load_inputs(smem + m.stage - stage_at, t0 - S::kSteps);
      }
      if (!last || more) {
        const int64_t next = last ? t0 - S::kSteps : t0;
        block.load_projections(next, last ? 0 : first + S::kStates);
        block.load_entering(next, last ? 0 : first + S::kStates, turn ^ 1);
      }
      copies_commit();
      const StateRun<S, kGeneral> run{a, at, lane, at.row * a.p.length + t0 + at.i * S::L};
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
        first_warp += S::kBatch;
        if (first_warp >= S::kWarps) first_warp %= S::kWarps;
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

template <class S, class K, bool kGeneral, bool kExact>
const char* launch_backward(const BackwardArgs& a, cudaStream_t stream) {
  if (a.plan.segments > 1) {
    if (const char* error = launch_adjoint<S, K, kGeneral>(a, stream)) return error;
  }
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
