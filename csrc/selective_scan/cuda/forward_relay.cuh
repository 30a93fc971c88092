// The tiles of the forward scan in which warps hand states on: what a warp keeps in shared memory
// and how it gets there. A warp owns kSteps consecutive steps of kChannels channels, and it alone
// touches their tile: no other waits for what it stages.
#pragma once

#include "barrier.cuh"
#include "forward_tile.cuh"

namespace mamba {
namespace relay {

constexpr int kWarps = 4, kThreads = 32 * kWarps, kChannels = 32;
constexpr int kSteps = 16, kTile = kWarps * kSteps;    // of a warp, of a block
constexpr int kItem = 4;                               // states that are handed on at once
constexpr int kStaged = 16, kItems = kStaged / kItem;  // states whose B and C are staged at once
// For the place of a block and its constants.
using Shape = ScanShape<8, 2, 8, kStaged, 1, 3>;
static_assert(Shape::kChannels == kChannels && Shape::kThreads == kThreads, "one block");

// 16 bytes, and the rest of their 128 into the L2 cache, where another warp is about to ask for it.
template <bool kAhead>
__device__ __forceinline__ void copy_piece_async(char* to, const char* from, int valid) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  if constexpr (kAhead) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(address), "l"(from),
                 "r"(valid));
  } else {
    copy_async<16>(to, from, valid);
  }
}

__device__ __forceinline__ int lane_id() { return threadIdx.x % 32; }

// What a kernel of one dtype and order stages.
template <class K>
struct Plan {
  static constexpr int kSize = K::kDType == static_cast<int>(DType::kFloat32) ? 4 : 2;
  static constexpr bool kBFloat16 = K::kDType == static_cast<int>(DType::kBFloat16);
  // kElements stands for rows of steps at any address: they are copied as the aligned 16 bytes that
  // hold them.
  static constexpr bool kShifted = K::kOrder == static_cast<int>(TileOrder::kElements);
  static constexpr bool kByTime = kShifted || K::kOrder == static_cast<int>(TileOrder::kTime);
  // Bytes from row to row of a tile. Rows of channels are padded so that eight lanes read 16 bytes
  // each from different banks.
  static constexpr int kInputPitch = kByTime ? kSteps * kSize + 16 : kChannels * kSize;
  static constexpr int kRawPitch = (kByTime ? kSteps : kStaged) * kSize + (kShifted ? 16 : 0);
  static constexpr int kInputBytes = (kByTime ? kChannels : kSteps) * kInputPitch;
  static constexpr int kRawBytes = kSteps * kRawPitch;
  static_assert(kStaged == kSteps, "B and C take as many rows either way");
  static constexpr int kPitch = 2 * kStaged + 4;  // floats of a step's B and C
  // Of a warp; the output takes the place of z.
  static constexpr int kU = 0, kDelta = kU + kInputBytes, kZ = kDelta + kInputBytes;
  static constexpr int kB = kZ + kInputBytes, kC = kB + kRawBytes, kRows = kC + kRawBytes;
  static constexpr int kWarpBytes = (kRows + kSteps * kPitch * 4 + 15) / 16 * 16;
  // Of the block: the states on their way and A, [item][channel][kItem], and a barrier for
  // every warp and item.
  __host__ __device__ static int total(int items) {
    return kWarps * kWarpBytes + 2 * items * kItem * kChannels * 4 + kWarps * items * 8;
  }

  static constexpr int kVector = 16 / kSize;
  // 16 bytes of a staged row as floats.
  __device__ static void read(float* v, const char* from) {
    if constexpr (kSize == 4) {
      const float4 four = *reinterpret_cast<const float4*>(from);
      v[0] = four.x, v[1] = four.y, v[2] = four.z, v[3] = four.w;
    } else {
      const uint4 words = *reinterpret_cast<const uint4*>(from);
      const uint32_t w[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 two = unpack(w[i], kBFloat16);
        v[2 * i] = two.x, v[2 * i + 1] = two.y;
      }
    }
  }
  __device__ static float read_one(const char* from) {
    if constexpr (kSize == 4) {
      return *reinterpret_cast<const float*>(from);
    } else {
      return unpack(*reinterpret_cast<const uint16_t*>(from), kBFloat16).x;
    }
  }
  __device__ static void write(char* to, const float* v) {
    if constexpr (kSize == 4) {
      *reinterpret_cast<float4*>(to) = make_float4(v[0], v[1], v[2], v[3]);
    } else {
      *reinterpret_cast<uint4*>(to) =
          make_uint4(pack(v[0], v[1], kBFloat16), pack(v[2], v[3], kBFloat16),
                     pack(v[4], v[5], kBFloat16), pack(v[6], v[7], kBFloat16));
    }
  }
  __device__ static void write_one(char* to, float v) {
    if constexpr (kSize == 4) {
      *reinterpret_cast<float*>(to) = v;
    } else {
      *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(pack(v, 0.0f, kBFloat16));
    }
  }
  // The steps of the lane's channel; `shift`: where its row begins.
  __device__ static void read_steps(float (&v)[kSteps], const char* tile, int shift) {
    if constexpr (kByTime && !kShifted) {
#pragma unroll
      for (int t = 0; t < kSteps; t += kVector) {
        read(v + t, tile + lane_id() * kInputPitch + t * kSize);
      }
    } else {
      const char* const at = tile + lane_id() * (kShifted ? kInputPitch : kSize) + shift;
#pragma unroll
      for (int t = 0; t < kSteps; ++t) v[t] = read_one(at + t * (kShifted ? kSize : kInputPitch));
    }
  }
  __device__ static void write_steps(char* tile, const float (&v)[kSteps]) {
    if constexpr (kByTime) {
#pragma unroll
      for (int t = 0; t < kSteps; t += kVector) {
        write(tile + lane_id() * kInputPitch + t * kSize, v + t);
      }
    } else {
#pragma unroll
      for (int t = 0; t < kSteps; ++t) {
        write_one(tile + t * kInputPitch + lane_id() * kSize, v[t]);
      }
    }
  }
};

// How far a row begins after a multiple of 16 bytes.
template <class P>
__device__ __forceinline__ int row_shift(const char* from, int row_bytes, int row) {
  if (!P::kShifted) return 0;
  return (static_cast<int>(reinterpret_cast<uintptr_t>(from)) + row * row_bytes) & 15;
}

// A warp's copies of kRows rows of kInner contiguous elements, 16 bytes at a time. `row_bytes`:
// from row to row in global memory; `rows` rows and `inner` elements of each exist.
template <class P, int kRows, int kInner, int kPitch>
struct Copies {
  static constexpr int kPieces = kInner / P::kVector + (P::kShifted ? 1 : 0);
  static constexpr int kAll = kRows * kPieces, kPasses = (kAll + 31) / 32;
  static_assert(kInner % P::kVector == 0, "whole pieces");

  template <class F>
  __device__ __forceinline__ static void each(F&& f) {
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const int piece = lane_id() + 32 * i;
      if (kAll % 32 == 0 || piece < kAll) f(piece / kPieces, piece % kPieces * 16);
    }
  }
  // What does not exist becomes 0.
  __device__ __forceinline__ static void load(char* tile, const char* from, int row_bytes, int rows,
                                              int inner) {
    if (!P::kShifted && rows == kRows && inner == kInner) {
      each([&](int row, int byte) {
        copy_piece_async<P::kByTime>(tile + row * kPitch + byte, from + (row * row_bytes + byte),
                                     16);
      });
    } else {
      load_part(tile, from, row_bytes, rows, inner);
    }
  }
  __device__ __forceinline__ static void load_part(char* tile, const char* from, int row_bytes,
                                                   int rows, int inner) {
    each([&](int row, int byte) {
      const int shift = row_shift<P>(from, row_bytes, row), end = inner * P::kSize + shift;
      const int valid = row < rows ? min(max(end - byte, 0), 16) : 0;
      // An address that nothing is read from has to be a valid one all the same.
      const int at = valid ? row * row_bytes + byte - shift : -row_shift<P>(from, 0, 0);
      copy_piece_async<P::kByTime>(tile + row * kPitch + byte, from + at, valid);
    });
  }
  // From rows that begin at multiples of 16 bytes.
  __device__ __forceinline__ static void store(const char* tile, char* to, int row_bytes, int rows,
                                               int inner) {
    if (!P::kShifted && rows == kRows && inner == kInner) {
      each([&](int row, int byte) {
        *reinterpret_cast<uint4*>(to + (row * row_bytes + byte)) =
            *reinterpret_cast<const uint4*>(tile + row * kPitch + byte);
      });
    } else {
      using Word = typename Bits<P::kSize>::type;
#pragma unroll 4
      for (int i = lane_id(); i < kRows * kInner; i += 32) {
        const int row = i / kInner, byte = i % kInner * P::kSize;
        if (row >= rows || i % kInner >= inner) continue;
        *reinterpret_cast<Word*>(to + (row * row_bytes + byte)) =
            *reinterpret_cast<const Word*>(tile + row * kPitch + byte);
      }
    }
  }
};

template <class P>
using InputCopies =
    Copies<P, P::kByTime ? kChannels : kSteps, P::kByTime ? kSteps : kChannels, P::kInputPitch>;
template <class P>
using StateCopies = Copies<P, kSteps, kStaged, P::kRawPitch>;

// B or C of a warp's steps as fp32 into every row of `to`. `from` and `row_bytes` are those of the
// copy.
template <class P>
__device__ __forceinline__ void convert(float* to, const char* raw, const char* from,
                                        int row_bytes) {
  if constexpr (P::kShifted) {
#pragma unroll
    for (int i = lane_id(); i < kStaged * kSteps; i += 32) {
      const int state = i / kSteps, t = i % kSteps, shift = row_shift<P>(from, row_bytes, state);
      to[t * P::kPitch + state] = P::read_one(raw + state * P::kRawPitch + shift + t * P::kSize);
    }
    return;
  }
  StateCopies<P>::each([&](int row, int byte) {
    float v[P::kVector];
    P::read(v, raw + row * P::kRawPitch + byte);
    const int first = byte / P::kSize;
    if constexpr (P::kByTime) {
#pragma unroll
      for (int i = 0; i < P::kVector; ++i) to[(first + i) * P::kPitch + row] = v[i];
    } else {
#pragma unroll
      for (int i = 0; i < P::kVector; i += 4) {
        *reinterpret_cast<float4*>(to + row * P::kPitch + first + i) =
            make_float4(v[i], v[i + 1], v[i + 2], v[i + 3]);
      }
    }
  });
}

// Whether offsets inside a tile fit 32 bits.
inline bool strides_fit(const TileSource& s) {
  constexpr int64_t kMost = (int64_t{1} << 31) / (4 * 64);
  return s.stride_c < kMost && s.stride_t < kMost;
}

}  // namespace relay
}  // namespace mamba
