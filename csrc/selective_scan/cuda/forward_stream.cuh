// The tiles of the streaming forward scan: where they lie in shared memory and how they get there.
#pragma once

#include "barrier.cuh"
#include "forward_walk.cuh"

namespace mamba {
namespace stream {

using sequential::kLanes;
using sequential::States;
constexpr int kThreads = 128, kChannels = 32, kWarps = kThreads / 32;

// The rows are padded so that the lanes of a warp, 8 channels by 4 steps, read different banks.
template <int kSteps_>
struct Tile {
  static constexpr int kSteps = kSteps_, kRow = kChannels;
  __host__ __device__ static constexpr int at(TileOrder order, int size, int c, int t) {
    if (order == TileOrder::kChannel) return t * (kChannels * size + size * 8) + c * size;
    return c * (kSteps * size + 16) + t * size;
  }
};

// What a kernel of one dtype, order and number of states a lane stages. Tiles take 128 bytes of
// each channel.
template <class K, int kPer>
struct Plan {
  static constexpr int kSize = K::kDType == static_cast<int>(DType::kFloat32) ? 4 : 2;
  static constexpr bool kBFloat16 = K::kDType == static_cast<int>(DType::kBFloat16);
  static constexpr auto kOrder = static_cast<TileOrder>(K::kOrder);
  static constexpr bool kByTime = kOrder == TileOrder::kTime;
  static constexpr int kStates = kLanes * kPer;
  using Shape = ScanShape<8, 2, kSize == 4 ? 4 : 8, kStates, 1, 3>;
  static constexpr int kSteps = Shape::kSteps;
  using Inputs = Tile<kSteps>;
  using Projections = TileLayout<kStates, 1, kSteps>;
  static constexpr int kPitch = 2 * kStates + 4;  // floats of a step's B and C

  static constexpr int kTileBytes =
      kByTime ? Inputs::at(kOrder, kSize, kChannels, 0) : Inputs::at(kOrder, kSize, 0, kSteps);
  static constexpr int kRawBytes = (Projections::bytes(kSize) + 15) / 16 * 16;
  static constexpr int kRowsBytes = kSteps * kPitch * 4;
  static constexpr int kPairFloats = 64;  // (delta, delta u) of a warp's channels over four steps
  // Everything but the pairs has two places: one is used while the other is filled.
  static constexpr int kU = 0, kDelta = kU + kTileBytes, kZ = kDelta + kTileBytes;
  static constexpr int kOut = kZ + kTileBytes, kB = kOut + kTileBytes, kC = kB + kRawBytes;
  static constexpr int kRows = kC + kRawBytes, kPlace = kRows + kRowsBytes;
  static constexpr int kPairs = 2 * kPlace, kTotal = kPairs + kWarps * 4 * kPairFloats * 4;

  __device__ static float load(const char* from) {
    if constexpr (kSize == 4) {
      return *reinterpret_cast<const float*>(from);
    } else {
      return unpack(*reinterpret_cast<const uint16_t*>(from), kBFloat16).x;
    }
  }
  __device__ static void store(char* to, float v) {
    if constexpr (kSize == 4) {
      *reinterpret_cast<float*>(to) = v;
    } else {
      *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(pack(v, 0.0f, kBFloat16));
    }
  }
};

// A thread's share of whole tiles of kRows rows of kInner contiguous elements: 16 bytes of every
// kStride-th row.
template <class P, class Layout, int kSteps, int kOther>
struct Share {
  static constexpr int kInner = P::kByTime ? kSteps : kOther, kRows = P::kByTime ? kOther : kSteps;
  static constexpr int kPer = 16 / P::kSize, kPieces = kInner / kPer;
  static constexpr int kStride = kThreads / kPieces, kPasses = (kRows + kStride - 1) / kStride;
  static_assert(kPieces * kPer == kInner && kStride * kPieces == kThreads, "whole pieces");

  __device__ static int row() { return threadIdx.x / kPieces; }
  __device__ static int first() { return threadIdx.x % kPieces * kPer; }
  __device__ static int in_tile(int pass) {
    const int r = row() + pass * kStride;
    return P::kByTime ? Layout::at(P::kOrder, P::kSize, r, first())
                      : Layout::at(P::kOrder, P::kSize, first(), r);
  }
  // In 32 bits: strides_fit has seen to it.
  __device__ static int row_bytes(const TileSource& s) {
    return static_cast<int>(P::kByTime ? s.stride_c : s.stride_t) * P::kSize;
  }
  // From the tensor's first channel and step to the thread's part of a tile.
  __device__ static int64_t start(const TileSource& s, int tile) {
    const int of_tile = kSteps * (P::kByTime ? P::kSize : row_bytes(s));
    return int64_t{tile} * of_tile + (row() * row_bytes(s) + first() * P::kSize);
  }
  __device__ static bool has(int pass) {
    return kRows % kStride == 0 || row() + pass * kStride < kRows;
  }
  __device__ __forceinline__ static void load(char* to, const TileSource& s, const char* data,
                                              int tile) {
    const char* const from = data + start(s, tile);
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      if (has(i)) copy_async<16>(to + in_tile(i), from + i * kStride * row_bytes(s), 16);
    }
  }
  __device__ __forceinline__ static void store(const char* from, const TileSource& s, char* data,
                                               int tile) {
    char* const to = data + start(s, tile);
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      if (!has(i)) continue;
      const uint4 v = *reinterpret_cast<const uint4*>(from + in_tile(i));
      *reinterpret_cast<uint4*>(to + i * kStride * row_bytes(s)) = v;
    }
  }
};

// Whether the bytes of a tile's rows and of a step's or channel's part of it fit 32 bits.
inline bool strides_fit(const TileSource& s) {
  constexpr int64_t kMost = (int64_t{1} << 31) / (4 * 64);
  return (s.order == TileOrder::kTime ? s.stride_c : s.stride_t) < kMost;
}

// Part of a tile, or one that is not aligned. Not inlined, as it is rare and would cost registers.
template <class P, class Layout, bool kLoad>
__device__ __noinline__ void move_part(char* tile, char* global, const TileSource& s, int steps,
                                       int rows) {
  const TileOrder order =
      P::kByTime && s.order == TileOrder::kElements ? TileOrder::kElements : P::kOrder;
  move_tile<Layout, P::kSize, kThreads, kLoad>(tile, global, s, order, steps, rows);
}

// B or C of a tile as fp32 into every row of `to`; with kMask, what does not exist becomes 0.
// Everything is read before anything is written.
template <class P, bool kMask>
__device__ __forceinline__ void convert_rows(float* to, const char* raw, int steps, int states) {
  constexpr bool kByState = !P::kByTime;
  constexpr int kAll = P::kStates * P::kSteps / 4, kCount = (kAll + kThreads - 1) / kThreads;
  float v[kCount][4];
  const auto each = [&](auto&& f) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const int i = threadIdx.x + k * kThreads;
      if (kAll % kThreads && i >= kAll) break;
      f(v[k], kByState ? i % (P::kStates / 4) * 4 : i % P::kStates,
        kByState ? i / (P::kStates / 4) : i / P::kStates * 4);
    }
  };
  each([&](float (&q)[4], int n, int t) {
    const char* const from = raw + P::Projections::at(P::kOrder, P::kSize, n, t);
    if constexpr (P::kSize == 4) {
      const float4 four = *reinterpret_cast<const float4*>(from);
      q[0] = four.x, q[1] = four.y, q[2] = four.z, q[3] = four.w;
    } else {
      const uint2 words = *reinterpret_cast<const uint2*>(from);
      const float2 low = unpack(words.x, P::kBFloat16), high = unpack(words.y, P::kBFloat16);
      q[0] = low.x, q[1] = low.y, q[2] = high.x, q[3] = high.y;
    }
  });
  if constexpr (kMask) {
    each([&](float (&q)[4], int n, int t) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const bool exists = kByState ? t < steps && n + k < states : t + k < steps && n < states;
        q[k] = exists ? q[k] : 0.0f;
      }
    });
  }
  each([&](float (&q)[4], int n, int t) {
    float* const at = to + t * P::kPitch + n;
    if constexpr (kByState) {
      *reinterpret_cast<float4*>(at) = make_float4(q[0], q[1], q[2], q[3]);
    } else {
#pragma unroll
      for (int k = 0; k < 4; ++k) at[k * P::kPitch] = q[k];
    }
  });
}

}  // namespace stream
}  // namespace mamba
