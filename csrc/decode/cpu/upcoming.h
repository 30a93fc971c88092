// What a thread of a decode step will read next, asked for while it does something else than read
// weights. Included by one file per instruction set.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../../common/simd.h"

namespace mamba {
namespace MAMBA_ISA {

// Adjacent memory that is read once in a token.
struct Stretch {
  const char* begin = nullptr;
  int64_t bytes = 0;
};

// The stretches that a thread reads in a token, one after another, and how far it has asked for
// them. Without it memory would be idle during the states' steps and at the barriers, and with many
// rows for a third of the time.
class Upcoming {
 public:
  Upcoming(const Stretch* stretches, int64_t count) : stretches_(stretches), count_(count) {}

  // The thread begins to read the stretch after the one that it was at; at first, number 0.
  void next_stretch() {
    start_ = end_;
    end_ += stretches_[++current_].bytes;
    reached(0);
  }

  // The thread is about to read what lies after the first `bytes` of its stretch.
  void reached(int64_t bytes) {
    reached_ = start_ + bytes;
    if (asked_start_ + at_ >= reached_) return;
    asked_ = current_, asked_start_ = start_, at_ = bytes;
  }

  // Asks for up to `lines` more.
  MAMBA_INLINE void ask(int64_t lines) {
    if (asked_start_ + at_ > reached_ + kMostAhead) return;
    const Stretch& stretch = stretches_[asked_];
    const char* line = stretch.begin + at_;
    const char* const end = std::min(line + lines * 64, stretch.begin + stretch.bytes);
    for (; line < end; line += 64) __builtin_prefetch(line, 0, 2);
    at_ = line - stretch.begin;
    if (at_ >= stretch.bytes && asked_ + 1 < count_) {
      asked_start_ += stretch.bytes, ++asked_, at_ = 0;
    }
  }

 private:
  static constexpr int64_t kMostAhead = int64_t{1} << 19;  // half of a second-level cache
  const Stretch* const stretches_;
  const int64_t count_;
  // The stretch that is being read, and the bytes before it, before its end, before the place in
  // it.
  int64_t current_ = -1;
  int64_t start_ = 0, end_ = 0, reached_ = 0;
  // The stretch that is being asked for, the bytes before it, and those of it that were.
  int64_t asked_ = 0;
  int64_t asked_start_ = 0, at_ = 0;
};

}  // namespace MAMBA_ISA
}  // namespace mamba
