// Tiles of (channels, steps) between global and shared memory. A tile keeps the memory order of its
// tensor, so that copies are 16 bytes wide and asynchronous; lanes convert when they read it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "../../common/cuda_convert.cuh"

namespace mamba {

// How a block divides its work: a warp holds 32 / G groups of G lanes; a lane owns L consecutive
// steps of C channels, a group of lanes the tile's G * L steps of the same C channels.
template <int G_, int C_, int L_, int kStates_, int kAtOnce_, int kBlocks_, int kWarps_ = 4>
struct ScanShape {
  static constexpr int G = G_, C = C_, L = L_;
  static constexpr int kStates = kStates_;  // states staged at once
  static constexpr int kAtOnce = kAtOnce_;  // and run side by side
  static constexpr int kBlocks = kBlocks_;  // meant to fit a multiprocessor
  static constexpr int kWarps = kWarps_, kThreads = 32 * kWarps;
  static constexpr int kSteps = G * L;
  static constexpr int kWarpChannels = 32 / G * C;
  static constexpr int kChannels = kWarps * kWarpChannels;
};

enum class TileOrder : int32_t {
  kTime,     // steps are contiguous and rows aligned
  kChannel,  // channels are contiguous and rows aligned
  kElements  // anything else: copied element by element, kept as kTime
};

// A tensor of (batch, channels, length) as tiles are read from it; strides count elements.
struct TileSource {
  char* data = nullptr;
  int64_t stride_b = 0, stride_c = 0, stride_t = 0;
  DType dtype = DType::kFloat32;
  TileOrder order = TileOrder::kElements;

  __host__ __device__ int element_size() const { return dtype == DType::kFloat32 ? 4 : 2; }
};

// What a kernel is compiled for: one dtype and one order of all tensors, so that copies and
// conversions cost few instructions and registers; or (kAny) whatever each tensor has.
template <int kDType_, int kOrder_>
struct TileKind {
  static constexpr bool kAny = kDType_ < 0;
  static constexpr int kDType = kDType_, kOrder = kOrder_;
  __device__ static DType dtype(const TileSource& s) {
    return kAny ? s.dtype : static_cast<DType>(kDType_);
  }
  __device__ static TileOrder order(const TileSource& s) {
    return kAny ? s.order : static_cast<TileOrder>(kOrder_);
  }
  __device__ static int size(const TileSource& s) { return dtype(s) == DType::kFloat32 ? 4 : 2; }
  static bool fits(const TileSource& s) {
    return kAny || (static_cast<int>(s.dtype) == kDType_ && static_cast<int>(s.order) == kOrder_);
  }
};

// Bytes of a copy from or to rows of so many.
__host__ __device__ constexpr int copy_piece(int row) {
  return row % 16 == 0 ? 16 : row < 16 ? row : 8;
}

// `channels_at_once`: how many channels (or states) a tile holds; blocks start at its multiples
// within a group of `group_channels`.
inline TileSource tile_source(const void* data, DType dtype, int64_t stride_b, int64_t stride_c,
                              int64_t stride_t, int channels_at_once, bool channels_aligned) {
  TileSource s;
  s.data = static_cast<char*>(const_cast<void*>(data));
  s.dtype = dtype, s.stride_b = stride_b, s.stride_c = stride_c, s.stride_t = stride_t;
  const int64_t size = s.element_size();
  const int64_t piece = copy_piece(channels_at_once * static_cast<int>(size));
  const auto address = reinterpret_cast<uintptr_t>(data);
  const bool even = stride_b * size % 16 == 0;
  if (stride_t == 1 && address % 16 == 0 && even && stride_c * size % 16 == 0) {
    s.order = TileOrder::kTime;
  } else if (stride_c == 1 && channels_aligned && address % piece == 0 &&
             stride_b * size % piece == 0 && stride_t * size % piece == 0) {
    s.order = TileOrder::kChannel;
  }
  return s;
}

// Where the elements of a tile lie in shared memory, in bytes. Every L steps are followed by a pad,
// so that the lanes of a group read different banks.
template <int kChannels, int G, int L>
struct TileLayout {
  static constexpr int kSteps = G * L, kRow = kChannels;
  static constexpr int kStepPad = kChannels % 8 == 0 ? 8 : 4;  // elements, with channels innermost

  // Bytes after every L steps of a row; up to 32 bytes a lane, there is next to nothing to spread.
  __host__ __device__ static constexpr int time_pad(int size) { return L * size > 32 ? 16 : 0; }

  __device__ static int at(TileOrder order, int size, int c, int t) {
    if (order == TileOrder::kChannel) return ((t * kChannels + c) + t / L * kStepPad) * size;
    return (c * G + t / L) * (L * size + time_pad(size)) + t % L * size;
  }
  __host__ __device__ static constexpr int bytes(int size) {
    const int by_channel = (kSteps * kChannels + G * kStepPad) * size;
    const int by_time = kChannels * G * (L * size + time_pad(size));
    return by_channel > by_time ? by_channel : by_time;
  }
};

template <int kBytes>
__device__ __forceinline__ void copy_async(char* to, const char* from, int valid) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from),
                 "r"(valid));
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address), "l"(from),
                 "n"(kBytes), "r"(valid));
  }
}
__device__ __forceinline__ void copies_commit() { asm volatile("cp.async.commit_group;"); }
template <int kPending>
__device__ __forceinline__ void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending));
}

__device__ __forceinline__ int clamp_int(int64_t v, int low, int high) {
  return v < low ? low : v > high ? high : static_cast<int>(v);
}

// Pieces of `kPiece` bytes of `kRows` rows of `kInner` contiguous elements each, dealt out to the
// threads so that a thread keeps its place in the row and walks down the rows.
template <int kInner, int kRows, int kSize, int kPiece, int kThreads>
struct RowPieces {
  static constexpr int kPer = kPiece / kSize, kPieces = kInner / kPer;
  static_assert(kPieces <= kThreads && kThreads % kPieces == 0, "a pass covers whole rows");
  static constexpr int kStride = kThreads / kPieces;  // rows of a pass
  static constexpr int kPasses = (kRows + kStride - 1) / kStride;
  __device__ static int first() { return threadIdx.x % kPieces * kPer; }
  __device__ static int row() { return threadIdx.x / kPieces; }
};

// `inner` elements of each of `rows` rows exist; what lies past them in a row becomes 0, and rows
// that do not exist are left as they are.
template <class Layout, TileOrder kOrder, int kSize, int kThreads>
__device__ __forceinline__ void load_rows(char* tile, const char* from, int64_t row_bytes,
                                          int inner, int rows) {
  constexpr bool kByTime = kOrder == TileOrder::kTime;
  constexpr int kInner = kByTime ? Layout::kSteps : Layout::kRow;
  constexpr int kRows = kByTime ? Layout::kRow : Layout::kSteps;
  constexpr int kPiece = copy_piece(kInner * kSize);
  using Pieces = RowPieces<kInner, kRows, kSize, kPiece, kThreads>;
  const int first = Pieces::first();
  int row = Pieces::row();
  const int valid = clamp_int((inner - first) * kSize, 0, kPiece);
  from += row * row_bytes + (valid ? first * kSize : 0);
#pragma unroll
  for (int i = 0; i < Pieces::kPasses; ++i) {
    char* const to = tile + (kByTime ? Layout::at(kOrder, kSize, row, first)
                                     : Layout::at(kOrder, kSize, first, row));
    if (row < rows) copy_async<kPiece>(to, from, valid);
    from += Pieces::kStride * row_bytes, row += Pieces::kStride;
  }
}

template <class Layout, TileOrder kOrder, int kSize, int kThreads>
__device__ __forceinline__ void store_rows(const char* tile, char* to, int64_t row_bytes, int inner,
                                           int rows) {
  constexpr bool kByTime = kOrder == TileOrder::kTime;
  constexpr int kInner = kByTime ? Layout::kSteps : Layout::kRow;
  constexpr int kRows = kByTime ? Layout::kRow : Layout::kSteps;
  constexpr int kPiece = copy_piece(kInner * kSize);
  using Pieces = RowPieces<kInner, kRows, kSize, kPiece, kThreads>;
  const int first = Pieces::first();
  int row = Pieces::row();
  to += row * row_bytes + first * kSize;
  const int exist = inner - first;
#pragma unroll
  for (int i = 0; i < Pieces::kPasses; ++i) {
    const char* const from = tile + (kByTime ? Layout::at(kOrder, kSize, row, first)
                                             : Layout::at(kOrder, kSize, first, row));
    if (row < rows) {
      if (exist >= Pieces::kPer) {
        if constexpr (kPiece == 16) {
          *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
        } else {
          *reinterpret_cast<uint2*>(to) = *reinterpret_cast<const uint2*>(from);
        }
      } else {
        for (int byte = 0; byte < exist * kSize; byte += 2) {
          *reinterpret_cast<uint16_t*>(to + byte) = *reinterpret_cast<const uint16_t*>(from + byte);
        }
      }
    }
    to += Pieces::kStride * row_bytes, row += Pieces::kStride;
  }
}

template <int kSize>
struct Bits {
  using type = uint32_t;
};
template <>
struct Bits<2> {
  using type = uint16_t;
};

// Element by element; neighbouring threads take neighbouring elements in memory. A thread keeps its
// place among the inner ones and walks down the outer ones. Loads go out in batches, so that their
// latencies overlap.
template <class Layout, bool kTimeInner, int kSize, int kThreads, bool kLoad>
__device__ __forceinline__ void move_elements(char* tile, char* global, const TileSource& s,
                                              int steps, int channels) {
  using Word = typename Bits<kSize>::type;
  constexpr int kInner = kTimeInner ? Layout::kSteps : Layout::kRow;
  constexpr int kOuter = kTimeInner ? Layout::kRow : Layout::kSteps;
  constexpr int kWidth = kInner < kThreads ? kInner : kThreads, kRows = kThreads / kWidth;
  constexpr int kLeast = (kOuter + kRows - 1) / kRows, kBatch = kLeast < 8 ? kLeast : 8;
  const int first = threadIdx.x / kWidth;
  if (kThreads % kWidth && first >= kRows) return;
  const int64_t inner_bytes = (kTimeInner ? s.stride_t : s.stride_c) * kSize;
  const int64_t outer_bytes = (kTimeInner ? s.stride_c : s.stride_t) * kSize;
  const int inner_exist = kTimeInner ? steps : channels, exist = kTimeInner ? channels : steps;
  for (int inner = threadIdx.x % kWidth; inner < kInner; inner += kWidth) {
    const int rows = inner < inner_exist ? exist : 0;
    char* from = global + inner * inner_bytes + first * outer_bytes;
    const auto in_tile = [&](int outer) {
      return reinterpret_cast<Word*>(tile + Layout::at(TileOrder::kElements, kSize,
                                                       kTimeInner ? outer : inner,
                                                       kTimeInner ? inner : outer));
    };
    for (int i = first; i < kOuter; i += kBatch * kRows) {
      Word words[kBatch];
#pragma unroll
      for (int k = 0; k < kBatch; ++k, from += kRows * outer_bytes) {
        const int outer = i + k * kRows;
        if constexpr (kLoad) {
          words[k] = outer < rows ? *reinterpret_cast<const Word*>(from) : Word{0};
        } else if (outer < rows) {
          *reinterpret_cast<Word*>(from) = *in_tile(outer);
        }
      }
      if constexpr (kLoad) {
#pragma unroll
        for (int k = 0; k < kBatch; ++k) {
          const int outer = i + k * kRows;
          if (kOuter % (kRows * kBatch) == 0 || outer < kOuter) *in_tile(outer) = words[k];
        }
      }
    }
  }
}

template <class Layout, int kSize, int kThreads, bool kLoad>
__device__ __forceinline__ void move_tile(char* tile, char* global, const TileSource& s,
                                          TileOrder order, int steps, int channels) {
  if (order == TileOrder::kElements) {
    if (s.stride_t <= s.stride_c) {
      move_elements<Layout, true, kSize, kThreads, kLoad>(tile, global, s, steps, channels);
    } else {
      move_elements<Layout, false, kSize, kThreads, kLoad>(tile, global, s, steps, channels);
    }
  } else if (order == TileOrder::kTime) {
    if constexpr (kLoad) {
      load_rows<Layout, TileOrder::kTime, kSize, kThreads>(tile, global, s.stride_c * kSize, steps,
                                                           channels);
    } else {
      store_rows<Layout, TileOrder::kTime, kSize, kThreads>(tile, global, s.stride_c * kSize, steps,
                                                            channels);
    }
  } else {
    if constexpr (kLoad) {
      load_rows<Layout, TileOrder::kChannel, kSize, kThreads>(tile, global, s.stride_t * kSize,
                                                              channels, steps);
    } else {
      store_rows<Layout, TileOrder::kChannel, kSize, kThreads>(tile, global, s.stride_t * kSize,
                                                               channels, steps);
    }
  }
}

// Not inlined: all its variants in one place cost the callers neither registers nor code.
template <class Layout, int kThreads, bool kLoad>
__device__ __noinline__ void move_any_tile(char* tile, char* global, const TileSource& s, int steps,
                                           int channels) {
  if (s.element_size() == 4) {
    move_tile<Layout, 4, kThreads, kLoad>(tile, global, s, s.order, steps, channels);
  } else {
    move_tile<Layout, 2, kThreads, kLoad>(tile, global, s, s.order, steps, channels);
  }
}

template <class Kind, class Layout, int kThreads, bool kLoad>
__device__ __forceinline__ void move_steps(char* tile, const TileSource& s, char* global, int64_t t,
                                           int64_t steps, int channels) {
  const int exist = clamp_int(steps, 0, Layout::kSteps);
  global += t * s.stride_t * Kind::size(s);
  if constexpr (Kind::kAny) {
    move_any_tile<Layout, kThreads, kLoad>(tile, global, s, exist, channels);
  } else if (Kind::size(s) == 4) {
    move_tile<Layout, 4, kThreads, kLoad>(tile, global, s, Kind::order(s), exist, channels);
  } else {
    move_tile<Layout, 2, kThreads, kLoad>(tile, global, s, Kind::order(s), exist, channels);
  }
}

// Starts to bring steps [t, t + kSteps) of `channels` channels from `from` (the first channel at
// step 0) into the tile. `steps` of them exist; the rest of a copied row becomes 0, the rest of the
// tile is undefined.
template <class Kind, class Layout, int kThreads>
__device__ __forceinline__ void load_tile(char* tile, const TileSource& s, const char* from,
                                          int64_t t, int64_t steps, int channels) {
  move_steps<Kind, Layout, kThreads, true>(tile, s, const_cast<char*>(from), t, steps, channels);
}

// The reverse: writes a tile to global memory.
template <class Kind, class Layout, int kThreads>
__device__ __forceinline__ void store_tile(char* tile, const TileSource& s, char* to, int64_t t,
                                           int64_t steps, int channels) {
  move_steps<Kind, Layout, kThreads, false>(tile, s, to, t, steps, channels);
}

// Two 16-bit numbers of a word as floats.
__device__ __forceinline__ float2 unpack(uint32_t word, bool bf16) {
  if (bf16) return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
  return __half22float2(*reinterpret_cast<const __half2*>(&word));
}
__device__ __forceinline__ uint32_t pack(float low, float high, bool bf16) {
  if (bf16) {
    const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&v);
  }
  const __half2 v = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&v);
}

// A lane's L steps, from step t (a multiple of L), of C channels from channel c (a multiple of C).
template <class Layout, int C, int L>
__device__ __forceinline__ void read_steps(float (&v)[C][L], const char* tile, TileOrder order,
                                           DType dtype, int c, int t) {
  const bool bf16 = dtype == DType::kBFloat16;
  if (dtype == DType::kFloat32) {
    const char* from = tile + Layout::at(order, 4, c, t);
    if (order == TileOrder::kChannel) {
#pragma unroll
      for (int i = 0; i < L; ++i) {
        if constexpr (C == 2) {
          const float2 two = *reinterpret_cast<const float2*>(from + i * Layout::kRow * 4);
          v[0][i] = two.x, v[1][i] = two.y;
        } else {
          v[0][i] = *reinterpret_cast<const float*>(from + i * Layout::kRow * 4);
        }
      }
      return;
    }
#pragma unroll
    for (int k = 0; k < C; ++k) {
      const char* row = tile + Layout::at(order, 4, c + k, t);
#pragma unroll
      for (int i = 0; i < L; i += 4) {
        const float4 four = *reinterpret_cast<const float4*>(row + 4 * i);
        v[k][i] = four.x, v[k][i + 1] = four.y, v[k][i + 2] = four.z, v[k][i + 3] = four.w;
      }
    }
    return;
  }
  if (order == TileOrder::kChannel) {
    const char* from = tile + Layout::at(order, 2, c, t);
#pragma unroll
    for (int i = 0; i < L; ++i) {
      if constexpr (C == 2) {
        const float2 two =
            unpack(*reinterpret_cast<const uint32_t*>(from + i * Layout::kRow * 2), bf16);
        v[0][i] = two.x, v[1][i] = two.y;
      } else {
        v[0][i] = unpack(*reinterpret_cast<const uint16_t*>(from + i * Layout::kRow * 2), bf16).x;
      }
    }
    return;
  }
#pragma unroll
  for (int k = 0; k < C; ++k) {
    const char* row = tile + Layout::at(order, 2, c + k, t);
#pragma unroll
    for (int i = 0; i < L; i += 8) {
      const uint4 eight = *reinterpret_cast<const uint4*>(row + 2 * i);
      const uint32_t words[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const float2 two = unpack(words[w], bf16);
        v[k][i + 2 * w] = two.x, v[k][i + 2 * w + 1] = two.y;
      }
    }
  }
}

template <class Layout, int C, int L>
__device__ __forceinline__ void write_steps(const float (&v)[C][L], char* tile, TileOrder order,
                                            DType dtype, int c, int t) {
  const bool bf16 = dtype == DType::kBFloat16;
  const int size = dtype == DType::kFloat32 ? 4 : 2;
  if (order == TileOrder::kChannel) {
    char* to = tile + Layout::at(order, size, c, t);
    const int step = Layout::kRow * size;
#pragma unroll
    for (int i = 0; i < L; ++i) {
      if (size == 4) {
        if constexpr (C == 2) {
          *reinterpret_cast<float2*>(to + i * step) = make_float2(v[0][i], v[1][i]);
        } else {
          *reinterpret_cast<float*>(to + i * step) = v[0][i];
        }
      } else if constexpr (C == 2) {
        *reinterpret_cast<uint32_t*>(to + i * step) = pack(v[0][i], v[1][i], bf16);
      } else {
        *reinterpret_cast<uint16_t*>(to + i * step) =
            static_cast<uint16_t>(pack(v[0][i], 0.0f, bf16));
      }
    }
    return;
  }
#pragma unroll
  for (int k = 0; k < C; ++k) {
    char* row = tile + Layout::at(order, size, c + k, t);
    if (size == 4) {
#pragma unroll
      for (int i = 0; i < L; i += 4) {
        *reinterpret_cast<float4*>(row + 4 * i) =
            make_float4(v[k][i], v[k][i + 1], v[k][i + 2], v[k][i + 3]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < L; i += 8) {
        *reinterpret_cast<uint4*>(row + 2 * i) =
            make_uint4(pack(v[k][i], v[k][i + 1], bf16), pack(v[k][i + 2], v[k][i + 3], bf16),
                       pack(v[k][i + 4], v[k][i + 5], bf16), pack(v[k][i + 6], v[k][i + 7], bf16));
      }
    }
  }
}

}  // namespace mamba
