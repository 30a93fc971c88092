// The order in which a block reads weights, and the ring through which each of its warps reads
// them. Weights do not depend on activations, so the ring runs ahead of the computation, across the
// barriers between phases and layers: memory stays busy while the step's chain of small results
// passes through the grid.
//
// The whole step is one kernel that every warp runs through once a layer. Its code has to stay
// small: a first version with a copy of this loop in every phase took 216 kB and spent most of its
// time waiting for instructions.
#pragma once

#include <cuda_runtime.h>

#include "params.h"

namespace mamba {
namespace decode {

// A job is cut along its inputs for the warps of a team; the teams take turns at jobs.
constexpr int kTeams = 2, kTeamWarps = 8, kWarps = kTeams * kTeamWarps;
constexpr int kThreads = 32 * kWarps;
constexpr int kTileRows = 8;    // outputs that a warp computes at once
constexpr int kUnitBytes = 64;  // of each of the eight rows; a lane reads 16 bytes of it
constexpr int kSlotBytes = kTileRows * kUnitBytes;
constexpr int kGroup = 4;     // units that are waited for together
constexpr int kMaxParts = 4;  // of out_proj's inputs

// The linear weights of a step, in the order of their use: the parts of out_proj come last in a
// layer, lm_head after the layers.
enum Phase : int { kInProj = 0, kXProj = 1, kOutProj = 2, kHead = kOutProj + kMaxParts, kPhases };

// A weight as this block sees it. Its jobs are tiles of eight outputs; they go round the blocks.
struct Work {
  int rows, row_bytes;
  int unit_begin, units;  // of every row, for this block
  int jobs, jobs_modulo;  // of all blocks; their remainder by the number of blocks
  int only_tile;          // x_proj cut into slices: a block has one job, on this tile; else -1
};

__host__ __device__ inline int units_of(int bytes) { return (bytes + kUnitBytes - 1) / kUnitBytes; }

// Fills in the weights of a step; threads 0 to kPhases - 1 take one each.
template <int kElement>
__device__ void describe_work(const DecodeCudaParams& p, Work* work) {
  const int phase = static_cast<int>(threadIdx.x);
  if (phase >= kPhases) return;
  const DecodeCudaSizes& s = p.size;
  const int block = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x);
  const bool reads_model = phase == kInProj || phase == kHead;
  Work w;
  w.rows = phase == kInProj  ? 2 * s.d_inner
           : phase == kXProj ? s.projected
           : phase == kHead  ? s.vocab
                             : s.d_model;
  w.row_bytes = kElement * (reads_model ? s.d_model : s.d_inner);
  const int units = units_of(w.row_bytes);
  const int pieces = phase == kXProj ? p.plan.x_slices : reads_model ? 1 : p.plan.out_parts;
  const int piece = phase == kXProj ? block % pieces : reads_model ? 0 : phase - kOutProj;
  w.unit_begin = units * piece / pieces;
  w.units = units * (piece + 1) / pieces - w.unit_begin;
  w.jobs = (w.rows + kTileRows - 1) / kTileRows;
  w.only_tile = phase == kXProj && pieces > 1 ? block / pieces : -1;
  w.jobs_modulo = w.jobs % blocks;
  work[phase] = w;
}

struct Span {
  int begin, end;
};

// The units of a row that this warp multiplies, counted from the block's first.
__device__ __forceinline__ Span team_span(const Work& w) {
  const int part = static_cast<int>(threadIdx.x) / 32 % kTeamWarps;
  return {w.units * part / kTeamWarps, w.units * (part + 1) / kTeamWarps};
}

// Which jobs of a weight belong to this block. The first falls to the block after the one with the
// last job of the weight before, so that no block gets the larger share every time.
struct Turn {
  int first_block = 0;

  // The number of this block's jobs; `tile` becomes the first one's.
  __device__ int jobs(const Work& w, int phase, int& tile) const {
    const int block = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x);
    if (w.only_tile >= 0) {
      tile = w.only_tile;
      return tile < w.jobs ? 1 : 0;
    }
    tile = phase == kXProj ? block : block - first_block;
    if (tile < 0) tile += blocks;
    return tile < w.jobs ? (w.jobs - 1 - tile) / blocks + 1 : 0;
  }

  // After a weight, or the last part of one.
  __device__ void pass(const Work& w, int phase) {
    if (phase == kXProj) return;
    first_block += w.jobs_modulo;
    if (first_block >= static_cast<int>(gridDim.x)) first_block -= static_cast<int>(gridDim.x);
  }
};

__device__ __forceinline__ int next_phase(const DecodeCudaParams& p, int& layer, int phase) {
  if (phase == kHead) return kPhases;
  if (phase - kOutProj + 1 < p.plan.out_parts) return phase + 1;
  return ++layer == p.size.layers ? kHead : kInProj;
}

__device__ __forceinline__ bool last_part(const DecodeCudaParams& p, int phase) {
  return phase < kOutProj || phase == kHead || phase - kOutProj + 1 == p.plan.out_parts;
}

// `bytes` is 16, or 0 for zeros without an access.
__device__ __forceinline__ void copy_async(unsigned shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared), "l"(global),
               "r"(bytes)
               : "memory");
}

// A warp's share of all weights, unit after unit. Every lane reads exactly the bytes that it copied
// itself: lane (g, t) has 16 bytes, piece t, of the unit of row g.
template <int kStages>
class WeightStream {
 public:
  static constexpr int kGroupBytes = kGroup * kSlotBytes;
  static constexpr int kBytes = kStages * kGroupBytes;  // of shared memory, for each warp

  __device__ WeightStream(const DecodeCudaParams& p, const Work* work, char* shared)
      : p_(p), work_(work), ring_(shared + threadIdx.x / 32 * kBytes + threadIdx.x % 32 * 16) {}

  __device__ void start() {
    enter_phase();
#pragma unroll 1
    for (unsigned i = 0; i < kStages; ++i) copy_group(i);
  }

  // Where this lane's pieces of the next group are: of up to kGroup units of one job, kSlotBytes
  // apart.
  __device__ __forceinline__ const char* next() {
    // The group before is used up: its place takes the group that comes kStages later.
    if (groups_ > 0) copy_group((groups_ - 1) % kStages);
    asm volatile("cp.async.wait_group %0;" ::"n"(kStages - 1) : "memory");
    return ring_ + groups_++ % kStages * kGroupBytes;
  }

 private:
  __device__ __forceinline__ void copy_group(unsigned place) {
    while (left_ == 0 && phase_ != kPhases) next_job();
    const unsigned to =
        static_cast<unsigned>(__cvta_generic_to_shared(ring_)) + place * kGroupBytes;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      if (i < left_) {
        copy_async(to + i * kSlotBytes, from_ + i * kUnitBytes,
                   row_left_ > i * kUnitBytes ? 16 : 0);
      }
    }
    left_ = left_ > kGroup ? left_ - kGroup : 0;
    from_ += kGroup * kUnitBytes;
    row_left_ -= kGroup * kUnitBytes;
    asm volatile("cp.async.commit_group;" ::: "memory");
  }

  __device__ __forceinline__ void next_job() {
    if (--jobs_ > 0) {
      start_ += job_step_;
      row_ += kTeams * kTileRows * static_cast<int>(gridDim.x);
      enter_job();
      return;
    }
    if (last_part(p_, phase_)) turn_.pass(work_[phase_], phase_);
    phase_ = next_phase(p_, layer_, phase_);
    if (phase_ != kPhases) enter_phase();
  }

  __device__ __forceinline__ void enter_job() {
    left_ = units_;
    from_ = start_;
    row_left_ = row_ < rows_ ? row_bytes_ : 0;
  }

  __device__ __forceinline__ void enter_phase() {
    const Work w = work_[phase_];
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const int team = warp / kTeamWarps, blocks = static_cast<int>(gridDim.x);
    int tile;
    jobs_ = (turn_.jobs(w, phase_, tile) - team + kTeams - 1) / kTeams;
    const Span span = team_span(w);
    units_ = span.end - span.begin;
    rows_ = w.rows;
    row_ = (tile + team * blocks) * kTileRows + lane / 4;
    job_step_ = static_cast<int64_t>(w.row_bytes) * (kTeams * kTileRows * blocks);
    const DecodeLayerArgs& a = p_.layer[phase_ == kHead ? 0 : layer_];
    const void* weight = phase_ == kInProj  ? a.in_proj
                         : phase_ == kXProj ? a.x_proj
                         : phase_ == kHead  ? p_.lm_head
                                            : a.out_proj;
    const int offset = (w.unit_begin + span.begin) * kUnitBytes + lane % 4 * 16;
    start_ = static_cast<const char*>(weight) + static_cast<int64_t>(row_) * w.row_bytes + offset;
    row_bytes_ = w.row_bytes - offset;
    left_ = 0;
    if (jobs_ > 0 && units_ > 0) {
      enter_job();
    } else {
      jobs_ = 0;
    }
  }

  const DecodeCudaParams& p_;
  const Work* work_;
  char* ring_;
  Turn turn_;
  int layer_ = 0, phase_ = kInProj;
  int jobs_ = 0, units_ = 0, left_ = 0, row_ = 0, rows_ = 0, row_bytes_ = 0, row_left_ = 0;
  int64_t job_step_ = 0;
  const char *start_ = nullptr, *from_ = nullptr;
  unsigned groups_ = 0;
};

}  // namespace decode
}  // namespace mamba
