#include "block.h"

#include <cuda_runtime.h>

#include "../../common/cuda_vector.cuh"

namespace mamba {
namespace {

constexpr int kThreads = 256;

// blockIdx.y: which of them.
__global__ void __launch_bounds__(kThreads)
    convert_kernel(const __grid_constant__ Conversions conversions) {
  const Conversion& c = conversions.all[blockIdx.y];
  const int64_t step = int64_t{gridDim.x} * kThreads * kVector;
  const bool aligned =
      reinterpret_cast<uintptr_t>(c.from) % 16 == 0 && reinterpret_cast<uintptr_t>(c.to) % 16 == 0;
  for (int64_t i = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kVector; i < c.count;
       i += step) {
    if (aligned && !c.negative_exp && i + kVector <= c.count) {
      float v[kVector];
      load_aligned<kVector>(v, c.from, c.from_dtype, i);
      store_aligned<kVector>(v, c.to, c.to_dtype, i);
      continue;
    }
    for (int64_t k = i; k < i + kVector && k < c.count; ++k) {
      const float v = load_float(c.from, c.from_dtype, k);
      store_float(c.to, c.to_dtype, k, c.negative_exp ? -expf(v) : v);
    }
  }
}

constexpr int kTile = 32;

// A block: 32 steps of one row of the batch, through shared memory so that both sides are read and
// written in runs. Its first threads do a share of dA.
__global__ void __launch_bounds__(kThreads)
    block_columns_kernel(const __grid_constant__ BlockColumns c) {
  __shared__ float tile[kTile][kTile + 1];
  const int64_t tiles = (c.length + kTile - 1) / kTile;
  const int64_t row = blockIdx.x / tiles, start = blockIdx.x % tiles * kTile;
  const int lane = threadIdx.x % kTile, line = threadIdx.x / kTile;
  for (int64_t first = 0; first < 2 * c.states; first += kTile) {
    for (int k = line; k < kTile; k += kThreads / kTile) {
      const int64_t state = first + k, t = start + lane;
      if (state >= 2 * c.states || t >= c.length) continue;
      const bool is_C = state >= c.states;
      const int64_t at = (row * c.states + state - (is_C ? c.states : 0)) * c.length + t;
      tile[k][lane] = load_float(is_C ? c.dC : c.dB, c.dtype, at);
    }
    __syncthreads();
    for (int k = line; k < kTile; k += kThreads / kTile) {
      const int64_t state = first + lane, t = start + k;
      if (state >= 2 * c.states || t >= c.length) continue;
      store_float(c.rows, c.dtype, (row * c.length + t) * c.pitch + c.column + state,
                  tile[lane][k]);
    }
    __syncthreads();
  }
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < c.count; i += step) {
    c.dA[i] *= c.A[i];
  }
}

__global__ void __launch_bounds__(kThreads)
    block_states_kernel(const __grid_constant__ BlockStates s) {
  const int64_t step = int64_t{gridDim.x} * kThreads;
  const int64_t begin = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  // Neighbours read neighbouring channels.
  for (int64_t i = begin; i < s.batch * s.width * s.channels; i += step) {
    const int64_t channel = i % s.channels, line = i / s.channels;
    const int64_t tap = line % s.width, row = line / s.width;
    const int64_t from = (row * s.length + s.length - s.width + tap) * s.pitch + channel;
    const int64_t to = (row * s.channels + channel) * s.width + tap;
    store_float(s.conv, s.conv_dtype, to, load_float(s.rows, s.dtype, from));
  }
  for (int64_t i = begin; i < s.states; i += step) {
    store_float(s.ssm, s.ssm_dtype, i, s.final_states[i]);
  }
}

const char* launched() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

const char* convert_cuda(const Conversions& c, void* stream) {
  int64_t most = 0;
  for (int i = 0; i < c.count; ++i) most = c.all[i].count > most ? c.all[i].count : most;
  if (most == 0) return nullptr;
  const int64_t blocks = (most + kThreads * kVector - 1) / (kThreads * kVector);
  const dim3 grid(static_cast<unsigned>(blocks < 8192 ? blocks : 8192), c.count);
  convert_kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(c);
  return launched();
}

const char* block_columns_cuda(const BlockColumns& c, void* stream) {
  const int64_t blocks = c.batch * ((c.length + kTile - 1) / kTile);
  if (blocks == 0) return nullptr;
  block_columns_kernel<<<static_cast<unsigned>(blocks), kThreads, 0,
                         static_cast<cudaStream_t>(stream)>>>(c);
  return launched();
}

const char* block_states_cuda(const BlockStates& s, void* stream) {
  const int64_t inputs = s.batch * s.width * s.channels;
  const int64_t most = inputs > s.states ? inputs : s.states;
  if (most == 0) return nullptr;
  const int64_t blocks = (most + kThreads - 1) / kThreads;
  block_states_kernel<<<static_cast<unsigned>(blocks < 2048 ? blocks : 2048), kThreads, 0,
                        static_cast<cudaStream_t>(stream)>>>(s);
  return launched();
}

}  // namespace mamba
