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

const char* enter_device_cuda() {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

const char* convert_cuda(const Conversions& c, void* stream) {
  int64_t most = 0;
  for (int i = 0; i < c.count; ++i) most = c.all[i].count > most ? c.all[i].count : most;
  if (most == 0) return nullptr;
  const int64_t blocks = (most + kThreads * kVector - 1) / (kThreads * kVector);
  const dim3 grid(static_cast<unsigned>(blocks < 8192 ? blocks : 8192), c.count);
  convert_kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(c);
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
