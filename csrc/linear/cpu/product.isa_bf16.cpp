#include "product.h"

#include "../../common/simd.h"

#if defined(__GNUC__) && !defined(__clang__)
// GCC warns of the placeholder operands inside its own AVX-512 headers.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace mamba {
namespace MAMBA_ISA {
namespace {

constexpr int kVecs = kBlock / kLanes;  // registers for the outputs of one block
constexpr int64_t kPrefetchBytes = 4096;

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

#if defined(__AVX512BF16__)
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
  constexpr int64_t kAhead = kPrefetchBytes / static_cast<int64_t>(sizeof(typename W::T));
  int64_t step = begin / W::kStep;
  const int64_t last = end / W::kStep;
  for (; step + W::kStepsAtOnce <= last; step += W::kStepsAtOnce) {
#pragma GCC unroll 4
    for (int b = 0; b < kBlocks; ++b) {
      __builtin_prefetch(w + b * stride + step * kElements + kAhead);
    }
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
          const Vec scaled = sums[b * kVecs + v][r] * scale;
          store(p, group ? load(p) + scaled : scaled);
        }
      }
    }
  }
}

template <int kRows>
Product select_kind(WeightKind kind) {
  constexpr int kBlocks = blocks_at_once(kRows);
  switch (kind) {
    case WeightKind::kFloat16:
      return {product<ReadF16, kRows, kBlocks>, product<ReadF16, kRows, 1>, kBlocks, false};
    case WeightKind::kBFloat16:
      return {product<ReadBF16, kRows, kBlocks>, product<ReadBF16, kRows, 1>, kBlocks,
              ReadBF16::kPairs};
    case WeightKind::kInt8:
      return {product_int8<kRows, kBlocks>, product_int8<kRows, 1>, kBlocks, false};
    default:
      return {product<ReadF32, kRows, kBlocks>, product<ReadF32, kRows, 1>, kBlocks, false};
  }
}

}  // namespace

int64_t next_tile_rows(int64_t rows) {
  constexpr int kLargest = kTileRows[sizeof(kTileRows) / sizeof(kTileRows[0]) - 1];
  const int64_t tiles = (rows + kLargest - 1) / kLargest;
  for (const int tile : kTileRows) {
    if (tile * tiles >= rows) return tile;  // tiles of about the same size
  }
  return kLargest;
}

Product select_product(WeightKind kind, int64_t rows) {
  switch (rows) {
#if MAMBA_LANES == 16
    case 16:
      return select_kind<16>(kind);
    case 12:
      return select_kind<12>(kind);
    case 8:
      return select_kind<8>(kind);
#endif
#if MAMBA_LANES >= 8
    case 6:
      return select_kind<6>(kind);
    case 4:
      return select_kind<4>(kind);
#endif
    case 3:
      return select_kind<3>(kind);
    case 2:
      return select_kind<2>(kind);
    default:
      return select_kind<1>(kind);
  }
}

}  // namespace MAMBA_ISA
}  // namespace mamba
