#include "scan_tiles.h"

namespace mamba {
namespace MAMBA_ISA {
namespace {

// States of a block that stay in registers at once.
constexpr int kRegisterStates = kLanes == 16 ? 16 : 8;

struct Block {
  int64_t channel;  // the first one
  int count;        // channels in use
};

// Pointers to one block's staged steps.
struct Steps {
  const float *delta, *delta_u;  // [t][lane]
  float* y;                      // [t][lane]
  const float *B, *C;            // [t][n], or n vectors
  int64_t n;                     // distance between steps of B and C
  const Ahead* ahead;
  bool small;  // see decay_of
};

// h <- exp2(delta A) h + delta u B, y += C h over steps [begin, end), for kStates states of a
// block.
template <int kStates, bool kConstantB, bool kConstantC, bool kSmall>
void advance(const Steps& in, const float* A, float* state, int64_t first, int64_t begin,
             int64_t end) {
  Vec h[kStates];
#pragma GCC unroll 16
  for (int s = 0; s < kStates; ++s) h[s] = load(state + (first + s) * kLanes);
  const float* const A_first = A + first * kLanes;
  for (int64_t t = begin; t < end; ++t) {
    in.ahead->ask(t);
    const Vec delta = load(in.delta + t * kLanes), delta_u = load(in.delta_u + t * kLanes);
    const float* B = kConstantB ? in.B + first * kLanes : in.B + t * in.n + first;
    const float* C = kConstantC ? in.C + first * kLanes : in.C + t * in.n + first;
    Vec y[2] = {load(in.y + t * kLanes), Vec{}};
#pragma GCC unroll 16
    for (int s = 0; s < kStates; ++s) {
      const Vec decay = decay_of<kSmall>(delta, load(A_first + s * kLanes));
      h[s] = decay * h[s] + delta_u * projection<kConstantB>(B, s);
      y[s & 1] += h[s] * projection<kConstantC>(C, s);
    }
    store(in.y + t * kLanes, y[0] + y[1]);
  }
#pragma GCC unroll 16
  for (int s = 0; s < kStates; ++s) store(state + (first + s) * kLanes, h[s]);
}

template <bool kConstantB, bool kConstantC, bool kSmall = false>
void advance_all(const Steps& in, const float* A, float* state, int64_t begin, int64_t end) {
  int64_t s = 0;
  for (; s + kRegisterStates <= in.n; s += kRegisterStates) {
    advance<kRegisterStates, kConstantB, kConstantC, kSmall>(in, A, state, s, begin, end);
  }
  if (kRegisterStates > 8 && s + 8 <= in.n) {
    advance<8, kConstantB, kConstantC, kSmall>(in, A, state, s, begin, end);
    s += 8;
  }
  for (; s + 4 <= in.n; s += 4) {
    advance<4, kConstantB, kConstantC, kSmall>(in, A, state, s, begin, end);
  }
  for (; s < in.n; ++s) advance<1, kConstantB, kConstantC, kSmall>(in, A, state, s, begin, end);
}

void advance_any(const ScanParams& p, const Steps& in, const float* A, float* state, int64_t begin,
                 int64_t end) {
  if (p.constant_B) {
    p.constant_C ? advance_all<true, true>(in, A, state, begin, end)
                 : advance_all<true, false>(in, A, state, begin, end);
  } else {
    if (p.constant_C) return advance_all<false, true>(in, A, state, begin, end);
    in.small ? advance_all<false, false, kSmallPays>(in, A, state, begin, end)
             : advance_all<false, false>(in, A, state, begin, end);
  }
}

// The same without y.
template <int kStates, bool kConstantB, bool kSmall = false>
void gather(const Steps& in, const float* A, float* state, int64_t first, int64_t begin,
            int64_t end) {
  Vec h[kStates];
#pragma GCC unroll 16
  for (int s = 0; s < kStates; ++s) h[s] = load(state + (first + s) * kLanes);
  const float* const A_first = A + first * kLanes;
  for (int64_t t = begin; t < end; ++t) {
    in.ahead->ask(t);
    const Vec delta = load(in.delta + t * kLanes), delta_u = load(in.delta_u + t * kLanes);
    const float* B = kConstantB ? in.B + first * kLanes : in.B + t * in.n + first;
#pragma GCC unroll 16
    for (int s = 0; s < kStates; ++s) {
      const Vec decay = decay_of<kSmall>(delta, load(A_first + s * kLanes));
      h[s] = decay * h[s] + delta_u * projection<kConstantB>(B, s);
    }
  }
#pragma GCC unroll 16
  for (int s = 0; s < kStates; ++s) store(state + (first + s) * kLanes, h[s]);
}

void gather_any(const ScanParams& p, const Steps& in, const float* A, float* state, int64_t begin,
                int64_t end) {
  int64_t s = 0;
  for (; s + kRegisterStates <= in.n; s += kRegisterStates) {
    p.constant_B ? gather<kRegisterStates, true>(in, A, state, s, begin, end)
    : in.small   ? gather<kRegisterStates, false, kSmallPays>(in, A, state, s, begin, end)
                 : gather<kRegisterStates, false>(in, A, state, s, begin, end);
  }
  for (; s < in.n; ++s) {
    p.constant_B ? gather<1, true>(in, A, state, s, begin, end)
                 : gather<1, false>(in, A, state, s, begin, end);
  }
}

// One unit, or a segment of it: a slice of channels of one row, walked in time.
class Walk {
 public:
  Walk(const ScanParams& p, const ScanEvents& events, ScanCarry& carry, const ScanUnit& unit,
       const Segment& segment)
      : p_(p),
        unit_(unit),
        segment_(segment),
        carry_(carry),
        before_(events.row_before(unit.row)),
        after_(events.row_after(unit.row)),
        A_(kMaxBlocks * p.state_dim * kLanes),
        states_(kMaxBlocks * p.state_dim * kLanes),
        B_(p, unit, p.B, p.constant_B, kTile),
        C_(p, unit, p.C, p.constant_C, kTile) {
    stage_A(p, unit, kLog2e, A_.get());
    for_each_block([&](int b, const Block& block) {
      store(D_ + b * kLanes, stage_row(p_.D, block.channel, block.count));
      store(bias_ + b * kLanes, stage_row(p_.delta_bias, block.channel, block.count));
      store(most_A_ + b * kLanes,
            largest_A(A_.get() + b * p_.state_dim * kLanes, p_.state_dim, kLanes));
    });
  }

  void run() {
    start();
    for (int64_t t = segment_.begin; t < segment_.end;) {
      const int64_t end = std::min<int64_t>(t + kTile, segment_.end);
      B_.stage(t, end - t, before_);
      C_.stage(t, end - t, before_);
      for_each_block([&](int b, const Block& block) { tile(b, block, t, end - t); });
      t = end;
    }
    if (segment_.index == 0 && segment_.end < p_.length) leave();
    if (before_ || segment_.end < p_.length) return;
    for_each_block([&](int b, const Block& block) {
      write_states(state(b), p_.state_dim, block.count, state_at(p_.final_state, unit_.row, block));
    });
  }

  // Only the state that the segment leaves behind when it starts from zero.
  void run_for_state() {
    for (int64_t t = segment_.begin; t < segment_.end;) {
      const int64_t end = std::min<int64_t>(t + kTile, segment_.end);
      B_.stage(t, end - t, before_);
      for_each_block([&](int b, const Block& block) { tile_for_state(b, block, t, end - t); });
      t = end;
    }
    leave();
  }

 private:
  // The state before the first step.
  void start() {
    const int64_t n = p_.state_dim;
    for_each_block([&](int b, const Block& block) {
      if (p_.initial_state && !before_) {
        read_states(state_at(p_.initial_state, unit_.row, block), n, block.count, state(b));
      }
      for (int64_t i = 0; i < segment_.index; ++i) {
        Buffer behind(n * kLanes);
        read_states(state_at(carry_.states.data(), i, block), n, block.count, behind.get());
        if (i == 0 || restarts_within(before_, scan_segment(p_, carry_, i))) {
          std::memcpy(state(b), behind.get(), sizeof(float) * static_cast<size_t>(n * kLanes));
          continue;
        }
        const Vec delta =
            read_some<F32>(&carry_.delta[i * p_.channels + block.channel], block.count);
        carry_over(delta, A_.get() + b * n * kLanes, behind.get(), n, state(b), kLanes);
      }
    });
  }

  // Notes the state behind the last step.
  void leave() {
    for_each_block([&](int b, const Block& block) {
      write_states(state(b), p_.state_dim, block.count,
                   state_at(carry_.states.data(), segment_.index, block));
      write_some<F32>(&carry_.delta[segment_.index * p_.channels + block.channel],
                      load(deltas_ + b * kLanes), block.count);
    });
  }

  template <class F>
  void for_each_block(F&& f) {
    for (int b = 0; b * kLanes < unit_.channels; ++b) {
      const int64_t left = unit_.channels - b * kLanes;
      f(b, Block{unit_.channel + b * kLanes, static_cast<int>(std::min<int64_t>(kLanes, left))});
    }
  }

  float* state(int b) { return states_.get() + b * p_.state_dim * kLanes; }

  template <class T>
  T* state_at(T* states, int64_t index, const Block& block) const {
    return states + (index * p_.channels + block.channel) * p_.state_dim;
  }

  void restart(int64_t t, const Block& block, float* h) {
    if (!restarts(before_, t)) return;
    if (before_[t] == ScanEvents::kFreshStart) {
      std::memset(h, 0, sizeof(float) * p_.state_dim * kLanes);
    } else {
      read_states(state_at(p_.initial_state, before_[t], block), p_.state_dim, block.count, h);
    }
  }

  int64_t offset(const TensorArg& x, const Block& block, int64_t t) const {
    return unit_.row * x.stride[0] + block.channel * x.stride[1] + t * x.stride[2];
  }

  // Lists the tiles after the ones that start at t0.
  void look_ahead(const Block& block, int64_t t0, bool for_state = false) {
    ahead_.clear();
    const int64_t t = t0 + kTile, steps = std::min<int64_t>(kTile, segment_.end - t);
    if (steps <= 0) return;
    int slot = 0;
    for (const TensorArg* x : {&p_.u, &p_.delta, &p_.z, &p_.out}) {
      if (for_state && x == &p_.z) return;
      if (x == &p_.out && streams(p_, *x)) continue;
      ahead_.add(slot++, *x, offset(*x, block, t), x->stride[1], x->stride[2], block.count, steps);
    }
  }

  // Steps [t0, t0 + steps) of u and delta.
  void stage(int b, const Block& block, int64_t t0, int64_t steps) {
    const int32_t* before = before_ ? before_ + t0 : nullptr;
    const int count = block.count, n_steps = static_cast<int>(steps);
    read_tile(p_.u, offset(p_.u, block, t0), p_.u.stride[1], p_.u.stride[2], count, n_steps, u_);
    read_tile(p_.delta, offset(p_.delta, block, t0), p_.delta.stride[1], p_.delta.stride[2], count,
              n_steps, delta_u_);
    clear_padding(before, steps, u_);
    finish_delta(p_, load(bias_ + b * kLanes), before, steps, delta_u_, delta_);
  }

  Steps staged(int b, int64_t steps) {
    return {delta_,
            delta_u_,
            y_,
            p_.constant_B ? B_.block(b) : B_.at(0),
            p_.constant_C ? C_.block(b) : C_.at(0),
            p_.state_dim,
            &ahead_,
            are_small(delta_, steps, kLanes, load(most_A_ + b * kLanes))};
  }

  void tile_for_state(int b, const Block& block, int64_t t0, int64_t steps) {
    stage(b, block, t0, steps);
    Vec sum{};
    for (int64_t t = 0; t < steps; ++t) {
      const Vec delta = load(delta_ + t * kLanes);
      sum += delta;
      store(delta_u_ + t * kLanes, delta * load(u_ + t * kLanes));
    }
    store(deltas_ + b * kLanes, load(deltas_ + b * kLanes) + sum);
    look_ahead(block, t0, true);
    const Steps in = staged(b, steps);
    for (int64_t t = 0; t < steps;) {
      restart(t0 + t, block, state(b));
      const int64_t end = stretch_end(before_, after_, t0 + t, t0 + steps) - t0;
      gather_any(p_, in, A_.get() + b * p_.state_dim * kLanes, state(b), t, end);
      t = end;
    }
  }

  // Steps [t0, t0 + steps) of one block.
  void tile(int b, const Block& block, int64_t t0, int64_t steps) {
    const int count = block.count;
    stage(b, block, t0, steps);
    const Vec D = load(D_ + b * kLanes);
    for (int64_t t = 0; t < steps; ++t) {
      const Vec u = load(u_ + t * kLanes);
      store(delta_u_ + t * kLanes, load(delta_ + t * kLanes) * u);
      store(y_ + t * kLanes, D * u);
    }
    const Steps in = staged(b, steps);
    look_ahead(block, t0);
    for (int64_t t = 0; t < steps;) {
      const int64_t chunk = (t0 + t) / p_.chunk_size;
      if ((t0 + t) % p_.chunk_size == 0) {
        write_states(state(b), p_.state_dim, count,
                     state_at(p_.chunk_states, unit_.row * p_.chunks + chunk, block));
      }
      restart(t0 + t, block, state(b));
      const int64_t chunk_end = std::min(t0 + steps, (chunk + 1) * p_.chunk_size);
      const int64_t end = stretch_end(before_, after_, t0 + t, chunk_end) - t0;
      advance_any(p_, in, A_.get() + b * p_.state_dim * kLanes, state(b), t, end);
      if (after_ && after_[t0 + end - 1] >= 0) {
        write_states(state(b), p_.state_dim, count,
                     state_at(p_.final_state, after_[t0 + end - 1], block));
      }
      t = end;
    }
    finish(block, before_ ? before_ + t0 : nullptr, t0, steps);
  }

  // The gate, zeros at padding, and the result in its own layout.
  void finish(const Block& block, const int32_t* before, int64_t t0, int64_t steps) {
    const int n_steps = static_cast<int>(steps);
    if (p_.z.data) {
      read_tile(p_.z, offset(p_.z, block, t0), p_.z.stride[1], p_.z.stride[2], block.count, n_steps,
                u_);
      for (int64_t t = 0; t < steps; ++t) {
        store(y_ + t * kLanes, load(y_ + t * kLanes) * silu(load(u_ + t * kLanes)));
      }
    }
    clear_padding(before, steps, y_);
    write_tile(p_.out, offset(p_.out, block, t0), p_.out.stride[1], p_.out.stride[2], block.count,
               n_steps, y_, kLanes, streams(p_, p_.out));
  }

  const ScanParams& p_;
  const ScanUnit unit_;
  const Segment segment_;
  ScanCarry& carry_;
  const int32_t *before_, *after_;
  Buffer A_, states_;
  ProjectionTile B_, C_;
  Ahead ahead_;
  alignas(64) float u_[kTile * kLanes], delta_[kTile * kLanes], delta_u_[kTile * kLanes],
      y_[kTile * kLanes];
  alignas(64) float D_[kSliceChannels], bias_[kSliceChannels], deltas_[kSliceChannels] = {},
                                                               most_A_[kSliceChannels];
};

}  // namespace

void scan_forward(const ScanParams& p, const ScanEvents& events, ScanCarry& carry, ScanPart part,
                  int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    if (part == ScanPart::kAll) {
      Walk(p, events, carry, scan_unit(p, i), {0, 0, p.length}).run();
      continue;
    }
    Walk walk(p, events, carry, scan_unit(p, 0), scan_segment(p, carry, i));
    part == ScanPart::kFirst&& i > 0 ? walk.run_for_state() : walk.run();
  }
  end_of_stream();
}

}  // namespace MAMBA_ISA
}  // namespace mamba
