// Weights of a single row's step on their way into shared memory. A warp of their own fetches them
// with bulk copies into a ring of slots, in the order of their use, far ahead of it: the weights do
// not depend on what the blocks exchange, so that memory stays busy during exchanges, and what
// comes after the ring is asked into the L2 cache.
#pragma once

#include "../../common/cuda_barrier.cuh"
#include "row_exchange.cuh"
#include "row_layout.h"

namespace mamba {
namespace decode {

__device__ __forceinline__ void wait_patiently(uint32_t barrier, int phase) {
#ifdef MAMBA_DECODE_WATCHDOG
  Patience patience;
  unsigned done;
  do {
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.b32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(barrier), "r"(phase)
        : "memory");
    patience.turn();
  } while (!done);
#else
  wait_barrier(barrier, phase);
#endif
}

__device__ __forceinline__ void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// A warp arrives as one lane, after its others, and all warps as one thread. compute-sanitizer's
// racecheck does not follow an order that goes through others, so in a library that it shall check
// everyone arrives.
#ifdef MAMBA_RACECHECK
constexpr int kWarpArrivals = 32, kBlockArrivals = kRowThreads;
#else
constexpr int kWarpArrivals = 1, kBlockArrivals = 1;
#endif

// A block's barriers: slots that are full and slots that are empty, the same of the stages of small
// arrays.
class RowBarriers {
 public:
  __device__ RowBarriers(char* shared, const RowLayout& r)
      : first_(shared_address(shared + r.barriers)) {}

  __device__ void init() const {
    const int i = static_cast<int>(threadIdx.x);
    if (i < kBarriers) {
      const int stage = i - 2 * kMaxSlots;
      init_barrier(first_ + 8 * i, i < kMaxSlots     ? 1
                                   : stage < 0       ? kRowWarps * kWarpArrivals
                                   : stage < kStages ? 32
                                                     : kBlockArrivals);
    }
  }

  __device__ __forceinline__ uint32_t full(int slot) const { return first_ + 8 * slot; }
  __device__ __forceinline__ uint32_t empty(int slot) const { return full(kMaxSlots + slot); }
  __device__ __forceinline__ uint32_t ready(int stage) const { return full(2 * kMaxSlots + stage); }
  __device__ __forceinline__ uint32_t used(int stage) const {
    return full(2 * kMaxSlots + kStages + stage);
  }

 private:
  uint32_t first_;
};

// What a block owns.
struct Shares {
  Range channels, rows, tokens;

  __device__ explicit Shares(const DecodeCudaSizes& s)
      : channels(share_of(s.d_inner, kChannelGroup, blockIdx.x, gridDim.x)),
        rows(share_of(s.d_model, 1, blockIdx.x, gridDim.x)),
        tokens(share_of(s.vocab, 1, blockIdx.x, gridDim.x)) {}
};

// The slots one after the other: which bytes go into each.
class WeightOrder {
 public:
  __device__ WeightOrder(const DecodeCudaParams& p, const RowLayout& r, const Shares& shares)
      : p_(p), r_(r), shares_(shares) {
    enter();
  }

  // Two pieces, the second mostly empty; false after the last slot.
  struct Slot {
    const char* from[2];
    int bytes[2];
  };
  __device__ bool next(Slot& slot) {
    while (row_ >= rows_) {
      if (kind_ == kHead) return false;
      kind_ = kind_ == kIn ? kOut : ++layer_ < p_.size.layers ? kIn : kHead;
      enter();
    }
    int end = row_ + slot_rows_;
    if (end > rows_) end = rows_;
    const int first = end < split_ ? end - row_ : row_ < split_ ? split_ - row_ : 0;
    slot.from[0] = at(row_);
    slot.bytes[0] = first * row_bytes_;
    slot.from[1] = at(row_ + first);
    slot.bytes[1] = (end - row_ - first) * row_bytes_;
    row_ = end;
    return true;
  }

  __device__ bool at_head() const { return kind_ == kHead; }

 private:
  enum Kind : int { kIn, kOut, kHead };

  __device__ __forceinline__ const char* at(int row) const {
    return weight_ + (row + (row >= split_ ? gap_ : 0)) * int64_t{row_bytes_};
  }

  __device__ void enter() {
    const Product& c = r_.product[kind_ == kOut ? kOfInner : kOfModel];
    row_bytes_ = c.row_vectors * 16;
    slot_rows_ = c.slot_rows;
    row_ = 0;
    const DecodeLayerArgs& a = p_.layer[kind_ == kHead ? 0 : layer_];
    const int channels = shares_.channels.count;
    const Range rows = kind_ == kIn    ? Range{shares_.channels.first, 2 * channels}
                       : kind_ == kOut ? shares_.rows
                                       : shares_.tokens;
    rows_ = rows.count;
    split_ = kind_ == kIn ? channels : rows_;
    gap_ = p_.size.d_inner - channels;
    const void* weight = kind_ == kIn ? a.in_proj : kind_ == kOut ? a.out_proj : p_.lm_head;
    weight_ = static_cast<const char*>(weight) + int64_t{rows.first} * row_bytes_;
  }

  const DecodeCudaParams& p_;
  const RowLayout& r_;
  const Shares& shares_;
  const char* weight_;
  int layer_ = 0, kind_ = kIn;
  int row_, rows_, split_, gap_, row_bytes_, slot_rows_;
};

__device__ __forceinline__ void bulk_copy(uint32_t to, const char* from, int bytes,
                                          uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(to),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
}

// Fetches all weights of the step; one thread. It does not ask for all that has place in the ring
// at once: the words that blocks exchange would queue up behind it.
__device__ __forceinline__ void fetch_weights(const DecodeCudaParams& p, const RowLayout& r,
                                              char* shared, const Shares& shares,
                                              RowBarriers barriers) {
  WeightOrder order(p, r, shares);
  WeightOrder::Slot s;
  const uint32_t ring = shared_address(shared + r.ring);
  int slot = 0, arriving = 0, turn = 0, arriving_turn = 0, of_head = 0;
#pragma unroll 1
  for (int number = 0; order.next(s); ++number) {
    if (turn > 0) wait_patiently(barriers.empty(slot), (turn - 1) & 1);
    if (order.at_head()) ++of_head;
    if (number >= r.in_flight && of_head <= r.slots) {
      wait_patiently(barriers.full(arriving), arriving_turn & 1);
      if (++arriving == r.slots) arriving = 0, ++arriving_turn;
    }
    const uint32_t full = barriers.full(slot), to = ring + slot * r.slot_bytes;
    arrive_expecting(full, s.bytes[0] + s.bytes[1]);
    if (s.bytes[0] > 0) bulk_copy(to, s.from[0], s.bytes[0], full);
    if (s.bytes[1] > 0) bulk_copy(to + s.bytes[0], s.from[1], s.bytes[1], full);
    if (++slot == r.slots) slot = 0, ++turn;
  }
}

// A computing warp's way through the ring.
class RingReader {
 public:
  __device__ RingReader(const RowLayout& r, const char* shared, RowBarriers barriers)
      : ring_(shared + r.ring), barriers_(barriers), slots_(r.slots), slot_bytes_(r.slot_bytes) {}

  __device__ __forceinline__ const char* wait() const {
    wait_patiently(barriers_.full(slot_), phase_);
    return ring_ + slot_ * slot_bytes_;
  }

  __device__ __forceinline__ void release() {
    __syncwarp();
    if (threadIdx.x % 32 < kWarpArrivals) arrive(barriers_.empty(slot_));
    if (++slot_ == slots_) slot_ = 0, phase_ ^= 1;
  }

 private:
  const char* ring_;
  RowBarriers barriers_;
  int slots_, slot_bytes_;
  int slot_ = 0, phase_ = 0;
};

}  // namespace decode
}  // namespace mamba
