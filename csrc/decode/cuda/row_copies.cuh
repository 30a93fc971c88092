// A layer's small arrays on their way into shared memory: the norm's weights, and of everything
// that belongs to channels or rows of out_proj this block's part. A list of 16-byte copies is made
// once and carried out for each layer.
#pragma once

#include "row_layout.h"
#include "stream.cuh"

namespace mamba {
namespace decode {

class SmallCopies {
 public:
  __device__ SmallCopies(const DecodeCudaParams& p, const RowLayout& r, char* shared,
                         Range channels, Range rows)
      : p_(p), r_(r), shared_(shared), channels_(channels), rows_(rows) {
    const int e = p.size.dtype == DType::kFloat32 ? 4 : 2;
    column_bytes_ = kChannelGroup * e;
    columns_ = channels.count / kChannelGroup * p.size.projected;
    count_ = norm_count_ = 0;
#pragma unroll 1
    for (int i = 0; i < kSmalls; ++i) {
      if (!exists(i)) continue;
      const int64_t begin = begin_of(i);
      count_ += static_cast<int>((begin % 16 + bytes_of(i) + 15) / 16);
      if (i <= kNormBias) norm_count_ = count_;
    }
  }

  // Writes the list, and where in the buffer this block's parts begin, -1 for one that is absent;
  // all threads call this, then synchronise.
  __device__ void list() const {
    int* places = reinterpret_cast<int*>(shared_ + r_.places);
    if (threadIdx.x < kSmalls) {
      const int i = static_cast<int>(threadIdx.x);
      places[i] = exists(i) ? r_.small[i].place + static_cast<int>(begin_of(i) % 16) : -1;
    }
    uint2* copies = reinterpret_cast<uint2*>(shared_ + r_.copies);
    int done = 0;
#pragma unroll 1
    for (int i = 0; i < kSmalls; ++i) {
      if (!exists(i)) continue;
      const int64_t begin = begin_of(i), end = begin + bytes_of(i), first = begin / 16 * 16;
      const int chunks = static_cast<int>((end - first + 15) / 16);
      for (int k = threadIdx.x; k < chunks; k += kRowThreads) {
        const int64_t from = first + 16 * int64_t{k};
        const int bytes = end - from < 16 ? static_cast<int>(end - from) : 16;
        copies[done + k] = pack(from, r_.small[i].place + 16 * k, r_.small[i].field, bytes);
      }
      done += chunks;
    }
    uint2* columns = reinterpret_cast<uint2*>(shared_ + r_.column_copies);
    const int64_t row_bytes = int64_t{column_bytes_} / kChannelGroup * p_.size.d_inner;
    const int64_t first = int64_t{column_bytes_} / kChannelGroup * channels_.first;
    for (int k = threadIdx.x; k < columns_; k += kRowThreads) {
      const int group = k / p_.size.projected, output = k - group * p_.size.projected;
      columns[k] = pack(output * row_bytes + first + group * column_bytes_,
                        r_.columns + k * column_bytes_, 0, column_bytes_);
    }
  }

  // Starts the copies for a layer; after the last one there is the last norm.
  __device__ __forceinline__ void start(int layer) const {
    const bool last = layer == p_.size.layers;
    const void* const* fields =
        last ? &p_.norm_weight : reinterpret_cast<const void* const*>(&p_.layer[layer]);
    char* buffer = shared_ + r_.buffers + layer % 2 * r_.buffer_bytes;
    const uint2* copies = reinterpret_cast<const uint2*>(shared_ + r_.copies);
    const int count = last ? norm_count_ : count_;
#pragma unroll 1
    for (int k = threadIdx.x; k < count; k += kRowThreads) {
      const uint2 c = copies[k];
      const char* from = static_cast<const char*>(fields[c.y >> 16 & 255]) + c.x;
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(place(buffer, c)),
                   "l"(from), "r"(c.y >> 24)
                   : "memory");
    }
    if (last) return;
    const char* x_proj = static_cast<const char*>(p_.layer[layer].x_proj);
    const uint2* columns = reinterpret_cast<const uint2*>(shared_ + r_.column_copies);
#pragma unroll 1
    for (int k = threadIdx.x; k < columns_; k += kRowThreads) {
      const uint2 c = columns[k];
      if (column_bytes_ == 8) {
        asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(place(buffer, c)),
                     "l"(x_proj + c.x)
                     : "memory");
      } else {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(place(buffer, c)),
                     "l"(x_proj + c.x)
                     : "memory");
      }
    }
  }

  // This thread's copies have arrived.
  __device__ __forceinline__ static void wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

 private:
  __device__ __forceinline__ static uint2 pack(int64_t from, int place, int field, int bytes) {
    return make_uint2(static_cast<unsigned>(from),
                      static_cast<unsigned>(place / 8 | field << 16 | bytes << 24));
  }

  __device__ __forceinline__ static unsigned place(char* buffer, uint2 c) {
    return static_cast<unsigned>(__cvta_generic_to_shared(buffer)) + (c.y & 0xffff) * 8;
  }

  // All layers have the same biases or none.
  __device__ __forceinline__ bool exists(int i) const {
    return reinterpret_cast<const void* const*>(&p_.layer[0])[r_.small[i].field] != nullptr;
  }

  __device__ __forceinline__ int64_t begin_of(int i) const {
    const SmallLayout& s = r_.small[i];
    const int first = s.scope == SmallLayout::kChannels ? channels_.first
                      : s.scope == SmallLayout::kRows   ? rows_.first
                                                        : 0;
    return s.base + int64_t{first} * s.unit;
  }

  __device__ __forceinline__ int64_t bytes_of(int i) const {
    const SmallLayout& s = r_.small[i];
    const int count = s.scope == SmallLayout::kChannels ? channels_.count
                      : s.scope == SmallLayout::kRows   ? rows_.count
                                                        : 1;
    return int64_t{count} * s.unit;
  }

  const DecodeCudaParams& p_;
  const RowLayout& r_;
  char* shared_;
  const Range channels_, rows_;
  int column_bytes_, columns_, count_, norm_count_;
};

}  // namespace decode
}  // namespace mamba
