// The products of a decode step: rows in tiles, activations laid out for them, weights read once.
// Included by one file per instruction set.
#pragma once

#include <algorithm>
#include <cstring>

#include "../../common/simd.h"
#include "../../common/simd_tiles.h"
#include "../../linear/cpu/product.h"
#include "decode.h"
#include "upcoming.h"

namespace mamba {
namespace MAMBA_ISA {

inline int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// Rows that go through a product together; `width` of them with the padding.
struct Tile {
  int64_t first = 0, rows = 0, width = 0;
};

inline Tile next_tile(const DecodeParams& p, int64_t first) {
  const int64_t width = next_tile_rows(p.batch - first);
  return {first, std::min(width, p.batch - first), width};
}

inline int64_t padded_rows(const DecodeParams& p) {
  int64_t rows = 0;
  for (Tile t; rows < p.batch; rows += t.width) t = next_tile(p, rows);
  return rows;
}

// The input of a product for all rows: tile after tile, each laid out as the product wants it.
// (Only the last tile is padded, so a tile's first row is also its place.)
struct Activations {
  float* data = nullptr;
  int64_t in = 0;
  ActivationLayout layout = ActivationLayout::kFloats;
  char* prepared = nullptr;  // layout kRows: memory of this thread's for prepared rows

  static int64_t floats(int64_t rows, int64_t in) { return rows * round_up(in, kTileInputs); }

  char* tile(const Tile& t) const {
    if (layout == ActivationLayout::kFloats || layout == ActivationLayout::kRows) {
      return reinterpret_cast<char*>(data + t.first * in);
    }
    const int64_t padded = layout == ActivationLayout::kPairs ? in : round_up(in, kTileInputs);
    return reinterpret_cast<char*>(data) + t.first * padded * 2;
  }

  // Inputs [k, k + count) of one row; k is a multiple of kBlock.
  MAMBA_INLINE void put(const Tile& t, int64_t row, int64_t k, const float* values,
                        int64_t count) const {
    if (layout == ActivationLayout::kRows) {
      std::copy(values, values + count, data + (t.first + row) * in + k);
      return;
    }
    if (layout == ActivationLayout::kFloats) {
      float* const start = reinterpret_cast<float*>(tile(t)) + row;
      for (int64_t i = 0; i < count; ++i) start[(k + i) * t.width] = values[i];
      return;
    }
    for (int64_t done = 0; done < count; done += kBlock) {
      const int64_t now = std::min(kBlock, count - done);
      uint16_t rounded[kBlock] = {};
      if (now == kBlock) {
        for (int64_t i = 0; i < kBlock; i += kLanes) {
          store_bfloat16(rounded + i, load(values + done + i));
        }
      } else {
        for (int64_t i = 0; i < now; ++i) rounded[i] = float_to_bfloat16(values[done + i]);
      }
      put_rounded(t, row, k + done, rounded, (now + 1) / 2 * 2);
    }
  }

  // To be called when all inputs are there, before the products with `w`.
  void prepare(const PackedWeight& w, const DecodeParams& p) const {
    if (layout != ActivationLayout::kRows) return;
    const auto write = select_product(w, 1).prepare;
    for (Tile t; t.first < p.batch; t.first += t.width) {
      t = next_tile(p, t.first);
      write(w, data + t.first * in, t.rows, t.width, prepared + t.first * prepared_bytes(w));
    }
  }

  const char* ready(const PackedWeight& w, const Tile& t) const {
    return layout == ActivationLayout::kRows ? prepared + t.first * prepared_bytes(w) : tile(t);
  }

 private:
  MAMBA_INLINE void put_rounded(const Tile& t, int64_t row, int64_t k, const uint16_t* values,
                                int64_t count) const {
    char* const start = tile(t);
    if (layout == ActivationLayout::kTiles) {
      const int64_t at = (k / kTileInputs * t.width + row) * kTileInputs + k % kTileInputs;
      std::memcpy(start + at * 2, values, count * 2);
      return;
    }
    for (int64_t i = 0; i < count / 2; ++i) {
      std::memcpy(start + ((k / 2 + i) * t.width + row) * 4, values + 2 * i, 4);
    }
  }
};

constexpr int64_t kLayerStretches = 6;  // five weights and A

// The blocks of a weight that a thread reads.
struct Share {
  const PackedWeight* w = nullptr;
  int64_t begin = 0, end = 0;

  int64_t bytes(int64_t blocks) const { return blocks * w->in * kBlock * weight_bytes(w->kind); }
  Stretch stretch() const {
    return {static_cast<const char*>(w->data) + bytes(begin), bytes(end - begin)};
  }
};

template <class F>
MAMBA_INLINE void multiply(const Share& share, const Activations& x, const Tile& tile,
                           int64_t block, int64_t end, Upcoming& upcoming, int64_t lines, F&& f) {
  const PackedWeight& w = *share.w;
  alignas(64) float out[kProductFloats];
  const Product product = select_product(w, tile.width);
  const char* const ready = x.ready(w, tile);
  while (block < end) {
    const bool many = end - block >= product.blocks_at_once;
    const int64_t done = block + (many ? product.blocks_at_once : 1);
    upcoming.reached(share.bytes(done - share.begin));
    (many ? product.many : product.one)(w, block, ready, out);
    for (float* values = out; block < done; ++block) {
      for (int64_t r = 0; r < tile.width; ++r, values += kBlock) {
        if (r >= tile.rows) continue;  // padding
        for (int64_t i = 0; w.bias && i < kBlock; i += kLanes) {
          store(values + i, load(values + i) + load(w.bias + block * kBlock + i));
        }
        f(block, tile, r, values);
        if (lines > 0) upcoming.ask(lines);
      }
    }
  }
}

inline ActivationLayout layout_for(const PackedWeight& w) { return select_product(w, 1).layout; }

// Calls f(block, tile, row of the tile, values) for every output of a share of a weight, bias
// included; values are kBlock floats that f may overwrite. Then it asks for `lines` of what comes
// next. All tiles go through a few blocks before the next blocks, so that the weight comes from
// memory once.
template <class F>
void for_each_output(const Share& share, const Activations& x, const DecodeParams& p,
                     Upcoming& upcoming, int64_t lines, F&& f) {
  upcoming.next_stretch();
  for (int64_t begin = share.begin; begin < share.end; begin += kMaxBlocksAtOnce) {
    const int64_t stop = std::min<int64_t>(share.end, begin + kMaxBlocksAtOnce);
    for (int64_t first = 0; first < p.batch;) {
      const Tile tile = next_tile(p, first);
      multiply(share, x, tile, begin, stop, upcoming, lines, f);
      first += tile.width;
    }
  }
}

}  // namespace MAMBA_ISA
}  // namespace mamba
