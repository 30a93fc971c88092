// The kernel of the scan's backward, and its launch for one kind of tiles.
#pragma once

#include "backward_adjoint.cuh"
#include "backward_ring.cuh"

namespace mamba {

// One staged state of all the warp's channels, the block's `count`-th.
template <class S, class K, bool kGeneral, bool kExact>
__device__ __forceinline__ void run_state(const BackwardBlock<S, K, kGeneral>& block,
                                          const StateRun<S, kGeneral>& run, int state,
                                          unsigned count, const float* projections,
                                          const float* entering, float* record) {
  const BackwardPlace<S>& at = block.at;
  StateSums sums;
  const auto rows = [&](int which, int q, float (&v)[4]) {
    block.read_projection(which, q, v, projections, state);
  };
  run.template run<kExact>(state, rows, record[0], *entering, record[S::kChannels], sums);
  write_sums<S>(block, count, sums);  // every lane has read the carry
  const float dA = sum_steps(sums.dA);
  if constexpr (kGeneral) {
    const float dB = sum_steps(sums.dB), dC = sum_steps(sums.dC);
    if (at.i() == 0) {
      record[3 * S::kChannels] += dB;
      record[4 * S::kChannels] += dC;
    }
  }
  if (at.i() == 0) {
    record[S::kChannels] = sums.leaving;
    record[2 * S::kChannels] += dA;
  }
}

// Read anew, so that nothing that follows from it is kept through the tiles.
__device__ __forceinline__ unsigned block_index() {
  unsigned id;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(id));
  return id;
}

// The staged states from `first` on.
template <class S, class K, bool kGeneral, bool kExact>
__device__ __forceinline__ void run_states(const BackwardBlock<S, K, kGeneral>& block,
                                           BackwardLane& lane, int k, int first, int turn,
                                           unsigned& count) {
  using M = BackwardMemory<S, kGeneral>;
  const BackwardPlace<S>& at = block.at;
  const StateRun<S, kGeneral> run{block.a, at, lane,
                                  at.row * block.a.p.length + block.step_of(k) + at.i() * S::L,
                                  block.smem + block.m.columns};
  const float* from = block.floats(block.m.projections) + at.i() * M::kLanePitch;
  const float* entering =
      block.floats(block.m.entering) + (turn * S::kChannels + at.c()) * M::kEnterPitch;
  float* record = block.floats(block.m.records) + first * M::kRecordPitch + at.c();
  const int states = min(block.n - first, S::kStates);
#pragma unroll 1
  for (int j = 0; j < states; ++j, ++count) {
    run_state<S, K, kGeneral, kExact>(block, run, first + j, count, from, entering, record);
    from += M::kStatePitch, ++entering, record += M::kRecordPitch;
    // A state late, when other warps are likely to be done with it.
    if (first + j > 0) add_in_turn(block, k, first + j - 1, count - 1);
  }
}

// All tiles of a unit; `count` counts the block's states.
template <class S, class K, bool kGeneral, bool kExact>
__device__ __forceinline__ void run_unit(const BackwardArgs& a,
                                         const BackwardMemory<S, kGeneral>& m, char* smem,
                                         int64_t unit, unsigned& count) {
  using M = BackwardMemory<S, kGeneral>;
  BackwardBlock<S, K, kGeneral> block(a, m, smem, unit);
  const BackwardPlace<S>& at = block.at;
  const int n = block.n;
  const bool two = a.plan.stages == 2;
  block.locate();
  block.load_inputs(smem, block.step_of(0));
  block.load_projections(block.step_of(0), 0);
  block.load_entering(block.step_of(0), 0, 0);
  copies_commit();
  block.template begin<false>();
  int turn = 0;  // of entering states
  BackwardLane lane;
  for (int k = 0; k < block.tiles(); ++k) {
    char* const stage = smem + (two && k & 1 ? m.stage : 0);
    char* const other = smem + (two && !(k & 1) ? m.stage : 0);
    for (int first = 0; first < n; first += S::kStates, turn ^= 1) {
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
        block.load_entering(next, last ? 0 : first + S::kStates, turn ^ 1);
      }
      copies_commit();
      run_states<S, K, kGeneral, kExact>(block, lane, k, first, turn, count);
    }
    add_in_turn(block, k, n - 1, count - 1);
    block.finish(lane, stage);
    const bool more = k + 1 < block.tiles();
    if (two && more) continue;
    __syncthreads();
    block.store_outputs(stage, block.step_of(k));
    if (!more) continue;
    __syncthreads();
    block.load_inputs(smem, block.step_of(k + 1));
    copies_commit();
  }
  BackwardBlock<S, K, kGeneral>(a, m, smem, kGeneral ? unit : block_index()).end();
}

template <class S, class K, bool kGeneral, bool kExact>
__global__ void __launch_bounds__(S::kThreads, S::kMinBlocks)
    scan_backward_kernel(const __grid_constant__ BackwardArgs a, int64_t units) {
  extern __shared__ __align__(16) char smem[];
  const BackwardMemory<S, kGeneral> m(a, a.plan.stages);
  begin_barriers<S>(smem + m.barriers);
  unsigned count = 0;
  if constexpr (kGeneral) {
    // Rows that share an initial state add to its gradient one after the other.
    const bool in_turn = a.scratch.shared_starts && *a.scratch.shared_starts;
    if (in_turn && blockIdx.x >= a.plan.slices) return;
    const int64_t step = in_turn ? a.plan.slices : gridDim.x;
    for (int64_t unit = blockIdx.x; unit < units; unit += step) {
      run_unit<S, K, true, kExact>(a, m, smem, unit, count);
      __syncthreads();
    }
  } else {
    run_unit<S, K, false, kExact>(a, m, smem, blockIdx.x, count);
  }
}

template <class Kernel>
cudaError_t allow_memory(Kernel kernel, int bytes) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

template <class S, class K, bool kGeneral, bool kExact>
const char* launch_backward(const BackwardArgs& a, cudaStream_t stream) {
  if (a.plan.segments > 1) {
    if (const char* error = launch_adjoint<S, K, kGeneral>(a, stream)) return error;
  }
  const BackwardMemory<S, kGeneral> m(a, a.plan.stages);
  const int64_t units = a.p.batch * a.plan.segments * a.plan.slices;
  const auto kernel = scan_backward_kernel<S, K, kGeneral, kExact>;
  if (const char* failed = message(allow_memory(kernel, m.total))) return failed;
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
