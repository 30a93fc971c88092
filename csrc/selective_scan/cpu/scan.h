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
// size, for a little more work in all. (The batch has no say: a row's bits do not depend on it.)
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

// Runs units [begin, end).
MAMBA_DECLARE_ISA(void scan_forward(const ScanParams& p, const ScanEvents& events, int64_t begin,
                                    int64_t end))
MAMBA_DECLARE_ISA(void scan_backward(const ScanGradients& g, const ScanEvents& events,
                                     int64_t begin, int64_t end))

inline void scan_forward(const ScanParams& p, const ScanEvents& e, int64_t begin, int64_t end) {
  MAMBA_FOR_ISA(scan_forward, p, e, begin, end)
}
inline void scan_backward(const ScanGradients& g, const ScanEvents& e, int64_t begin, int64_t end) {
  MAMBA_FOR_ISA(scan_backward, g, e, begin, end)
}

}  // namespace mamba
