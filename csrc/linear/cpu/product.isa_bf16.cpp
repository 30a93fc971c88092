#include "product.h"

#include <algorithm>

#include "../../common/simd.h"
#if defined(__AVX512VNNI__)
#include "int8_digits.h"
#endif

#if defined(__GNUC__) && !defined(__clang__)
// GCC warns of the placeholder operands inside its own AVX-512 headers.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace mamba {
namespace MAMBA_ISA {
namespace {

constexpr int kVecs = kBlock / kLanes;  // registers for the outputs of one block
constexpr int64_t kPrefetchBytes = 4096;
constexpr int kToSecondCache = 2;  // of __builtin_prefetch

#if MAMBA_LANES == 16
constexpr int kTileRows[] = {1, 2, 3, 4, 6, 8, 12, 16};
constexpr int kAccumulators = 24;
#elif MAMBA_LANES == 8
constexpr int kTileRows[] = {1, 2, 3, 4, 6};
constexpr int kAccumulators = 12;
#else
constexpr int kTileRows[] = {1, 2, 3};
constexpr int kAccumulators = 12;
#endif

// Blocks that a product with this many rows handles at once: enough independent sums to hide the
// latency of a multiply-add, and few enough to stay in registers.
constexpr int blocks_at_once(int rows) {
  const int fits = kAccumulators / (rows * kVecs);
  return fits >= 4 ? 4 : fits >= 2 ? 2 : 1;
}

// How a weight is read: `step` adds kStep inputs of one vector of outputs to the sums of all rows.
// x points to the step's activations.
struct ReadF32 {
  using T = float;
  static constexpr int kStep = 1, kStepsAtOnce = 1;
  static constexpr bool kPairs = false;
  template <int kRows>
  static MAMBA_INLINE void step(const T* w, const float* x, Vec* sums) {
    const Vec value = load(w);
    for (int r = 0; r < kRows; ++r) sums[r] += value * x[r];
  }
};

struct ReadF16 {
  using T = uint16_t;
  static constexpr int kStep = 1, kStepsAtOnce = 2;
  static constexpr bool kPairs = false;
  template <int kRows>
  static MAMBA_INLINE void step(const T* w, const float* x, Vec* sums) {
    const Vec value = load_half(w);
    for (int r = 0; r < kRows; ++r) sums[r] += value * x[r];
  }
};

#if defined(__AMX_BF16__)
// product_tiles below
#elif defined(__AVX512BF16__)
struct ReadBF16 {
  using T = uint16_t;
  static constexpr int kStep = 2, kStepsAtOnce = 1;
  static constexpr bool kPairs = true;
  template <int kRows>
  static MAMBA_INLINE void step(const T* w, const float* x, Vec* sums) {
    const __m512bh value = (__m512bh)_mm512_loadu_si512(w);
    for (int r = 0; r < kRows; ++r) {
      const __m512bh pair = (__m512bh)_mm512_set1_epi32(bits_as<int32_t>(x[r]));
      sums[r] = (Vec)_mm512_dpbf16_ps((__m512)sums[r], value, pair);
    }
  }
};
#else
struct ReadBF16 {
  using T = uint16_t;
  static constexpr int kStep = 2, kStepsAtOnce = 1;
  static constexpr bool kPairs = false;
  template <int kRows>
  static MAMBA_INLINE void step(const T* w, const float* x, Vec* sums) {
    VecU pair;
    std::memcpy(&pair, w, sizeof(pair));
    const Vec even = bits_as<Vec>(pair << 16), odd = bits_as<Vec>(pair & 0xffff0000u);
    for (int r = 0; r < kRows; ++r) sums[r] += even * x[r];
    for (int r = 0; r < kRows; ++r) sums[r] += odd * x[kRows + r];
  }
};
#endif

MAMBA_INLINE Vec load_int8(const int8_t* p) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(__AVX2__)
  return (Vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
  typedef int8_t Bytes __attribute__((vector_size(MAMBA_LANES)));
  Bytes bytes;
  std::memcpy(&bytes, p, sizeof(bytes));
  return __builtin_convertvector(bytes, Vec);
#endif
}

struct ReadInt8 {
  using T = int8_t;
  static constexpr int kStep = 1, kStepsAtOnce = 4;
  static constexpr bool kPairs = false;
  template <int kRows>
  static MAMBA_INLINE void step(const T* w, const float* x, Vec* sums) {
    const Vec value = load_int8(w);
    for (int r = 0; r < kRows; ++r) sums[r] += value * x[r];
  }
};

// One step for all blocks. The blocks are separate streams, `stride` elements apart.
template <class W, int kRows, int kBlocks>
MAMBA_INLINE void step_blocks(const typename W::T* w, int64_t stride, const float* x,
                              Vec (*sums)[kRows]) {
  constexpr int kVecElements = kLanes * W::kStep;
#pragma GCC unroll 4
  for (int b = 0; b < kBlocks; ++b) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      W::template step<kRows>(w + b * stride + v * kVecElements, x, sums[b * kVecs + v]);
    }
  }
}

// Adds inputs [begin, end) to the sums; both are multiples of kStep.
template <class W, int kRows, int kBlocks>
MAMBA_INLINE void sum_inputs(const typename W::T* w, int64_t stride, const float* x, int64_t begin,
                             int64_t end, Vec (*sums)[kRows]) {
  constexpr int64_t kElements = kBlock * W::kStep;                   // of a block, in a step
  constexpr int64_t kValues = W::kPairs ? kRows : kRows * W::kStep;  // floats of x in a step
  // With few rows the reads follow each other fast enough for the nearer half.
  constexpr int64_t kBytes = kRows <= 4 ? kPrefetchBytes / 2 : kPrefetchBytes;
  constexpr int64_t kAhead = kBytes / static_cast<int64_t>(sizeof(typename W::T));
  // Past a stream's end come the ones beside it, which are being read already, then those that the
  // next call reads.
  const int64_t past_end = (kBlocks - 1) * stride;
  int64_t step = begin / W::kStep;
  const int64_t last = end / W::kStep;
  for (; step + W::kStepsAtOnce <= last; step += W::kStepsAtOnce) {
    const int64_t at = step * kElements + kAhead;
    const typename W::T* const ahead = w + (at < stride ? at : at + past_end);
#pragma GCC unroll 4
    for (int b = 0; b < kBlocks; ++b) __builtin_prefetch(ahead + b * stride, 0, kToSecondCache);
#pragma GCC unroll 4
    for (int i = 0; i < W::kStepsAtOnce; ++i) {
      step_blocks<W, kRows, kBlocks>(w + (step + i) * kElements, stride, x + (step + i) * kValues,
                                     sums);
    }
  }
  for (; step < last; ++step) {
    step_blocks<W, kRows, kBlocks>(w + step * kElements, stride, x + step * kValues, sums);
  }
}

// Twice as many rows as stay in registers: a few inputs for the first half of the rows, then the
// same inputs for the second half, out of the first cache. So memory is read at an even pace; one
// half after the other would leave it idle while the second half runs.
template <class W, int kRows, int kBlocks>
void product_halves(const PackedWeight& weight, int64_t block, const void* x, float* out) {
  static_assert(W::kStep == 1 && kRows % 2 == 0, "an input is a line of weights");
  constexpr int kHalf = kRows / 2;
  constexpr int64_t kInputs = 64, kAhead = 2 * kInputs * kBlock;
  const int64_t stride = weight.in * kBlock;
  const auto* w = static_cast<const typename W::T*>(weight.data) + block * stride;
  const auto* rows = static_cast<const float*>(x);
  for (int64_t begin = 0; begin < weight.in; begin += kInputs) {
    const int64_t end = std::min(weight.in, begin + kInputs);
    for (int half = 0; half < 2; ++half) {
      Vec sums[kBlocks * kVecs][kHalf];
      float* const to = out + half * kHalf * kBlock;
#pragma GCC unroll 4
      for (int b = 0; b < kBlocks * kVecs; ++b) {
#pragma GCC unroll 8
        for (int r = 0; r < kHalf; ++r) {
          const float* const sum = to + ((b / kVecs) * kRows + r) * kBlock + b % kVecs * kLanes;
          sums[b][r] = begin ? load(sum) : Vec{};
        }
      }
      // Each half asks for its half of the lines.
      const typename W::T* ahead = w + kAhead + (begin + half * (end - begin) / 2) * kBlock;
      for (int64_t k = begin; k < end; ++k) {
        if (k % 2 == 0) {
#pragma GCC unroll 4
          for (int b = 0; b < kBlocks; ++b) __builtin_prefetch(ahead + b * stride);
          ahead += kBlock;
        }
        step_blocks<W, kHalf, kBlocks>(w + k * kBlock, stride, rows + k * kRows + half * kHalf,
                                       sums);
      }
#pragma GCC unroll 4
      for (int b = 0; b < kBlocks * kVecs; ++b) {
#pragma GCC unroll 8
        for (int r = 0; r < kHalf; ++r) {
          store(to + ((b / kVecs) * kRows + r) * kBlock + b % kVecs * kLanes, sums[b][r]);
        }
      }
    }
  }
}

template <class W, int kRows, int kBlocks>
void product(const PackedWeight& weight, int64_t block, const void* x, float* out) {
  const int64_t stride = weight.in * kBlock;
  const auto* w = static_cast<const typename W::T*>(weight.data) + block * stride;
  Vec sums[kBlocks * kVecs][kRows] = {};
  sum_inputs<W, kRows, kBlocks>(w, stride, static_cast<const float*>(x), 0, weight.in, sums);
  for (int b = 0; b < kBlocks; ++b) {
    for (int v = 0; v < kVecs; ++v) {
      for (int r = 0; r < kRows; ++r) {
        store(out + (b * kRows + r) * kBlock + v * kLanes, sums[b * kVecs + v][r]);
      }
    }
  }
}

// Each group of inputs is summed for itself, then scaled.
template <int kRows, int kBlocks>
void product_int8(const PackedWeight& weight, int64_t block, const void* x, float* out) {
  const int64_t stride = weight.in * kBlock, groups = weight.in / weight.group;
  const auto* w = static_cast<const int8_t*>(weight.data) + block * stride;
  const float* scales = weight.scales + block * groups * kBlock;
  for (int64_t group = 0; group < groups; ++group) {
    Vec sums[kBlocks * kVecs][kRows] = {};
    sum_inputs<ReadInt8, kRows, kBlocks>(w, stride, static_cast<const float*>(x),
                                         group * weight.group, (group + 1) * weight.group, sums);
    for (int b = 0; b < kBlocks; ++b) {
      for (int v = 0; v < kVecs; ++v) {
        const Vec scale = load(scales + (b * groups + group) * kBlock + v * kLanes);
        for (int r = 0; r < kRows; ++r) {
          float* p = out + (b * kRows + r) * kBlock + v * kLanes;
          store(p, multiply_add(sums[b * kVecs + v][r], scale, group ? load(p) : Vec{}));
        }
      }
    }
  }
}

#if defined(__AMX_BF16__)
// The rows that this thread's tile registers are set up for; 0: not at all.
thread_local int tile_rows = 0;

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};  // of a row, for each register
  uint8_t rows[16] = {};
};

// Registers 0 and 1 are sums (rows, 16), 2 and 3 weights (16 pairs of inputs, 16), 4 activations
// (rows, 32).
MAMBA_INLINE void set_up_tiles(int rows) {
  if (tile_rows == rows) return;
  TileConfig config;
  for (int i = 0; i < 5; ++i) {
    config.bytes[i] = 64;
    config.rows[i] = static_cast<uint8_t>(i == 2 || i == 3 ? 16 : rows);
  }
  _tile_loadconfig(&config);
  tile_rows = rows;
}

constexpr int64_t kTileBytes = 1024;  // of weights: 32 inputs of a block

MAMBA_INLINE void prefetch_tile(const char* p) {
  for (int64_t i = 0; i < kTileBytes; i += 64) __builtin_prefetch(p + i + 2 * kPrefetchBytes);
}

template <int kRows, int kBlocks>
void product_tiles(const PackedWeight& weight, int64_t block, const void* x, float* out) {
  static_assert(kBlocks == 1 || kBlocks == 2, "there are two registers for sums");
  set_up_tiles(kRows);
  const int64_t stride = weight.in * kBlock * 2, whole = weight.in / kTileInputs;
  const char* w = static_cast<const char*>(weight.data) + block * stride;
  const char* rows = static_cast<const char*>(x);
  _tile_zero(0);
  if constexpr (kBlocks == 2) _tile_zero(1);
  for (int64_t i = 0; i < whole; ++i, w += kTileBytes, rows += kRows * 64) {
    _tile_loadd(4, rows, 64);
    prefetch_tile(w);
    _tile_loadd(2, w, 64);
    _tile_dpbf16ps(0, 4, 2);
    if constexpr (kBlocks == 2) {
      prefetch_tile(w + stride);
      _tile_loadd(3, w + stride, 64);
      _tile_dpbf16ps(1, 4, 3);
    }
  }
  if (const int64_t tail = weight.in % kTileInputs) {
    // What lies behind the last inputs may be anything: both sides get zeros there.
    alignas(64) char last_rows[kRows * 64] = {}, last[kTileBytes];
    for (int r = 0; r < kRows; ++r) std::memcpy(last_rows + r * 64, rows + r * 64, tail * 2);
    _tile_loadd(4, last_rows, 64);
    for (int b = 0; b < kBlocks; ++b) {
      std::memset(last, 0, sizeof(last));
      std::memcpy(last, w + b * stride, tail * kBlock * 2);
      _tile_loadd(2, last, 64);
      if (b == 0) {
        _tile_dpbf16ps(0, 4, 2);
      } else {
        _tile_dpbf16ps(1, 4, 2);
      }
    }
  }
  _tile_stored(0, out, 64);
  if constexpr (kBlocks == 2) _tile_stored(1, out + kRows * kBlock, 64);
}
#endif

#if defined(__AVX512VNNI__)
bool in_integers(const PackedWeight& w) {
  return w.kind == WeightKind::kInt8 && w.group <= kMostSummed;
}
#endif

template <int kRows>
Product select_kind(const PackedWeight& w) {
  constexpr int kBlocks = blocks_at_once(kRows);
  constexpr auto kFloats = ActivationLayout::kFloats;
#if defined(__AVX512VNNI__)
  if (in_integers(w)) {
    constexpr int kMany = digit_blocks(kRows);
    return {product_digits<kRows, kMany>, product_digits<kRows, 1>, kMany, ActivationLayout::kRows,
            write_digits};
  }
#endif
  switch (w.kind) {
    case WeightKind::kFloat16:
      return {product<ReadF16, kRows, kBlocks>, product<ReadF16, kRows, 1>, kBlocks, kFloats};
    case WeightKind::kBFloat16:
#if defined(__AMX_BF16__)
      return {product_tiles<kRows, 2>, product_tiles<kRows, 1>, 2, ActivationLayout::kTiles};
#else
      return {product<ReadBF16, kRows, kBlocks>, product<ReadBF16, kRows, 1>, kBlocks,
              ReadBF16::kPairs ? ActivationLayout::kPairs : kFloats};
#endif
    case WeightKind::kInt8:
      return {product_int8<kRows, kBlocks>, product_int8<kRows, 1>, kBlocks, kFloats};
    default:
      if constexpr (kRows == kMaxTileRows && kLanes == 16) {
        return {product_halves<ReadF32, kRows, 2>, product_halves<ReadF32, kRows, 1>, 2, kFloats};
      }
      return {product<ReadF32, kRows, kBlocks>, product<ReadF32, kRows, 1>, kBlocks, kFloats};
  }
}

}  // namespace

#if defined(__AMX_BF16__)
void begin_products() { tile_rows = 0; }

void end_products() {
  if (tile_rows != 0) _tile_release();
  tile_rows = 0;
}
#else
void begin_products() {}
void end_products() {}
#endif

int64_t next_tile_rows(int64_t rows) {
  const int64_t largest = kTileRows[sizeof(kTileRows) / sizeof(kTileRows[0]) - 1];
  const int64_t tiles = (rows + largest - 1) / largest;
  for (const int tile : kTileRows) {
    if (tile * tiles >= rows) return tile;  // tiles of about the same size
  }
  return largest;
}

int64_t prepared_bytes(const PackedWeight& w) {
#if defined(__AVX512VNNI__)
  if (in_integers(w)) return digit_bytes(w);
#else
  static_cast<void>(w);
#endif
  return 0;
}

Product select_product(const PackedWeight& w, int64_t rows) {
  switch (rows) {
#if MAMBA_LANES == 16
    case 16:
      return select_kind<16>(w);
    case 12:
      return select_kind<12>(w);
    case 8:
      return select_kind<8>(w);
#endif
#if MAMBA_LANES >= 8
    case 6:
      return select_kind<6>(w);
    case 4:
      return select_kind<4>(w);
#endif
    case 3:
      return select_kind<3>(w);
    case 2:
      return select_kind<2>(w);
    default:
      return select_kind<1>(w);
  }
}

}  // namespace MAMBA_ISA
}  // namespace mamba
