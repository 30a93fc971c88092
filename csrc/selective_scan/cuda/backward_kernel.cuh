// The kernel of the scan's backward, and its launch for one kind of tiles.
#pragma once

#include "backward_adjoint.cuh"
#include "backward_ring.cuh"
#include "backward_sums.cuh"

namespace mamba {

// The sums that constant B and C need.
template <class S, class K>
__device__ __forceinline__ void keep_constants(const BackwardBlock<S, K, true>& block,
                                               const StateSums& sums, float* record) {
  const float dB = sum_steps(sums.dB), dC = sum_steps(sums.dC);
  if (block.at.i() != 0) return;
  record[3 * S::kChannels] += dB;
  record[4 * S::kChannels] += dC;
}

// Where a lane's part of a staged state lies in shared memory.
template <class S, class M>
struct StateRows {
  const float *projections, *entering;
  float* record;
  __device__ __forceinline__ void advance() {
    projections += M::kStatePitch, ++entering, record += M::kRecordPitch;
  }
};

// Read anew.
__device__ __forceinline__ unsigned block_index() {
  unsigned id;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(id));
  return id;
}

// The staged states from `first` on.
template <class S, class K, bool kGeneral, bool kExact>
__device__ __forceinline__ void run_states(const BackwardBlock<S, K, kGeneral>& block,
                                           BackwardLane& lane, int k, int first, int entered,
                                           unsigned& turn, int& until) {
  using M = BackwardMemory<S, kGeneral>;
  const BackwardPlace<S>& at = block.at;
  const StateRun<S, kGeneral> run{block.a,
                                  at,
                                  lane,
                                  at.row * block.a.p.length + block.step_of(k) + at.i() * S::L,
                                  block.floats(block.m.deltas),
                                  Columns(at.lane())};
  StateRows<S, M> in;
  in.projections = block.floats(block.m.projections) + at.i() * M::kLanePitch;
  in.entering = block.floats(block.m.entering) + (entered * S::kChannels + at.c()) * M::kEnterPitch;
  in.record = block.floats(block.m.records) + first * M::kRecordPitch + at.c();
  int state = first;
  const int end = min(block.n, first + S::kStates);
  const auto rows = [&](int which, int q, float (&v)[4]) {
    block.read_projection(which, q, v, in.projections, state);
  };
  char* const sums_of_lane = block.smem + block.m.sums + SumsPlace::of_lane(at.warp(), at.lane());
  StateSteps<S> steps;
  run.begin(steps, in.record[0]);
  float dA = 0.0f;  // of the state before
  float* record = in.record;
#pragma unroll 1
  while (true) {
    StateSums sums;
    float grad[kGeneral ? S::L : 1], h, g;
    const bool free = place_is_free<S>(block, turn);
    run.read_inputs(steps, rows);
    const float leaving =
        run.enter(state, steps, rows, grad, *in.entering, in.record[S::kChannels], h, g, dA);
    __syncwarp();  // every lane has read the carry
    if (at.i() == 0) {
      in.record[S::kChannels] = leaving;
      record[2 * S::kChannels] += dA;
    }
    record = in.record;
    wait_for_place<S>(block, turn, free);
    const SumsPlace place{sums_of_lane + ring_offset<S>(turn), at.lane() % 4 == 0};
    const float4 last = run.template run_states<kExact>(steps, h, sums, place);
    // The row after the last is not used.
    run.template run_adjoints<kExact>(state, steps, rows, grad, h, g, record[M::kRecordPitch], sums,
                                      dA, place, last);
    hand_over_sums<S>(block, turn);
    if constexpr (kGeneral) keep_constants(block, sums, record);
    // A state late, when other warps are likely to be done with it.
    if (until == 0) {
      store_sums(block, turn_before<S>(turn), block.step_of(k), state - 1);
      until = S::kWarps;
    }
    --until, turn = next_turn<S>(turn);
    if (++state == end) break;
    in.advance();
  }
  dA = sum_steps(dA);
  if (at.i() == 0) record[2 * S::kChannels] += dA;
}

// All tiles of a unit. `turn` is that of the block's next state at the ring, `until` counts the
// states down to those that the warp sums over warps.
template <class S, class K, bool kGeneral, bool kExact>
__device__ __forceinline__ void run_unit(const BackwardArgs& a,
                                         const BackwardMemory<S, kGeneral>& m, char* smem,
                                         int64_t unit, unsigned& turn, int& until) {
  using M = BackwardMemory<S, kGeneral>;
  using Block = BackwardBlock<S, K, kGeneral>;
  const Block block(a, m, smem, unit);
  // Where the block is, found anew, so that nothing of it is kept through the states.
  const auto fresh = [&] { return Block(a, m, smem, kGeneral ? unit : block_index()); };
  const int n = block.n;
  const bool two = a.plan.stages == 2;
  block.locate();
  block.load_inputs(smem, block.step_of(0));
  block.load_projections(block.step_of(0), 0);
  block.load_entering(block.step_of(0), 0, 0);
  copies_commit();
  block.template begin<false>();
  int entered = 0;  // of the two places of entering states
  BackwardLane lane;
  for (int k = 0; k < block.tiles(); ++k) {
    char* const stage = smem + (two && k & 1 ? m.stage : 0);
    char* const other = smem + (two && !(k & 1) ? m.stage : 0);
    for (int first = 0; first < n; first += S::kStates, entered ^= 1) {
      const bool last = first + S::kStates >= n;
      copies_wait<0>();
      __syncthreads();
      if (first == 0 && two && k > 0) block.store_outputs(other, block.step_of(k - 1));
      block.convert_projections(block.step_of(k), first);
      if (first == 0) block.prepare(lane, stage, block.step_of(k));
      __syncthreads();
      const bool more = k + 1 < block.tiles();
      if (first == 0 && two && more) block.load_inputs(other, block.step_of(k + 1));
      if (!last || more) {
        const int64_t next = block.step_of(last ? k + 1 : k);
        block.load_projections(next, last ? 0 : first + S::kStates);
        block.load_entering(next, last ? 0 : first + S::kStates, entered ^ 1);
      }
      copies_commit();
      run_states<S, K, kGeneral, kExact>(block, lane, k, first, entered, turn, until);
    }
    if (until == 0) {
      store_sums(block, turn_before<S>(turn), block.step_of(k), n - 1);
      until = S::kWarps;
    }
    block.finish(lane, stage);
    const bool more = k + 1 < block.tiles();
    if (more && (k + 1) % kSumTiles == 0) move_sums(fresh(), k + 1 == kSumTiles);
    if (two && more) continue;
    __syncthreads();
    block.store_outputs(stage, block.step_of(k));
    if (!more) continue;
    __syncthreads();
    block.load_inputs(smem, block.step_of(k + 1));
    copies_commit();
  }
  end_sums(fresh());
}

template <class S, class K, bool kGeneral, bool kExact>
__global__ void __launch_bounds__(S::kThreads, S::kMinBlocks)
    scan_backward_kernel(const __grid_constant__ BackwardArgs a, int64_t units) {
  extern __shared__ __align__(16) char smem[];
  const BackwardMemory<S, kGeneral> m(a, a.plan.stages);
  begin_barriers<S>(smem + m.barriers);
  unsigned turn = 0;
  int until = static_cast<int>(threadIdx.x) / 32 + 1;  // a tile's first state counts once more
  if constexpr (kGeneral) {
    // Rows that share an initial state add to its gradient one after the other.
    const bool in_turn = a.scratch.shared_starts && *a.scratch.shared_starts;
    if (in_turn && blockIdx.x >= a.plan.slices) return;
    const int64_t step = in_turn ? a.plan.slices : gridDim.x;
    for (int64_t unit = blockIdx.x; unit < units; unit += step) {
      run_unit<S, K, true, kExact>(a, m, smem, unit, turn, until);
      __syncthreads();
    }
  } else {
    run_unit<S, K, false, kExact>(a, m, smem, blockIdx.x, turn, until);
  }
}

template <class S, class K, bool kGeneral, bool kExact>
const char* launch_backward(const BackwardArgs& a, cudaStream_t stream) {
  if (a.plan.segments > 1) {
    if (const char* error = launch_adjoint<S, K, kGeneral>(a, stream)) return error;
  }
  const BackwardMemory<S, kGeneral> m(a, a.plan.stages);
  const int64_t units = a.p.batch * a.plan.segments * a.plan.slices;
  constexpr auto kernel = scan_backward_kernel<S, K, kGeneral, kExact>;
  if (const char* failed = message(allow_shared_memory<kernel>(m.total))) return failed;
  kernel<<<static_cast<unsigned>(units), S::kThreads, m.total, stream>>>(a, units);
  return message(cudaGetLastError());
}

template <class K, bool kExact>
const char* launch_backward_kind(const BackwardArgs& a, cudaStream_t stream) {
  return a.plan.warps == kWideWarps
             ? launch_backward<BackwardShape<kWideWarps>, K, false, kExact>(a, stream)
             : launch_backward<BackwardShape<4>, K, false, kExact>(a, stream);
}

}  // namespace mamba
