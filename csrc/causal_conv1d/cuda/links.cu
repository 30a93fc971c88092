// Which steps of a packed batch follow each other: a block reads a row from left to right and finds
// each step's predecessor, the latest step that is no padding, by a maximum scan.
#include <cassert>

#include "conv.cuh"

namespace mamba {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

__global__ void __launch_bounds__(kThreads)
    links_kernel(const int* all_ids, int64_t length, int64_t states, int* previous, int* following,
                 long long* last) {
  __shared__ int latest[2][kWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t row = blockIdx.x;
  const int* ids = all_ids + row * length;
  int carry = -1, turn = 0;
  for (int64_t t0 = 0; t0 < length; t0 += kThreads, turn ^= 1) {
    const int64_t t = t0 + threadIdx.x;
    const int id = t < length ? ids[t] : -1;
    int here = id >= 0 ? static_cast<int>(t) : -1;
#pragma unroll
    for (int o = 1; o < 32; o *= 2) {
      const int left = __shfl_up_sync(0xffffffffu, here, o);
      if (lane >= o) here = max(here, left);
    }
    if (lane == 31) latest[turn][warp] = here;
    __syncthreads();
    int before = __shfl_up_sync(0xffffffffu, here, 1);
    if (lane == 0) before = -1;
    int total = carry;
    for (int w = 0; w < kWarps; ++w) {
      if (w == warp) before = max(before, total);
      total = max(total, latest[turn][w]);
    }
    carry = total;
    if (t >= length) continue;
    const bool joined = id >= 0 && before >= 0 && ids[before] == id;
    previous[row * length + t] = id < 0 ? ConvLinks::kPadding : joined ? before : ConvLinks::kNone;
    if (joined) following[row * length + before] = static_cast<int>(t);
    if (id < 0 || states == 0) continue;
    assert(id < states && "seq_idx holds a sequence number that has no state");
    const bool run_ends = t + 1 == length || ids[t + 1] != id;
    if (run_ends) atomicMax(last + id, static_cast<long long>(row * length + t));
  }
}

}  // namespace

const char* conv_links_cuda(const ConvParams& p, const int* ids, int* previous, int* following,
                            long long* last, void* stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  const int64_t steps = p.batch * p.length;
  if (p.states > 0) cudaMemsetAsync(last, 0xff, p.states * sizeof(*last), stream);
  if (steps > 0) {
    cudaMemsetAsync(following, 0xff, steps * sizeof(*following), stream);
    links_kernel<<<static_cast<unsigned>(p.batch), kThreads, 0, stream>>>(
        ids, p.length, p.states, previous, following, last);
  }
  return conv_launched();
}

}  // namespace mamba
