// Sums of the backward's partial sums, always in the same order.
#include <cuda_runtime.h>

#include "../../common/cuda_convert.cuh"
#include "scan_backward.h"

namespace mamba {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxBlocks = 1 << 16;

struct SliceShape {
  int64_t rows, per_group, groups, states, length, fours;
};

__device__ void sum_parts(const PartialSum& s, int64_t parts) {
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < s.size; i += step) {
    float sum = 0.0f;
#pragma unroll 8
    for (int64_t part = 0; part < parts; ++part) sum += s.from[part * s.size + i];
    store_float(s.to.data, s.to.dtype, i, s.factor ? sum * s.factor[i] : sum);
  }
}

__device__ uint16_t half_of(DType dtype, float v) {
  return dtype == DType::kBFloat16 ? __bfloat16_as_ushort(from_float<__nv_bfloat16>(v))
                                   : __half_as_ushort(from_float<__half>(v));
}

// Four steps of one state of one group a thread.
__device__ void sum_slices(const SliceSum& s, const SliceShape& shape) {
  const int64_t step = int64_t{gridDim.x} * kThreads, size = shape.rows * shape.fours;
  const int64_t slice = shape.states * shape.fours;
  const TensorArg& to = s.to;
  const bool vectors =
      to.dtype != DType::kFloat32 && to.stride[3] == 1 && shape.length % 4 == 0 &&
      (to.stride[0] | to.stride[1] | to.stride[2] | reinterpret_cast<uintptr_t>(to.data) / 2) % 4 ==
          0;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < size; i += step) {
    const int64_t group = i / slice, row = i / shape.fours, t = i % shape.fours * 4;
    const float4* const at =
        reinterpret_cast<const float4*>(s.from) + group * shape.per_group * slice + i % slice;
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 8
    for (int64_t k = 0; k < shape.per_group; ++k) {
      const float4 v = at[k * slice];
      sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
    }
    const float values[4] = {sum.x, sum.y, sum.z, sum.w};
    const int64_t out = group / shape.groups * to.stride[0] + group % shape.groups * to.stride[1] +
                        row % shape.states * to.stride[2] + t * to.stride[3];
    if (vectors) {
      *reinterpret_cast<ushort4*>(static_cast<uint16_t*>(to.data) + out) =
          make_ushort4(half_of(to.dtype, values[0]), half_of(to.dtype, values[1]),
                       half_of(to.dtype, values[2]), half_of(to.dtype, values[3]));
      continue;
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (t + k < shape.length) store_float(to.data, to.dtype, out + k * to.stride[3], values[k]);
    }
  }
}

// blockIdx.y: which of them.
__global__ void __launch_bounds__(kThreads)
    sum_backward_kernel(const __grid_constant__ BackwardSums all, const SliceShape shape) {
  const int which = static_cast<int>(blockIdx.y);
  if (which < all.slice_sums) {
    sum_slices(all.slices[which], shape);
  } else {
    sum_parts(all.parts[which - all.slice_sums], all.part_count);
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

const char* sum_backward_cuda(const BackwardSums& sums, const ScanParams& p,
                              const BackwardPlan& plan, void* stream) {
  const int64_t rows = p.batch * p.groups * p.state_dim, fours = plan.padded_length / 4;
  int64_t largest = sums.slice_sums > 0 ? rows * fours : 0;
  for (int i = 0; i < sums.part_sums; ++i) {
    if (sums.parts[i].size > largest) largest = sums.parts[i].size;
  }
  if (largest == 0) return nullptr;
  const dim3 grid(blocks_for(largest), static_cast<unsigned>(sums.part_sums + sums.slice_sums));
  sum_backward_kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      sums, {rows, plan.blocks_per_group, p.groups, p.state_dim, p.length, fours});
  return launched();
}

}  // namespace mamba
