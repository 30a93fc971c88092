// Sums of the backward's partial sums, always in the same order.
#include <cuda_runtime.h>

#include "../../common/cuda_convert.cuh"
#include "scan_backward.h"

namespace mamba {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxBlocks = 1 << 16;

struct PartialSums {
  PartialSum sums[kMaxPartialSums];
};

__global__ void __launch_bounds__(kThreads)
    sum_parts_kernel(const __grid_constant__ PartialSums all, int64_t parts) {
  const PartialSum& s = all.sums[blockIdx.y];
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < s.size; i += step) {
    float sum = 0.0f;
#pragma unroll 8
    for (int64_t part = 0; part < parts; ++part) sum += s.from[part * s.size + i];
    store_float(s.to.data, s.to.dtype, i, sum);
  }
}

// Four steps of one state of one group a thread.
__global__ void __launch_bounds__(kThreads)
    sum_slices_kernel(const float4* from, const __grid_constant__ TensorArg to, int64_t rows,
                      int64_t per_group, int64_t states, int64_t length, int64_t fours) {
  const int64_t step = int64_t{gridDim.x} * kThreads, size = rows * fours;
  const int64_t slice = states * fours;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < size; i += step) {
    const int64_t group = i / slice, row = i / fours, t = i % fours * 4;
    const float4* const at = from + group * per_group * slice + i % slice;
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 8
    for (int64_t k = 0; k < per_group; ++k) {
      const float4 v = at[k * slice];
      sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
    }
    const float values[4] = {sum.x, sum.y, sum.z, sum.w};
    const int64_t out = row * length + t;
    if (to.dtype != DType::kFloat32 && length % 4 == 0) {
      uint16_t halves[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if (to.dtype == DType::kBFloat16) {
          halves[k] = __bfloat16_as_ushort(from_float<__nv_bfloat16>(values[k]));
        } else {
          halves[k] = __half_as_ushort(from_float<__half>(values[k]));
        }
      }
      *reinterpret_cast<ushort4*>(static_cast<uint16_t*>(to.data) + out) =
          make_ushort4(halves[0], halves[1], halves[2], halves[3]);
      continue;
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (t + k < length) store_float(to.data, to.dtype, out + k, values[k]);
    }
  }
}

unsigned blocks_for(int64_t threads) {
  const int64_t blocks = (threads + kThreads - 1) / kThreads;
  return static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks);
}

const char* launched() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

const char* sum_parts_cuda(const PartialSum* sums, int count, int64_t parts, void* stream) {
  PartialSums all;
  int64_t largest = 0;
  for (int i = 0; i < count; ++i) {
    all.sums[i] = sums[i];
    if (sums[i].size > largest) largest = sums[i].size;
  }
  if (largest == 0) return nullptr;
  sum_parts_kernel<<<dim3(blocks_for(largest), count), kThreads, 0,
                     static_cast<cudaStream_t>(stream)>>>(all, parts);
  return launched();
}

const char* sum_slices_cuda(const ScanParams& p, const BackwardPlan& plan, const float* from,
                            const TensorArg& to, void* stream) {
  const int64_t rows = p.batch * p.groups * p.state_dim, fours = plan.padded_length / 4;
  if (rows * fours == 0) return nullptr;
  sum_slices_kernel<<<blocks_for(rows * fours), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      reinterpret_cast<const float4*>(from), to, rows, plan.blocks_per_group, p.state_dim, p.length,
      fours);
  return launched();
}

}  // namespace mamba
