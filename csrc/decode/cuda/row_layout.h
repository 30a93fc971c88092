// The step of a single row: what each block owns and what its shared memory holds. Filled in on the
// host and passed to the kernel.
#pragma once

#include "params.h"

namespace mamba {
namespace decode {

// Channels go to blocks in fours: 8 bytes of a row of x_proj in halves.
constexpr int kChannelGroup = 4;

constexpr int kRowWarps = 16, kRowThreads = 32 * kRowWarps;
constexpr int kHeld = 2;      // units of weights in a warp's registers
constexpr int kReplicas = 8;  // of every word that all blocks read
constexpr int kUnitTableBytes = 4 * kRowWarps * 40;

struct Range {
  int first, count;
};

// Block `block`'s share of `total` things that go to blocks in groups.
__host__ __device__ inline Range share_of(int total, int group, int block, int blocks) {
  const int groups = total / group, each = groups / blocks, more = groups % blocks;
  const int first = each * block + (block < more ? block : more);
  return {first * group, (each + (block < more ? 1 : 0)) * group};
}

__host__ __device__ inline int largest_share(int total, int group, int blocks) {
  return (total / group + blocks - 1) / blocks * group;
}

// A layer's small arrays: a block copies what it needs of each while the layer before is computed.
enum Small : int {
  kNormWeight,
  kNormBias,
  kInBias,
  kGateBias,
  kConvWeight,
  kConvBias,
  kDtProj,
  kDtBias,
  kALog,
  kSkip,
  kOutBias,
  kConvState,
  kSsmState,
  kSmalls
};

struct SmallLayout {
  enum Scope : int { kAll, kChannels, kRows };
  int field;  // the place of the pointer in DecodeLayerArgs
  int scope;  // a block takes all, its channels or its rows of out_proj
  int unit;   // bytes: of all, of a channel, of a row
  int place;  // in the buffer, in bytes
  int64_t base;
};

struct RowLayout {
  SmallLayout small[kSmalls];
  int columns;       // x_proj's columns of this block's channels, in the buffer
  int column_lanes;  // that share an output of x_proj
  int buffer_bytes;  // there are two buffers: of this layer and of the next one
  // Offsets in shared memory.
  int buffers, places, units, copies, column_copies, x, y, sums, u, gate, projected, residual, norm;
  int bytes;
};

}  // namespace decode
}  // namespace mamba
