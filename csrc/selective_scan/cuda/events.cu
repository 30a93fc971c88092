// What seq_idx means for each step: where sequences start, end or pause. A block reads one row from
// left to right; the latest step that is no padding is found by a maximum scan.
#include <cuda_runtime.h>

#include <cassert>

#include "scan.h"

namespace mamba {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

__device__ __forceinline__ int max_scan(int v, int lane) {
#pragma unroll
  for (int o = 1; o < 32; o *= 2) {
    const int left = __shfl_up_sync(0xffffffffu, v, o);
    if (lane >= o) v = max(v, left);
  }
  return v;
}

__global__ void __launch_bounds__(kThreads)
    events_kernel(const __grid_constant__ ScanParams p, int* before, int* after, long long* last) {
  __shared__ int latest[2][kWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t row = blockIdx.x;
  const int32_t* ids = p.seq_idx + row * p.seq_idx_stride[0];
  const auto id_at = [&](int64_t t) { return ids[t * p.seq_idx_stride[1]]; };
  int carry = -1;  // the latest step that is no padding, before this stretch
  int turn = 0;
  for (int64_t t0 = 0; t0 < p.length; t0 += kThreads, turn ^= 1) {
    const int64_t t = t0 + threadIdx.x;
    const int id = t < p.length ? id_at(t) : -1;
    const int here = id >= 0 ? static_cast<int>(t) : -1;
    const int in_warp = max_scan(here, lane);
    if (lane == 31) latest[turn][warp] = in_warp;
    __syncthreads();
    int previous = __shfl_up_sync(0xffffffffu, in_warp, 1);
    if (lane == 0) previous = -1;
    int total = carry;
    for (int w = 0; w < kWarps; ++w) {
      if (w == warp) previous = max(previous, total);
      total = max(total, latest[turn][w]);
    }
    carry = total;
    if (t >= p.length) continue;
    int event = CudaScanEvents::kNothing;
    if (id < 0) {
      event = CudaScanEvents::kPadding;
    } else if (previous < 0 || id_at(previous) != id) {
      event = p.initial_state ? id : CudaScanEvents::kFreshStart;
    }
    before[row * p.length + t] = event;
    after[row * p.length + t] = CudaScanEvents::kNothing;
    if (id >= 0 && p.num_states > 0) {
      assert(id < p.num_states && "seq_idx holds a sequence number that has no state");
      const bool run_ends = t + 1 == p.length || id_at(t + 1) != id;
      if (run_ends) atomicMax(last + id, static_cast<long long>(row * p.length + t));
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    last_steps_kernel(const long long* last, int64_t num_states, int* after) {
  const int64_t id = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (id < num_states && last[id] >= 0) after[last[id]] = static_cast<int>(id);
}

__global__ void __launch_bounds__(kThreads)
    fill_unused_kernel(const long long* last, int64_t num_states, int64_t size, bool all,
                       const float* from, float* to) {
  for (int64_t id = blockIdx.x; id < num_states; id += gridDim.x) {
    if (!all && last[id] >= 0) continue;
    for (int64_t i = threadIdx.x; i < size; i += kThreads) {
      to[id * size + i] = from ? from[id * size + i] : 0.0f;
    }
  }
}

const char* launched() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

const char* scan_events_cuda(const ScanParams& p, int* before, int* after, long long* last,
                             void* stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  if (p.num_states > 0) {
    const cudaError_t error = cudaMemsetAsync(last, 0xff, p.num_states * sizeof(*last), stream);
    if (error != cudaSuccess) return cudaGetErrorString(error);
  }
  if (p.batch * p.length > 0) {
    events_kernel<<<static_cast<unsigned>(p.batch), kThreads, 0, stream>>>(p, before, after, last);
    if (p.num_states > 0) {
      const int64_t blocks = (p.num_states + kThreads - 1) / kThreads;
      last_steps_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(last, p.num_states,
                                                                                after);
    }
  }
  return launched();
}

const char* fill_unused_states_cuda(const ScanParams& p, const CudaScanEvents& events,
                                    const float* from, float* to, void* stream_handle) {
  const bool all = p.length == 0;
  if (p.num_states * p.channels * p.state_dim == 0 || (!all && !events.before)) return nullptr;
  const int64_t blocks = p.num_states < 65536 ? p.num_states : 65536;
  fill_unused_kernel<<<static_cast<unsigned>(blocks), kThreads, 0,
                       static_cast<cudaStream_t>(stream_handle)>>>(
      events.last, p.num_states, p.channels * p.state_dim, all, from, to);
  return launched();
}

}  // namespace mamba
