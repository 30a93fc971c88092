// A single row's step: when it is used, its shared memory, its launch.
#include <algorithm>

#include "../../common/cuda_chain.cuh"
#include "../../common/cuda_convert.cuh"
#include "decode.h"
#include "row.h"
#include "row_layout.h"
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#include "row_step.cuh"
#endif

namespace mamba {
namespace {

using decode::kChannelGroup;
using decode::kLanesInt8Log2;
using decode::kMaxSlots;
using decode::kMaxVectors;
using decode::kMaxVectorsInt8;
using decode::kRowBlock;
using decode::kRowThreads;
using decode::kRowWarps;
using decode::kSmalls;
using decode::largest_share;
using decode::Product;
using decode::RowLayout;
using decode::RowWords;
using decode::SmallLayout;

template <typename T, typename W, bool kUsual>
__global__ void __launch_bounds__(kRowBlock, 1)
    decode_row_kernel(const __grid_constant__ DecodeCudaParams p,
                      const __grid_constant__ RowLayout r) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  extern __shared__ uint4 shared_memory[];
  char* shared = reinterpret_cast<char*>(shared_memory);
  const decode::Shares shares(p.size);
  const decode::RowBarriers barriers(shared, r);
  barriers.init();
  publish_barriers();
  const int warp = static_cast<int>(threadIdx.x) / 32;
  __syncthreads();
  if (warp == kRowWarps) {
    if (threadIdx.x % 32 == 0) decode::fetch_weights(p, r, shared, shares, barriers);
  } else if (warp > kRowWarps) {
    decode::SmallFetcher(p, r, shared, shares, barriers).run();
  } else {
    decode::RowStep<T, W, kUsual>(p, r, shared, shares, barriers).run();
  }
#endif
}

int size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

constexpr int kSlotBytes = 20480;

// Chooses the cut of a weight of `rows` rows of a block for which warps take the fewest turns;
// false if there is none.
bool cut(int64_t row_bytes, int rows, int slot_bytes, bool int8, Product& product) {
  const int row_vectors = static_cast<int>(row_bytes / 16);
  const int max_vectors = int8 ? kMaxVectorsInt8 : kMaxVectors;
  // Instructions for 16 bytes, for the rest of a turn, for the inputs.
  const int multiplying = int8 ? 34 : 20, rest = int8 ? 40 : 16, loading = int8 ? 4 : 8;
  int64_t least = -1;
  for (int lanes_log2 : {3, 4, 5}) {
    const int lanes = 1 << lanes_log2, height = 32 / lanes;
    if (row_bytes * height > slot_bytes || (int8 && lanes_log2 != kLanesInt8Log2)) continue;
    for (int vectors = 1; vectors <= max_vectors; ++vectors) {
      const int pieces = (row_vectors + lanes * vectors - 1) / (lanes * vectors);
      if (pieces > kRowWarps) continue;
      const int teams = kRowWarps / pieces, tuples = (rows + height - 1) / height;
      const int64_t cost = int64_t{(tuples + teams - 1) / teams} * (multiplying * vectors + rest) +
                           loading * vectors;
      if (least >= 0 && cost >= least) continue;
      least = cost;
      const int fit = slot_bytes / static_cast<int>(row_bytes * height);
      product = {row_vectors, lanes_log2, vectors, pieces, teams, fit * height, 0};
    }
  }
  for (int warp = 0; least >= 0 && warp < kRowWarps; ++warp) {
    product.team_of_warps |= uint64_t{static_cast<unsigned>(warp / product.pieces)} << 4 * warp;
  }
  return least >= 0;
}

int64_t aligned16(int64_t bytes) { return (bytes + 15) / 16 * 16; }

// Gives a block's shared memory away, piece after piece.
class Places {
 public:
  int take(int64_t bytes) {
    const int64_t at = used_;
    used_ += aligned16(bytes);
    return static_cast<int>(at);
  }
  int64_t used() const { return used_; }

 private:
  int64_t used_ = 0;
};

void lay_out_smalls(const DecodeCudaParams& p, int channels, int rows, RowLayout& r,
                    Places& places) {
  const DecodeCudaSizes& s = p.size;
  const int e = s.element();
  const auto all = SmallLayout::kAll, of_channels = SmallLayout::kChannels;
  const SmallLayout smalls[kSmalls] = {
      {0, all, e * s.d_model, 0, 0},
      {1, all, e * s.d_model, 0, 0},
      {3, of_channels, e, 0, 0},
      {3, of_channels, e, 0, int64_t{e} * s.d_inner},
      {4, of_channels, e * s.d_conv, 0, 0},
      {5, of_channels, e, 0, 0},
      {13, of_channels, size_of(p.conv_dtype) * s.d_conv, 0, 0},
      {15, of_channels, 4, 0, 0},
      {15, of_channels, 4, 0, int64_t{4} * s.d_inner},
      {16, all, 4 * s.projected, 0, 0},
      {7, of_channels, e * s.dt_rank, 0, 0},
      {8, of_channels, e, 0, 0},
      {9, of_channels, size_of(p.A_dtype) * s.d_state, 0, 0},
      {10, of_channels, size_of(p.D_dtype), 0, 0},
      {14, of_channels, size_of(p.ssm_dtype) * s.d_state, 0, 0},
      {17, SmallLayout::kRows, 4, 0, 0},
  };
  for (int i = 0; i < kSmalls; ++i) {
    r.small[i] = smalls[i];
    const auto scope = smalls[i].scope;
    const int64_t count = scope == all ? 1 : scope == of_channels ? channels : rows;
    // A part may begin anywhere in its first 16 bytes.
    r.small[i].place = places.take(count * smalls[i].unit + 15);
  }
}

// All arrays begin at 16 bytes.
RowWords words_of(const DecodeCudaSizes& s, int blocks) {
  const auto even = [](int words) { return static_cast<unsigned>(words + 1) / 2 * 2; };
  RowWords w;
  w.inner = even(s.d_model);
  w.projected = w.inner + even(s.d_inner * s.element() / 4);
  w.replica = w.projected + even(s.projected);
  w.partial = decode::kReplicas * w.replica;
  w.partial_stride = even(blocks);
  return w;
}

// False if `shared` bytes are too few, or rows too long.
bool lay_out(const DecodeCudaParams& p, int shared, RowLayout& r) {
  const DecodeCudaSizes& s = p.size;
  const int blocks = p.plan.blocks, e = s.weight_element();
  const int channels = largest_share(s.d_inner, kChannelGroup, blocks);
  const int rows = largest_share(s.d_model, 1, blocks);
  const int64_t tokens = largest_share(s.vocab, 1, blocks);
  // Rows that a warp has at once, at least; if they are short twice as many, which takes fewer
  // turns.
  const int least_rows = s.int8 ? 32 >> kLanesInt8Log2 : 1;
  const int least = least_rows * e * std::max(s.d_model, s.d_inner);
  r.slot_bytes = std::max({kSlotBytes, least, s.int8 ? std::min(2 * least, 2 * kSlotBytes) : 0});
  Product &model = r.product[decode::kOfModel], &inner = r.product[decode::kOfInner];
  if (!cut(int64_t{e} * s.d_model, 2 * channels, r.slot_bytes, s.int8, model) ||
      !cut(int64_t{e} * s.d_inner, rows, r.slot_bytes, s.int8, inner)) {
    return false;
  }
  r.one_of_model = 1.0f / static_cast<float>(s.d_model);
  r.words = words_of(s, blocks);
  r.column_element = e;
  r.column_lanes_log2 = 0;
  while (r.column_lanes_log2 < 3 && (2 << r.column_lanes_log2) * s.projected <= kRowThreads) {
    ++r.column_lanes_log2;
  }
  Places places;
  r.barriers = places.take(decode::kBarrierBytes);
  r.inputs = places.take(int64_t{4} * std::max(s.d_model, s.d_inner));
  r.sums = places.take(4 * std::max(2 * channels * model.pieces, rows * inner.pieces));
  r.u = places.take(int64_t{4} * channels);
  r.gate = places.take(int64_t{4} * channels);
  r.projected = places.take(int64_t{4} * s.projected);
  r.residual = places.take(int64_t{8} * rows);
  r.out_scales = places.take(s.int8 ? int64_t{4} * rows : 0);
  r.norm = places.take(2 * kRowWarps * 4);
  lay_out_smalls(p, channels, rows, r, places);
  r.columns = places.take(int64_t{channels} * s.projected * e);
  // lm_head's sums lie where the layers' small arrays were, if they fit.
  const int64_t head_bytes = 4 * tokens * model.pieces;
  r.head_sums = r.small[decode::kInBias].place;
  if (places.used() - r.head_sums < head_bytes) r.head_sums = places.take(head_bytes);
  r.ring = static_cast<int>((places.used() + 127) / 128 * 128);
  r.slots = std::min<int64_t>(kMaxSlots, (shared - r.ring) / r.slot_bytes);
  // Measured on an H100: two slots on their way keep its memory busy, one does where the ring holds
  // a whole layer or where weights are int8, and with more exchanges take longer.
  const int64_t layer_bytes = int64_t{e} * (2 * channels * s.d_model + rows * s.d_inner);
  r.in_flight = s.int8 || layer_bytes < int64_t{r.slots} * r.slot_bytes ? 1 : 2;
  r.bytes = r.ring + r.slots * r.slot_bytes;
  return shared >= r.ring && r.slots >= 2;
}

// Offsets in the small arrays have 32 bits.
bool small_enough(const DecodeCudaSizes& s) {
  return int64_t{4} * s.d_inner * std::max({s.d_state, s.dt_rank, s.projected, s.d_conv}) <
         int64_t{1} << 31;
}

int shared_limit() {
  int device = 0, shared = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return shared;
}

// What nearly all models are has a kernel of fewer instructions.
bool usual(const DecodeCudaParams& p) {
  const DecodeCudaSizes& s = p.size;
  const DecodeLayerArgs& a = p.layer[0];
  return s.d_conv == 4 && s.d_state == 16 && s.dt_rank % 4 == 0 && p.is_rms_norm &&
         p.norm_bias == nullptr && a.in_bias == nullptr && a.conv_bias != nullptr &&
         a.dt_bias != nullptr && p.conv_dtype == s.dtype && p.ssm_dtype == s.dtype &&
         p.A_dtype == DType::kFloat32 && p.D_dtype == DType::kFloat32;
}

template <typename T, typename W>
cudaError_t launch(const DecodeCudaParams& p, cudaStream_t stream) {
  const auto kernel = usual(p) ? decode_row_kernel<T, W, true> : decode_row_kernel<T, W, false>;
  RowLayout r;
  if (!lay_out(p, shared_limit(), r)) return cudaErrorInvalidConfiguration;
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
  config.blockDim = dim3(kRowBlock);
  config.dynamicSmemBytes = r.bytes;
  config.stream = stream;
  config.attrs = &cooperative;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, p, r);
}

template <typename T>
cudaError_t launch_for_weights(const DecodeCudaParams& p, cudaStream_t stream) {
  if constexpr (sizeof(T) == 2) {
    if (p.size.int8) return launch<T, int8_t>(p, stream);
  }
  return launch<T, T>(p, stream);
}

}  // namespace

bool decode_row_plan(const DecodeCudaSizes& s, int device, int shared, DecodePlan& plan) {
  if (s.batch != 1 || !runs_code_for_90(device) || !small_enough(s)) return false;
  DecodeCudaParams p;  // with the largest dtypes
  p.size = s;
  p.plan = plan;
  RowLayout r;
  if (!lay_out(p, shared, r)) return false;
  plan.words = r.words.partial + int64_t{r.words.partial_stride} * s.projected;
  return true;
}

cudaError_t decode_row(const DecodeCudaParams& p, cudaStream_t stream) {
  switch (p.size.dtype) {
    case DType::kFloat16:
      return launch_for_weights<__half>(p, stream);
    case DType::kBFloat16:
      return launch_for_weights<__nv_bfloat16>(p, stream);
    default:
      return launch_for_weights<float>(p, stream);
  }
}

}  // namespace mamba
