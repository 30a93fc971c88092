// A layer's small arrays on their way into shared memory: the norm's weights, and of everything
// that belongs to channels this block's part. A warp of its own fetches them, each stage as soon as
// the layer before no longer needs its memory.
#pragma once

#include "row_ring.cuh"

namespace mamba {
namespace decode {

// Carried out by one warp.
class SmallFetcher {
 public:
  __device__ SmallFetcher(const DecodeCudaParams& p, const RowLayout& r, char* shared,
                          const Shares& shares, RowBarriers barriers)
      : p_(p),
        r_(r),
        shared_(shared),
        channels_(shares.channels),
        barriers_(barriers),
        lane_(static_cast<int>(threadIdx.x) % 32) {
    // A lane knows where one of the arrays is.
    const int i = lane_ < kSmalls ? lane_ : 0;
    const SmallLayout& s = r.small[i];
    const Range units = s.scope == SmallLayout::kAll        ? Range{0, 1}
                        : s.scope == SmallLayout::kChannels ? shares.channels
                                                            : shares.rows;
    const int64_t begin = s.base + int64_t{units.first} * s.unit;
    const int64_t end = begin + int64_t{units.count} * s.unit;
    field_ = s.field;
    place_ = s.place;
    from_ = begin / 16 * 16;
    bytes_ = exists(i) ? static_cast<int>(end - from_) : 0;
  }

  // After the last layer there is the last norm.
  __device__ void run() const {
#pragma unroll 1
    for (int layer = 0; layer <= p_.size.layers; ++layer) {
      const bool last = layer == p_.size.layers;
      const void* const* fields =
          last ? &p_.norm_weight : reinterpret_cast<const void* const*>(&p_.layer[layer]);
      const void* data = field_ < (last ? 2 : kFields) ? fields[field_] : nullptr;
#pragma unroll 1
      for (int stage = 0; stage < (last ? 1 : kStages); ++stage) {
        if (layer > 0) wait_patiently(barriers_.used(stage), (layer - 1) & 1);
        const int begin = stage == kForNorm ? 0 : stage == kForConvolution ? kInBias : kDtProj;
        const int end = stage == kForNorm ? kInBias : stage == kForConvolution ? kDtProj : kSmalls;
#pragma unroll 1
        for (int i = begin; i < end; ++i) copy(i, data);
        if (stage == kForConvolution) copy_columns(layer);
#ifdef MAMBA_RACECHECK  // which does not follow arrivals of copies
        asm volatile("cp.async.wait_all;" ::: "memory");
        arrive(barriers_.ready(stage));
#else
        asm volatile(
            "cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barriers_.ready(stage))
            : "memory");
#endif
      }
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
  }

 private:
  static constexpr int kFields = sizeof(DecodeLayerArgs) / sizeof(void*);

  // All layers have the same biases or none.
  __device__ __forceinline__ bool exists(int i) const {
    return reinterpret_cast<const void* const*>(&p_.layer[0])[r_.small[i].field] != nullptr;
  }

  __device__ __forceinline__ static void copy_async(uint32_t to, const char* from, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes)
                 : "memory");
  }

  // Array i, of which lane i knows the places.
  __device__ __forceinline__ void copy(int i, const void* data) const {
    const auto own = reinterpret_cast<unsigned long long>(data) + from_;
    const char* from = reinterpret_cast<const char*>(__shfl_sync(0xffffffffu, own, i));
    const int bytes = __shfl_sync(0xffffffffu, bytes_, i);
    const uint32_t to = shared_address(shared_) + __shfl_sync(0xffffffffu, place_, i);
#pragma unroll 1
    for (int at = 16 * lane_; at < bytes; at += 512) {
      copy_async(to + at, from + at, bytes - at < 16 ? bytes - at : 16);
    }
  }

  // x_proj's columns of this block's channels: four channels of all outputs, then the next four.
  __device__ __forceinline__ void copy_columns(int layer) const {
    const int e = r_.column_element, outputs = p_.size.projected;
    const int row_bytes = p_.size.d_inner * e, group_bytes = kChannelGroup * e;
    const int groups = channels_.count / kChannelGroup;
    const char* from = static_cast<const char*>(p_.layer[layer].x_proj) + channels_.first * e;
    const uint32_t to = shared_address(shared_ + r_.columns);
#pragma unroll 1
    for (int output = lane_; output < outputs; output += 32) {
      const char* row = from + static_cast<int64_t>(output) * row_bytes;
      uint32_t place = to + output * group_bytes;
#pragma unroll 1
      for (int g = 0; g < groups; ++g) {
        if (group_bytes == 4) {
          asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(place), "l"(row)
                       : "memory");
        } else if (group_bytes == 8) {
          asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(place), "l"(row)
                       : "memory");
        } else {
          copy_async(place, row, 16);
        }
        row += group_bytes, place += outputs * group_bytes;
      }
    }
  }

  const DecodeCudaParams& p_;
  const RowLayout& r_;
  char* shared_;
  const Range channels_;
  const RowBarriers barriers_;
  const int lane_;
  int field_, place_, bytes_;
  int64_t from_;
};

}  // namespace decode
}  // namespace mamba
