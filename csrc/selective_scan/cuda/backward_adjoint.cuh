// Where few channels leave processors idle, a row's length is cut into segments that run side by
// side. Each needs the adjoint that the later ones hand it: the kernel here finds, for every
// segment by itself, the affine map of what enters its end to what leaves its start; chain_segments
// then chains these maps.
#pragma once

#include "backward_block.cuh"

namespace mamba {

// A state over the lane's steps: g + P x leaves where x enters. Lane 0 of a channel gets the map of
// the whole tile.
template <class S, bool kGeneral, class Rows>
__device__ __forceinline__ void tile_map(const StateRun<S, kGeneral>& run, int state, Rows&& rows,
                                         float A, float& g, float& P) {
  const BackwardLane& lane = run.lane;
  constexpr int L = S::L;
  StateSteps<S> s;
  float grad[L];
  s.A = A;
  run.read_decays(s.decay, A);
#pragma unroll
  for (int i = 0; i < L; ++i) s.input[i] = 0.0f;
#pragma unroll
  for (int q = 0; q < L / 4; ++q) {
    float C[4];
    rows(q, C);
#pragma unroll
    for (int i = 0; i < 4; ++i) grad[4 * q + i] = lane.dy[4 * q + i] * C[i];
  }
  s.P = fminf(decay_of(lane.delta_sum, A), FLT_MAX);
  if constexpr (kGeneral) run.apply_events(state, s, grad);
  P = s.P, g = grad[L - 1];
#pragma unroll
  for (int i = L - 2; i >= 0; --i) g = fmaf(s.decay[i + 1], g, grad[i]);
  g *= s.decay[0];
#pragma unroll
  for (int distance = S::kWarpChannels; distance < 32; distance *= 2) {
    g = fmaf(P, __shfl_down_sync(0xffffffffu, g, distance), g);
    P = fminf(P * __shfl_down_sync(0xffffffffu, P, distance), FLT_MAX);
  }
}

// The segment's maps in the records: the first of a state is A, then g and P so far, from the start
// on.
template <class S, class K, bool kGeneral>
__device__ __forceinline__ void extend_map(const BackwardBlock<S, K, kGeneral>& block,
                                           const StateRun<S, kGeneral>& run, int state,
                                           const float* projections, float* record) {
  const float so_far = record[2 * S::kChannels];
  // What lies behind a decay of 0 does not reach the segment's start.
  if (__all_sync(0xffffffffu, so_far == 0.0f)) return;
  float g, P;
  const auto rows = [&](int q, float (&v)[4]) {
    block.read_projection(1, q, v, projections, state);
  };
  tile_map<S, kGeneral>(run, state, rows, record[0], g, P);
  __syncwarp();
  if (block.at.i() != 0) return;
  record[S::kChannels] = fmaf(so_far, g, record[S::kChannels]);
  record[2 * S::kChannels] = fminf(so_far * P, FLT_MAX);
}

template <class S, class K, bool kGeneral>
__global__ void __launch_bounds__(S::kThreads, S::kMinBlocks)
    scan_adjoint_kernel(const __grid_constant__ BackwardArgs a) {
  using M = BackwardMemory<S, kGeneral>;
  extern __shared__ __align__(16) char smem[];
  const M m(a, a.plan.stages);
  // The first segment hands its adjoint to nobody.
  const int64_t slices = a.plan.slices, later = a.plan.segments - 1;
  const int64_t row = blockIdx.x / slices / later, segment = 1 + blockIdx.x / slices % later;
  const int64_t unit = blockIdx.x % slices + slices * (segment + a.plan.segments * row);
  const BackwardBlock<S, K, kGeneral> block(a, m, smem, unit);
  const BackwardPlace<S>& at = block.at;
  const int n = block.n;
  block.locate();
  const int64_t first_tile = segment * a.plan.segment_tiles;
  const int64_t end_tile = min(first_tile + a.plan.segment_tiles, a.tiles);
  block.load_inputs(smem, first_tile * S::kSteps);
  block.load_projections(first_tile * S::kSteps, 0);
  copies_commit();
  block.template begin<true>();
  BackwardLane lane;
  for (int64_t tile = first_tile; tile < end_tile; ++tile) {
    const int64_t t0 = tile * S::kSteps;
    const int stage_at = a.plan.stages == 2 && (tile - first_tile) & 1 ? m.stage : 0;
    const bool more = tile + 1 < end_tile;
    for (int first = 0; first < n; first += S::kStates) {
      const int states = min(n - first, S::kStates);
      const bool last = first + S::kStates >= n;
      copies_wait<0>();
      __syncthreads();
      block.convert_projections(t0, first);
      if (first == 0) block.prepare(lane, smem + stage_at, t0);
      __syncthreads();
      if (first == 0 && more) {
        block.load_inputs(smem + (a.plan.stages == 2 ? m.stage - stage_at : 0), t0 + S::kSteps);
      }
      if (!last || more) {
        block.load_projections(last ? t0 + S::kSteps : t0, last ? 0 : first + S::kStates);
      }
      copies_commit();
      const StateRun<S, kGeneral> run{a,
                                      at,
                                      lane,
                                      at.row * a.p.length + t0 + at.i() * S::L,
                                      block.floats(m.deltas),
                                      Columns(at.lane())};
      const float* from = block.floats(m.projections) + at.i() * M::kLanePitch;
      float* record = block.floats(m.records) + first * M::kRecordPitch + at.c();
#pragma unroll 1
      for (int s = 0; s < states; ++s) {
        extend_map(block, run, first + s, from, record);
        from += M::kStatePitch, record += M::kRecordPitch;
      }
    }
  }
  __syncthreads();
  const int64_t to = (at.row * a.plan.segments + segment) * a.p.channels * n + at.channel * n;
  for (int i = threadIdx.x; i < n * at.channels; i += S::kThreads) {
    const float* const record = block.floats(m.records) + i % n * M::kRecordPitch + i / n;
    a.scratch.adjoint[to + i] = record[S::kChannels];
    a.scratch.decay[to + i] = record[2 * S::kChannels];
  }
}

template <class S, class K, bool kGeneral>
const char* launch_adjoint(const BackwardArgs& a, cudaStream_t stream) {
  const BackwardMemory<S, kGeneral> m(a, a.plan.stages);
  constexpr auto kernel = scan_adjoint_kernel<S, K, kGeneral>;
  if (const char* failed = message(allow_shared_memory<kernel>(m.total))) return failed;
  const int64_t blocks = a.p.batch * (a.plan.segments - 1) * a.plan.slices;
  kernel<<<static_cast<unsigned>(blocks), S::kThreads, m.total, stream>>>(a);
  if (const char* failed = message(cudaGetLastError())) return failed;
  return chain_segments(a, stream);
}

}  // namespace mamba
