#include "pack.h"

#include <algorithm>

namespace mamba {
namespace {

// kPair inputs of one output lie side by side.
template <class T, int64_t kPair>
void pack_blocks(T* to, const T* from, int64_t out, int64_t in, int64_t padded_in, int64_t begin,
                 int64_t end) {
  constexpr int64_t kTile = 64;  // inputs: what is written at a time stays in the first cache
  for (int64_t block = begin; block < end; ++block) {
    T* const start = to + block * padded_in * kBlock;
    const int64_t rows = std::min(kBlock, out - block * kBlock);
    for (int64_t k0 = 0; k0 < in; k0 += kTile) {
      const int64_t stop = std::min(in, k0 + kTile);
      for (int64_t row = 0; row < rows; ++row) {
        const T* source = from + (block * kBlock + row) * in;
        for (int64_t k = k0; k < stop; ++k) {
          start[(k / kPair * kBlock + row) * kPair + k % kPair] = source[k];
        }
      }
    }
  }
}

}  // namespace

void pack_weight(const PackedWeight& w, const void* weight, int64_t in, int64_t begin,
                 int64_t end) {
  void* to = const_cast<void*>(w.data);
  switch (w.kind) {
    case WeightKind::kInt8:
      return pack_blocks<int8_t, 1>(static_cast<int8_t*>(to), static_cast<const int8_t*>(weight),
                                    w.out, in, w.in, begin, end);
    case WeightKind::kFloat16:
      return pack_blocks<uint16_t, 1>(static_cast<uint16_t*>(to),
                                      static_cast<const uint16_t*>(weight), w.out, in, w.in, begin,
                                      end);
    case WeightKind::kBFloat16:
      return pack_blocks<uint16_t, 2>(static_cast<uint16_t*>(to),
                                      static_cast<const uint16_t*>(weight), w.out, in, w.in, begin,
                                      end);
    default:
      return pack_blocks<uint32_t, 1>(static_cast<uint32_t*>(to),
                                      static_cast<const uint32_t*>(weight), w.out, in, w.in, begin,
                                      end);
  }
}

}  // namespace mamba
