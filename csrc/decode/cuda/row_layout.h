// The step of a single row: what each block owns and what its shared memory holds. Filled in on the
// host and passed to the kernel.
#pragma once

#include "params.h"

namespace mamba {
namespace decode {

// Channels go to blocks in fours: 8 bytes of a row of x_proj in halves.
constexpr int kChannelGroup = 4;

// The warps that compute, and after them one that fetches weights and one that fetches the layers'
// small arrays.
constexpr int kRowWarps = 16, kRowThreads = 32 * kRowWarps;
constexpr int kRowBlock = kRowThreads + 64;
constexpr int kMaxVectors = 4, kMaxSlots = 16;
constexpr int kMaxVectorsInt8 = 5, kLanesInt8Log2 = 3;
constexpr int kReplicas = 8;  // of every word that all blocks read

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

// How warps share the rows of a weight. A row is cut into pieces for as many warps, a team; of a
// piece, some lanes take `vectors` times 16 bytes each, so that a warp has several rows at once.
struct Product {
  int row_vectors;  // 16 bytes each
  int lanes_log2;   // of a row
  int vectors, pieces, teams;
  int slot_rows;           // a whole number of what a warp has at once
  uint64_t team_of_warps;  // four bits each; divisions take time
};

enum ProductKind : int { kOfModel, kOfInner, kProducts };  // in_proj and lm_head; out_proj

// A layer's small arrays: a block fetches what it needs of each while the layer before is computed,
// in three stages, for as soon as the memory of each is free.
enum Small : int {
  kNormWeight,
  kNormBias,
  kInBias,
  kGateBias,
  kConvWeight,
  kConvBias,
  kConvState,
  kInScales,
  kGateScales,
  kXScales,
  kDtProj,
  kDtBias,
  kALog,
  kSkip,
  kSsmState,
  kOutScales,
  kSmalls
};
enum Stage : int { kForNorm, kForConvolution, kForStates, kStages };  // x_proj is in the second

// Two for each slot and each stage.
constexpr int kBarriers = 2 * (kMaxSlots + kStages), kBarrierBytes = 8 * kBarriers;

struct SmallLayout {
  enum Scope : int { kAll, kChannels, kRows };
  int field;  // the place of the pointer in DecodeLayerArgs
  int scope;  // a block takes all, or its channels, or its rows of out_proj
  int unit;   // bytes: of all, of a channel, of a row
  int place;  // in shared memory
  int64_t base;
};

// Where the exchanged arrays are, in words. Of what every block reads there are replicas, so that
// not all poll the same places: a block reads its own replica. The residual stream comes first in
// one.
struct RowWords {
  unsigned inner, projected;         // in a replica
  unsigned replica;                  // words of one
  unsigned partial, partial_stride;  // of an output of x_proj, a word for each block
};

struct RowLayout {
  SmallLayout small[kSmalls];
  Product product[kProducts];
  RowWords words;
  float one_of_model;     // 1 / d_model
  int column_lanes_log2;  // that share an output of x_proj
  int column_element;     // bytes of a weight of x_proj
  int slots, slot_bytes;
  int in_flight;  // slots on their way at a time
  // Offsets in shared memory.
  int columns, barriers, inputs, sums, head_sums, u, gate, projected, residual, out_scales, norm,
      ring;
  int bytes;
};

}  // namespace decode
}  // namespace mamba
