#include "block.h"

#include <cuda_runtime.h>

#include <cstdint>

#include "../../common/cuda_vector.cuh"

namespace mamba {
namespace {

constexpr int kThreads = 256;

// The blocks of each conversion: as many as its elements need, because they differ by thousands and
// even a block that finds nothing to do takes its time.
struct ConversionBlocks {
  unsigned end[kMostConversions];
};

__global__ void __launch_bounds__(kThreads)
    convert_kernel(const __grid_constant__ Conversions conversions,
                   const __grid_constant__ ConversionBlocks blocks) {
  int which = 0;
  while (blockIdx.x >= blocks.end[which]) ++which;
  const Conversion& c = conversions.all[which];
  const unsigned block = blockIdx.x - (which > 0 ? blocks.end[which - 1] : 0);
  const bool aligned =
      reinterpret_cast<uintptr_t>(c.from) % 16 == 0 && reinterpret_cast<uintptr_t>(c.to) % 16 == 0;
  const int64_t i = (int64_t{block} * kThreads + threadIdx.x) * kVector;
  if (aligned && !c.negative_exp && i + kVector <= c.count) {
    float v[kVector];
    load_aligned<kVector>(v, c.from, c.from_dtype, i);
    store_aligned<kVector>(v, c.to, c.to_dtype, i);
    return;
  }
  for (int64_t k = i; k < i + kVector && k < c.count; ++k) {
    const float v = load_float(c.from, c.from_dtype, k);
    store_float(c.to, c.to_dtype, k, c.negative_exp ? -expf(v) : v);
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
  ConversionBlocks blocks{};
  int64_t all = 0;
  for (int i = 0; i < c.count; ++i) {
    all += (c.all[i].count + kThreads * kVector - 1) / (kThreads * kVector);
    if (all > INT32_MAX) return "more elements than one launch converts";
    blocks.end[i] = static_cast<unsigned>(all);
  }
  if (all == 0) return nullptr;
  convert_kernel<<<static_cast<unsigned>(all), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      c, blocks);
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
