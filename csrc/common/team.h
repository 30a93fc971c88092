// Threads that work through one job together, phase by phase, with barriers that cost a fraction of
// a microsecond. They come from the framework's pool: every callback of one parallel_for joins.
#pragma once

#include <sched.h>

#include <atomic>
#include <chrono>
#include <cstdint>

namespace mamba {

// The pool may call back fewer times than asked (each callback then stands for several slots), one
// after another, or late. So the team is whoever has joined when all slots are taken or when a
// member has waited long enough: from then on it is closed, and since every member is a running
// thread, a spinning barrier cannot deadlock. Whoever comes later has nothing to do. What a member
// computes must therefore not depend on the size of the team, only who computes it may.
class Team {
 public:
  explicit Team(int64_t slots) : slots_(static_cast<uint64_t>(slots)) {}
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  // This thread's number in the team, or -1 if the team was closed before.
  int64_t join(int64_t slots) {
    const uint64_t mine = kMember + static_cast<uint64_t>(slots);
    uint64_t before = state_.load(std::memory_order_relaxed);
    do {
      if (before & kClosed) return -1;
    } while (!state_.compare_exchange_weak(before, before + mine, std::memory_order_acq_rel));
    const auto start = std::chrono::steady_clock::now();
    for (int64_t turn = 1;; ++turn) {
      const uint64_t now = state_.load(std::memory_order_acquire);
      if (now & kClosed) break;
      const bool complete = (now & (kMember - 1)) >= slots_;
      const bool late = turn % 1024 == 0 &&
                        std::chrono::steady_clock::now() - start > std::chrono::milliseconds(2);
      if (complete || late) state_.fetch_or(kClosed, std::memory_order_acq_rel);
      relax(turn);
    }
    return static_cast<int64_t>(before / kMember);
  }

  // The number of members; only after join.
  int64_t size() const {
    return static_cast<int64_t>((state_.load(std::memory_order_acquire) & ~kClosed) / kMember);
  }

  // Returns once every member has called it; what they wrote before is visible then. Calls `idle`
  // again and again while it waits.
  template <class F>
  void barrier(int64_t size, F&& idle) {
    if (size == 1) return;
    const uint64_t round = round_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    for (int64_t turn = 1; round_.load(std::memory_order_acquire) == round; ++turn) {
      idle();
      relax(turn);
    }
  }

 private:
  static constexpr uint64_t kMember = uint64_t{1} << 32;
  static constexpr uint64_t kClosed = uint64_t{1} << 63;

  static void relax(int64_t turn) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
    // On a busy machine the thread that is waited for may need this core: spin for a few
    // microseconds only.
    if (turn % 128 == 0) sched_yield();
  }

  const uint64_t slots_;
  alignas(64) std::atomic<uint64_t> state_{0};
  alignas(64) std::atomic<int64_t> arrived_{0};
  alignas(64) std::atomic<uint64_t> round_{0};
};

}  // namespace mamba
