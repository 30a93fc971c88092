#include "scan.h"

namespace mamba {

ScanEvents scan_events(const ScanParams& p) {
  ScanEvents events;
  if (!p.seq_idx) return events;
  const size_t steps = static_cast<size_t>(p.batch * p.length);
  events.length = p.length;
  events.before.assign(steps, ScanEvents::kNothing);
  events.after.assign(steps, ScanEvents::kNothing);
  events.used.assign(static_cast<size_t>(p.num_states), 0);
  std::vector<int64_t> last(static_cast<size_t>(p.num_states), -1);
  std::vector<int64_t> started_in(static_cast<size_t>(p.num_states), -1);
  for (int64_t row = 0; row < p.batch; ++row) {
    int32_t current = -1;
    for (int64_t t = 0; t < p.length; ++t) {
      const int64_t at = row * p.length + t;
      const int32_t id = p.seq_idx[row * p.seq_idx_stride[0] + t * p.seq_idx_stride[1]];
      if (id < 0) {
        events.before[at] = ScanEvents::kPadding;
        continue;
      }
      if (id != current) events.before[at] = p.initial_state ? id : ScanEvents::kFreshStart;
      if (id != current && p.num_states > 0) {
        events.shared_starts |= started_in[id] >= 0 && started_in[id] != row;
        started_in[id] = row;
      }
      current = id;
      if (p.num_states > 0) last[id] = at;
    }
  }
  for (int64_t id = 0; id < p.num_states; ++id) {
    if (last[id] < 0) continue;
    events.after[last[id]] = static_cast<int32_t>(id);
    events.used[id] = 1;
  }
  return events;
}

}  // namespace mamba
