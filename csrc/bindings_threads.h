// CPU threads of the bindings: the framework's, so that its settings hold.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <unistd.h>

#include <cstdint>

namespace mamba {

// Asked first by whoever first used threads, so that a later child of a fork knows itself.
inline bool in_forked_child() {
  static const pid_t first_user = getpid();
  return getpid() != first_user;
}

// A child of a fork has none of its parent's threads, and a pool that does not know it would wait
// for them forever: such a child works alone, to the same bits.
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  if (!in_forked_child()) {
    torch::stable::parallel_for(begin, end, grain, f);
  } else if (begin < end) {
    f(begin, end);
  }
}

}  // namespace mamba
