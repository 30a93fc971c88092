// The CPU scan: units of work that may run in any order and on any thread with the same bits.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../../common/cpu_isa.h"
#include "../params.h"

namespace mamba {

// A unit is one batch row's slice of at most this many channels of one group. The shape alone
// decides about it, so that neither the instruction set nor the number of threads changes the order
// of any sum.
constexpr int64_t kSliceChannels = 64;
constexpr int64_t kFewSlices = 4;

// Where a row has few channels, slices are half as wide: more threads find work, of a more even
// size, for a little more work in all.
inline int64_t slice_channels(const ScanParams& p) {
  const int64_t whole = (p.group_channels() + kSliceChannels - 1) / kSliceChannels;
  return p.groups * whole < kFewSlices ? kSliceChannels / 2 : kSliceChannels;
}
inline int64_t slices_per_group(const ScanParams& p) {
  const int64_t width = slice_channels(p);
  return (p.group_channels() + width - 1) / width;
}
inline int64_t slices_per_row(const ScanParams& p) { return p.groups * slices_per_group(p); }

struct ScanUnit {
  int64_t row, group, slice, channel, channels;  // channels [channel, channel + channels)
};

inline ScanUnit scan_unit(const ScanParams& p, int64_t index) {
  const int64_t per_group = slices_per_group(p);
  ScanUnit u;
  u.row = index / (p.groups * per_group);
  u.slice = index % (p.groups * per_group);
  u.group = u.slice / per_group;
  const int64_t width = slice_channels(p), first = (u.slice % per_group) * width;
  u.channel = u.group * p.group_channels() + first;
  u.channels = std::min(width, p.group_channels() - first);
  return u;
}

// A single unit of many steps would leave all threads but one idle. It is cut into segments of the
// length: what state a segment starts with is not known until all before it are done, but how it
// depends on the state before it is. So
//   1. the first segment (of the backward: the last) is done, and the others yield the state that
//      they leave behind when they start from zero, and the sum of their deltas, which says what is
//      left of the state before them;
//   2. the others are done, each from the state that follows from these.
// That is more work in all (two thirds of the forward, a fifth of the backward) for up to eight
// threads. The shape alone decides, so that the bits are the same at any number of threads; here
// the batch has a say as well: rows of a batch are threads' work enough.
constexpr int64_t kSegments = 9, kManySteps = 2048;

// The steps of a segment, or all of them where nothing is cut.
inline int64_t segment_steps(const ScanParams& p, bool backward) {
  if (p.batch * slices_per_row(p) != 1 || p.length < kManySteps) return p.length;
  const int64_t steps = (p.length + kSegments * 64 - 1) / (kSegments * 64) * 64;
  if (p.chunk_size >= p.length && !backward) return steps;  // no states are kept but the first
  // The backward takes so many steps at once.
  const int64_t together = p.chunk_size * std::max<int64_t>(1, 32 / p.chunk_size);
  return steps % together == 0 ? steps : p.length;
}

// Part of a unit that one thread does at a time.
enum class ScanPart {
  kAll,     // [begin, end) are units
  kFirst,   // [begin, end) are segments of the only unit; see above
  kSecond,  // the same; to be called for what has not been done
};

// What the first part knows of each segment for the second.
struct ScanCarry {
  int64_t steps, segments;
  std::vector<float> states;  // (segments, d, n): state behind it, the adjoint's in the backward
  std::vector<float> delta;   // (segments, d): sum of delta

  ScanCarry(const ScanParams& p, bool backward)
      : steps(segment_steps(p, backward)),
        segments(steps > 0 ? (p.length + steps - 1) / steps : 1) {
    if (segments < 2) return;
    states.resize(static_cast<size_t>(segments * p.channels * p.state_dim));
    delta.resize(static_cast<size_t>(segments * p.channels));
  }
};

// What seq_idx says about each step of every row, (b, l). Empty without seq_idx.
struct ScanEvents {
  static constexpr int32_t kNothing = -1, kPadding = -2, kFreshStart = -3;
  // kPadding; kFreshStart: restart from zero; >= 0: restart from that initial state; else kNothing.
  std::vector<int32_t> before;
  std::vector<int32_t> after;  // >= 0: the state after this step is that final state
  std::vector<uint8_t> used;   // (S,) whether any step belongs to the state
  // Whether rows share an initial state: then only one thread may add to its gradient.
  bool shared_starts = false;
  int64_t length = 0;

  const int32_t* row_before(int64_t row) const {
    return before.empty() ? nullptr : before.data() + row * length;
  }
  const int32_t* row_after(int64_t row) const {
    return after.empty() ? nullptr : after.data() + row * length;
  }
};

ScanEvents scan_events(const ScanParams& p);

// Whether the sequence starts anew before step t.
inline bool restarts(const int32_t* before, int64_t t) {
  return before && (before[t] >= 0 || before[t] == ScanEvents::kFreshStart);
}

MAMBA_DECLARE_ISA(void scan_forward(const ScanParams& p, const ScanEvents& events, ScanCarry& carry,
                                    ScanPart part, int64_t begin, int64_t end))
MAMBA_DECLARE_ISA(void scan_backward(const ScanGradients& g, const ScanEvents& events,
                                     ScanCarry& carry, ScanPart part, int64_t begin, int64_t end))

inline void scan_forward(const ScanParams& p, const ScanEvents& e, ScanCarry& carry, ScanPart part,
                         int64_t begin, int64_t end) {
  MAMBA_FOR_ISA(scan_forward, p, e, carry, part, begin, end)
}
inline void scan_backward(const ScanGradients& g, const ScanEvents& e, ScanCarry& carry,
                          ScanPart part, int64_t begin, int64_t end) {
  MAMBA_FOR_ISA(scan_backward, g, e, carry, part, begin, end)
}

}  // namespace mamba
