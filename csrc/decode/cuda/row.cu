// A single row's step: when it is used, its shared memory, its launch.
#include <algorithm>

#include "decode.h"
#include "row_step.cuh"

namespace mamba {
namespace {

using decode::kChannelGroup;
using decode::kRowThreads;
using decode::kRowWarps;
using decode::kSmalls;
using decode::largest_share;
using decode::RowLayout;
using decode::SmallLayout;

template <typename T, int kVectors>
__global__ void __launch_bounds__(kRowThreads, 1)
    decode_row_kernel(const __grid_constant__ DecodeCudaParams p,
                      const __grid_constant__ RowLayout r) {
  extern __shared__ uint4 shared[];
  decode::RowStep<T, kVectors>(p, r, reinterpret_cast<char*>(shared)).run();
}

int size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Pieces of a row of weights, a power of two, with `vectors` times 16 bytes for each lane; 0 if
// there are more than warps.
int pieces_of(int64_t row_bytes, int vectors) {
  int pieces = 1;
  while (int64_t{pieces} * vectors * 512 < row_bytes) pieces *= 2;
  return pieces <= kRowWarps ? pieces : 0;
}

// Chooses the vectors for which the least of what lanes hold is empty.
bool cut_rows(const DecodeCudaSizes& s, DecodePlan& plan) {
  const int64_t model = int64_t{size_of(s.dtype)} * s.d_model;
  const int64_t inner = int64_t{size_of(s.dtype)} * s.d_inner;
  int64_t least = -1;
  for (int vectors : {5, 4, 3}) {
    const int model_pieces = pieces_of(model, vectors), inner_pieces = pieces_of(inner, vectors);
    if (model_pieces == 0 || inner_pieces == 0) continue;
    const int64_t held = int64_t{vectors} * (2 * model_pieces + inner_pieces);
    if (least >= 0 && held > least) continue;
    least = held;
    plan.vectors = vectors;
    plan.model_pieces = model_pieces;
    plan.inner_pieces = inner_pieces;
  }
  return least >= 0;
}

int64_t aligned16(int64_t bytes) { return (bytes + 15) / 16 * 16; }

// Fills in the buffers for a layer's small arrays; returns the number of 16-byte copies at most.
int64_t lay_out_smalls(const DecodeCudaParams& p, int channels, int rows, RowLayout& r) {
  const DecodeCudaSizes& s = p.size;
  const int e = size_of(s.dtype);
  const auto all = SmallLayout::kAll, of_channels = SmallLayout::kChannels;
  const SmallLayout smalls[kSmalls] = {
      {0, all, e * s.d_model, 0, 0},
      {1, all, e * s.d_model, 0, 0},
      {3, of_channels, e, 0, 0},
      {3, of_channels, e, 0, int64_t{e} * s.d_inner},
      {4, of_channels, e * s.d_conv, 0, 0},
      {5, of_channels, e, 0, 0},
      {7, of_channels, e * s.dt_rank, 0, 0},
      {8, of_channels, e, 0, 0},
      {9, of_channels, size_of(p.A_dtype) * s.d_state, 0, 0},
      {10, of_channels, size_of(p.D_dtype), 0, 0},
      {12, SmallLayout::kRows, e, 0, 0},
      {13, of_channels, size_of(p.conv_dtype) * s.d_conv, 0, 0},
      {14, of_channels, size_of(p.ssm_dtype) * s.d_state, 0, 0},
  };
  int64_t used = 0, copies = 0;
  for (int i = 0; i < kSmalls; ++i) {
    r.small[i] = smalls[i];
    r.small[i].place = static_cast<int>(used);
    const int count = smalls[i].scope == all ? 1 : smalls[i].scope == of_channels ? channels : rows;
    // A part may begin anywhere in its first 16 bytes.
    const int64_t bytes = aligned16(int64_t{count} * smalls[i].unit + 15);
    used += bytes, copies += bytes / 16;
  }
  r.columns = static_cast<int>(used);
  used += aligned16(int64_t{channels} * s.projected * e);
  r.buffer_bytes = static_cast<int>(used);
  return copies;
}

// Returns the bytes of shared memory.
int64_t lay_out(const DecodeCudaParams& p, RowLayout& r) {
  const DecodeCudaSizes& s = p.size;
  const int blocks = p.plan.blocks;
  const int channels = largest_share(s.d_inner, kChannelGroup, blocks);
  const int rows = largest_share(s.d_model, 1, blocks);
  const int tokens = largest_share(s.vocab, 1, blocks);
  const int64_t copies = lay_out_smalls(p, channels, rows, r);
  r.column_lanes = 1;
  while (r.column_lanes < 8 && 2 * r.column_lanes * s.projected <= kRowThreads) r.column_lanes *= 2;
  int64_t used = 0;
  const auto place = [&](int64_t bytes) {
    const int64_t at = used;
    used += aligned16(bytes);
    return static_cast<int>(at);
  };
  const int64_t sums = std::max({2 * channels * p.plan.model_pieces, rows * p.plan.inner_pieces,
                                 tokens * p.plan.model_pieces});
  r.buffers = place(2 * r.buffer_bytes);
  r.places = place(4 * kSmalls);
  r.units = place(decode::kUnitTableBytes);
  r.copies = place(8 * copies);
  r.column_copies = place(int64_t{8} * (channels / kChannelGroup) * s.projected);
  r.x = place(int64_t{4} * s.d_model);
  r.y = place(int64_t{4} * s.d_inner);
  r.sums = place(4 * (sums + kRowWarps));
  r.u = place(int64_t{4} * channels);
  r.gate = place(int64_t{4} * channels);
  r.projected = place(int64_t{4} * s.projected);
  r.residual = place(int64_t{8} * rows);
  r.norm = place(2 * kRowWarps * 4);
  r.bytes = static_cast<int>(used);
  return used;
}

// Offsets in a list of copies have 32 bits.
bool small_enough(const DecodeCudaSizes& s) {
  const int64_t limit = int64_t{1} << 31;
  return int64_t{4} * s.d_inner * std::max({s.d_state, s.dt_rank, s.projected, s.d_conv}) < limit &&
         int64_t{4} * std::max(s.d_inner, s.d_model) * std::max(s.d_inner, s.d_model) < limit;
}

template <typename T, int kVectors>
cudaError_t launch(const DecodeCudaParams& p, cudaStream_t stream) {
  const auto kernel = decode_row_kernel<T, kVectors>;
  RowLayout r;
  lay_out(p, r);
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, r.bytes);
  if (error != cudaSuccess) return error;
  error = cudaMemsetAsync(p.words, 0, sizeof(uint64_t) * p.plan.words, stream);
  if (error != cudaSuccess) return error;
  // Cooperative: blocks that wait for each other must all be resident, whatever else runs.
  cudaLaunchAttribute cooperative;
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(p.plan.blocks);
  config.blockDim = dim3(kRowThreads);
  config.dynamicSmemBytes = r.bytes;
  config.stream = stream;
  config.attrs = &cooperative;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, p, r);
}

template <typename T>
cudaError_t launch_for_vectors(const DecodeCudaParams& p, cudaStream_t stream) {
  switch (p.plan.vectors) {
    case 3:
      return launch<T, 3>(p, stream);
    case 4:
      return launch<T, 4>(p, stream);
    default:
      return launch<T, 5>(p, stream);
  }
}

}  // namespace

bool decode_row_plan(const DecodeCudaSizes& s, int shared, DecodePlan& plan) {
  if (s.batch != 1 || !small_enough(s) || !cut_rows(s, plan)) return false;
  DecodeCudaParams p;  // with the largest dtypes
  p.size = s;
  p.plan = plan;
  RowLayout r;
  if (lay_out(p, r) > shared) return false;
  const auto even = [](int64_t words) { return (words + 1) / 2 * 2; };
  const int64_t inner = even(int64_t{s.d_inner} * size_of(s.dtype) / 4);
  plan.words = decode::kReplicas * (even(s.d_model) + inner + even(s.projected)) +
               even(plan.blocks) * s.projected;
  return true;
}

cudaError_t decode_row(const DecodeCudaParams& p, cudaStream_t stream) {
  switch (p.size.dtype) {
    case DType::kFloat16:
      return launch_for_vectors<__half>(p, stream);
    case DType::kBFloat16:
      return launch_for_vectors<__nv_bfloat16>(p, stream);
    default:
      return launch_for_vectors<float>(p, stream);
  }
}

}  // namespace mamba
