#include <algorithm>

#include "decode.h"
#include "row.h"
#include "step.cuh"

namespace mamba {
namespace {

using decode::kThreads;
using decode::kTileRows;
using decode::kUnitBytes;
using decode::pitch_of;
using decode::StateSpace;
using decode::Step;
using decode::units_of;

template <typename T, int kRows, int kStages>
__global__ void __launch_bounds__(kThreads, 1)
    decode_step_kernel(const __grid_constant__ DecodeCudaParams p) {
  extern __shared__ uint4 shared[];
  Step<T, kRows, kStages>(p, reinterpret_cast<char*>(shared)).run();
}

constexpr int kDeepRing = 4, kShallowRing = 2;  // stages: 128 or 64 kB of shared memory

int64_t fixed_bytes(int stages) {
  return stages == kDeepRing ? decode::kFixedBytes<kDeepRing> : decode::kFixedBytes<kShallowRing>;
}

// Shared memory for the largest of the inputs that a block holds at a time.
int64_t largest_inputs(const DecodeCudaSizes& s, const DecodePlan& plan) {
  const int element = s.element();
  const int model = units_of(s.d_model * element), inner = units_of(s.d_inner * element);
  int units = model;
  for (int pieces : {plan.x_slices, plan.out_parts}) {
    units = std::max(units, (inner + pieces - 1) / pieces);
  }
  // Products read up to a group beyond the end.
  return std::max(StateSpace(s, plan.blocks, element).end, int64_t{s.batch} * pitch_of(units)) +
         decode::kGroup * kUnitBytes;
}

template <typename T, int kRows, int kStages>
cudaError_t launch(const DecodeCudaParams& p, cudaStream_t stream) {
  const auto kernel = decode_step_kernel<T, kRows, kStages>;
  const int bytes = static_cast<int>(p.plan.shared_bytes);
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  error = cudaMemsetAsync(p.arrived, 0, sizeof(unsigned) * p.plan.blocks, stream);
  if (error != cudaSuccess) return error;
  // Cooperative: blocks that wait for each other must all be resident, whatever else runs.
  cudaLaunchAttribute cooperative;
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(p.plan.blocks);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = &cooperative;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, p);
}

template <typename T, int kRows>
cudaError_t launch_with_ring(const DecodeCudaParams& p, cudaStream_t stream) {
  if (p.plan.stages == kDeepRing) return launch<T, kRows, kDeepRing>(p, stream);
  return launch<T, kRows, kShallowRing>(p, stream);
}

template <typename T>
cudaError_t launch_for_batch(const DecodeCudaParams& p, cudaStream_t stream) {
  if (p.size.batch <= 4) return launch_with_ring<T, 4>(p, stream);
  return launch_with_ring<T, 8>(p, stream);
}

}  // namespace

std::string decode_plan(const DecodeCudaSizes& s, int device, DecodePlan& plan) {
  if (s.batch < 1 || s.batch > kMaxDecodeBatch) {
    return "it serves 1 to " + std::to_string(kMaxDecodeBatch) + " rows, not " +
           std::to_string(s.batch);
  }
  if (s.layers < 1 || s.layers > kMaxDecodeLayers) {
    return "it serves 1 to " + std::to_string(kMaxDecodeLayers) + " layers";
  }
  if (s.d_conv < 1 || s.d_conv > kMaxDecodeConv) {
    return "it serves convolutions of at most " + std::to_string(kMaxDecodeConv) + " taps";
  }
  const int weight_element = s.weight_element();
  if (s.d_model * weight_element % 16 != 0 || s.d_inner * weight_element % 16 != 0) {
    return "d_model and d_inner must fill whole pieces of 16 bytes";
  }
  int shared = 0, cooperative = 0, blocks = 0;
  if (cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) ||
      cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, device) ||
      cudaDeviceGetAttribute(&blocks, cudaDevAttrMultiProcessorCount, device)) {
    return "the device does not tell its properties";
  }
  if (!cooperative) return "the device has no cooperative launches";
  plan.blocks = blocks;
  if (s.int8) {
    if (s.dtype == DType::kFloat32) return "beside int8 weights it serves fp16 and bf16";
    plan.one_row = decode_row_plan(s, device, shared, plan);
    return plan.one_row ? "" : "int8 weights are served for one row, from compute capability 9.0";
  }
  const int tiles = (s.projected + kTileRows - 1) / kTileRows;
  const int inner = units_of(s.d_inner * s.element());
  plan.x_slices = std::max(1, std::min(blocks / tiles, inner / 4));
  for (int stages : {kDeepRing, kShallowRing}) {
    for (int parts = 1; parts <= decode::kMaxParts; ++parts) {
      plan.stages = stages;
      plan.out_parts = parts;
      plan.shared_bytes = fixed_bytes(stages) + largest_inputs(s, plan);
      if (plan.shared_bytes > shared) continue;
      plan.one_row = decode_row_plan(s, device, shared, plan);
      return "";
    }
  }
  return "the inputs of " + std::to_string(s.batch) +
         " rows do not fit the shared memory of a multiprocessor";
}

const char* decode_step_cuda(const DecodeCudaParams& p, void* stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  cudaError_t error;
  if (p.plan.one_row) {
    error = decode_row(p, stream);
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
  }
  switch (p.size.dtype) {
    case DType::kFloat16:
      error = launch_for_batch<__half>(p, stream);
      break;
    case DType::kBFloat16:
      error = launch_for_batch<__nv_bfloat16>(p, stream);
      break;
    default:
      error = launch_for_batch<float>(p, stream);
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace mamba
