#include "scan_sweeps.h"

namespace mamba {
namespace MAMBA_ISA {
namespace {

// A block of channels, at `lane` of the slice's rows.
struct Block {
  int64_t channel, lane;
  int count;
};

// A few blocks together: channels [begin, end) of the slice.
struct Blocks {
  int64_t begin, end;
};

// One unit, or a segment of it: a slice of channels of one row, chunk after chunk from the end.
class Walk {
 public:
  // `tiles` has tile_floats() zeros. It is too large to ask the system for at every unit.
  Walk(const ScanGradients& g, const ScanEvents& events, ScanCarry& carry, const ScanUnit& unit,
       const Segment& segment, Buffer& tiles)
      : g_(g),
        p_(g.forward),
        unit_(unit),
        segment_(segment),
        carry_(carry),
        before_(events.row_before(unit.row)),
        after_(events.row_after(unit.row)),
        n_(p_.state_dim),
        steps_(std::min(p_.chunk_size, p_.length)),
        chunks_at_once_(chunks_at_once(p_)),
        A_(n_ * kRow),
        dA_(n_ * kRow),
        state_(n_ * kRow),
        dstate_(n_ * kRow),
        B_(p_, unit, p_.B, p_.constant_B, chunks_at_once_ * steps_),
        C_(p_, unit, p_.C, p_.constant_C, chunks_at_once_ * steps_),
        dB_(p_.constant_B ? n_ * kRow : 0),
        dC_(p_.constant_C ? n_ * kRow : 0),
        tiles_(tiles) {
    for_each_block([&](const Block& block) {
      store(D_ + block.lane, stage_row(p_.D, block.channel, block.count));
      store(bias_ + block.lane, stage_row(p_.delta_bias, block.channel, block.count));
      read_tile(p_.A, block.channel * p_.A.stride[0], p_.A.stride[0], p_.A.stride[1], block.count,
                static_cast<int>(n_), A_.get() + block.lane, kRow);
      if (!g_.dfinal_state || before_ || segment_.end < p_.length) return;
      read_states(state_at(g_.dfinal_state, unit_.row, block.channel), n_, block.count,
                  dstate_.get() + block.lane, kRow);
    });
    for (int64_t i = 0; i < n_ * kRow; i += kLanes) {
      store(A_.get() + i, load(A_.get() + i) * kLog2e);
    }
    for (int64_t i = 0; i < kRow; i += kLanes) {
      store(most_A_ + i, largest_A(A_.get() + i, n_, kRow));
    }
  }

  static int64_t tile_floats(const ScanParams& p) {
    return chunks_at_once(p) * std::min(p.chunk_size, p.length) * kStepRow;
  }

  void run() {
    start();
    for_each_group([&](int64_t begin, int64_t end) { chunks(begin, end); });
    if (segment_.begin > 0 && segment_.end == p_.length) leave();
    const int64_t part = unit_.row * carry_.segments + segment_.index;
    for_each_block([&](const Block& block) {
      const auto write = [&](Buffer& rows, float* states, int64_t index) {
        write_states(rows.get() + block.lane, n_, block.count,
                     state_at(states, index, block.channel), kRow);
      };
      write(dA_, g_.dA, part);
      if (p_.constant_B) write(dB_, g_.dB, part);
      if (p_.constant_C) write(dC_, g_.dC, part);
      if (g_.dinitial_state && !before_ && segment_.begin == 0) {
        write(dstate_, g_.dinitial_state, unit_.row);
      }
      for (int c = 0; c < block.count; ++c) {
        const int64_t channel = part * p_.channels + block.channel + c;
        if (g_.dD) g_.dD[channel] = dD_[block.lane + c];
        if (g_.ddelta_bias) g_.ddelta_bias[channel] = dbias_[block.lane + c];
      }
    });
  }

  // Only the adjoint state before the segment, from zero behind it.
  void run_for_state() {
    for_state_ = true;
    for_each_group([&](int64_t begin, int64_t end) {
      const int64_t t0 = begin * p_.chunk_size;
      const int64_t steps = std::min(end * p_.chunk_size, p_.length) - t0;
      C_.stage(t0, steps, before_);
      small_ = true;
      for_each_block([&](const Block& block) {
        stage_for_state(block, t0, steps);
        int64_t s = 0;
        for (; s + kRegisterVectors <= n_; s += kRegisterVectors) {
          p_.constant_C ? adjoint<kRegisterVectors, true>(s, block, t0, steps)
          : small_      ? adjoint<kRegisterVectors, false, kSmallPays>(s, block, t0, steps)
                        : adjoint<kRegisterVectors, false>(s, block, t0, steps);
        }
        for (; s < n_; ++s) {
          p_.constant_C ? adjoint<1, true>(s, block, t0, steps)
                        : adjoint<1, false>(s, block, t0, steps);
        }
      });
    });
    leave();
  }

 private:
  // Chunks of the segment that are staged together, from its end.
  template <class F>
  void for_each_group(F&& f) const {
    const int64_t first = segment_.begin / p_.chunk_size;
    for (int64_t end = (segment_.end + p_.chunk_size - 1) / p_.chunk_size; end > first;) {
      const int64_t begin = (end - 1) / chunks_at_once_ * chunks_at_once_;
      f(begin, end);
      end = begin;
    }
  }

  // The adjoint state behind the last step.
  void start() {
    const int64_t last = carry_.segments - 1;
    Buffer behind(segment_.index < last ? n_ * kRow : 0);
    for_each_block([&](const Block& block) {
      float* const to = dstate_.get() + block.lane;
      float* const from = behind.get() + block.lane;
      for (int64_t i = last; i > segment_.index; --i) {
        read_states(state_at(carry_.states.data(), i, block.channel), n_, block.count, from, kRow);
        if (i == last || restarts_within(before_, scan_segment(p_, carry_, i))) {
          for (int64_t s = 0; s < n_; ++s) store(to + s * kRow, load(from + s * kRow));
          continue;
        }
        const Vec delta =
            read_some<F32>(&carry_.delta[i * p_.channels + block.channel], block.count);
        carry_over(delta, A_.get() + block.lane, from, n_, to, kRow);
      }
    });
  }

  // Notes the adjoint state before the first step.
  void leave() {
    for_each_block([&](const Block& block) {
      write_states(dstate_.get() + block.lane, n_, block.count,
                   state_at(carry_.states.data(), segment_.index, block.channel), kRow);
      write_some<F32>(&carry_.delta[segment_.index * p_.channels + block.channel],
                      load(deltas_ + block.lane), block.count);
    });
  }

  static int64_t chunks_at_once(const ScanParams& p) {
    return std::max<int64_t>(1, kTile / p.chunk_size);
  }

  template <class F>
  void for_each_block(F&& f) const {
    for (int64_t lane = 0; lane < unit_.channels; lane += kLanes) {
      const int64_t left = unit_.channels - lane;
      f(Block{unit_.channel + lane, lane, static_cast<int>(std::min<int64_t>(kLanes, left))});
    }
  }

  float* tile(Slot slot, const Block& block) { return tiles_.get() + slot * kRow + block.lane; }

  template <class T>
  T* state_at(T* states, int64_t index, int64_t channel) const {
    return states + (index * p_.channels + channel) * n_;
  }

  int64_t offset(const TensorArg& x, const Block& block, int64_t t) const {
    return unit_.row * x.stride[0] + block.channel * x.stride[1] + t * x.stride[2];
  }

  // At padding what is read becomes 0.
  void read(const TensorArg& x, const Block& block, int64_t t0, int64_t steps, Slot to) {
    read_tile(x, offset(x, block, t0), x.stride[1], x.stride[2], block.count,
              static_cast<int>(steps), tile(to, block), kStepRow);
    clear_padding(before_ ? before_ + t0 : nullptr, steps, tile(to, block), kStepRow);
  }
  void write(const TensorArg& x, const Block& block, int64_t t0, int64_t steps, Slot from) {
    write_tile(x, offset(x, block, t0), x.stride[1], x.stride[2], block.count,
               static_cast<int>(steps), tile(from, block), kStepRow, streams(p_, x));
  }

  void stage_for_state(const Block& block, int64_t t0, int64_t steps) {
    read(p_.delta, block, t0, steps, kRaw);
    read(g_.dout, block, t0, steps, kDy);
    if (p_.z.data) read(p_.z, block, t0, steps, kGate);
    finish_delta(p_, load(bias_ + block.lane), before_ ? before_ + t0 : nullptr, steps,
                 tile(kRaw, block), tile(kDelta, block), kStepRow);
    small_ &= are_small(tile(kDelta, block), steps, kStepRow, load(most_A_ + block.lane));
    Vec sum{};
    for (int64_t t = 0; t < steps; ++t) {
      float* const step = tiles_.get() + t * kStepRow + block.lane;
      if (p_.z.data) {
        const Vec z = load(step + kGate * kRow);
        store(step + kDy * kRow, load(step + kDy * kRow) * (z * sigmoid(z)));
      }
      sum += load(step + kDelta * kRow);
    }
    add(sum, deltas_ + block.lane);
  }

  void stage(const Block& block, int64_t t0, int64_t steps) {
    read(p_.u, block, t0, steps, kU);
    read(p_.delta, block, t0, steps, kRaw);
    read(g_.dout, block, t0, steps, kDy);
    if (p_.z.data) read(p_.z, block, t0, steps, kGate);
    finish_delta(p_, load(bias_ + block.lane), before_ ? before_ + t0 : nullptr, steps,
                 tile(kRaw, block), tile(kDelta, block), kStepRow);
    small_ &= are_small(tile(kDelta, block), steps, kStepRow, load(most_A_ + block.lane));
    for (int64_t t = 0; t < steps; ++t) {
      float* const step = tiles_.get() + t * kStepRow + block.lane;
      if (p_.z.data) {
        const Vec z = load(step + kGate * kRow), gate = sigmoid(z), dout = load(step + kDy * kRow);
        store(step + kGate * kRow, dout * gate * (1.0f + z * (1.0f - gate)));
        store(step + kDy * kRow, dout * (z * gate));
      }
      store(step + kDeltaU * kRow, load(step + kDelta * kRow) * load(step + kU * kRow));
      for (const Slot sum : {kY, kDDelta, kDDeltaU}) store(step + sum * kRow, Vec{});
    }
  }

  // The states [first, first + states) of some blocks start anew, if anything does at step t.
  void restart(int64_t t, const Blocks& blocks, int64_t first, int64_t states) {
    if (!restarts(before_, t)) return;
    const float* from = nullptr;
    if (before_[t] >= 0) from = state_at(p_.initial_state, before_[t], unit_.channel);
    for (int64_t s = first; s < first + states; ++s) {
      for (int64_t c = blocks.begin; c < blocks.end; ++c) {
        state_.get()[s * kRow + c] = from ? from[c * n_ + s] : 0.0f;
      }
    }
  }

  // A restart hands the gradient of the state to the initial state that it took.
  void end_of_sequence(int64_t t, const Blocks& blocks, int64_t first, int64_t states) {
    if (!restarts(before_, t)) return;
    float* to = nullptr;
    if (before_[t] >= 0 && g_.dinitial_state && !for_state_) {
      to = state_at(g_.dinitial_state, before_[t], unit_.channel);
    }
    for (int64_t s = first; s < first + states; ++s) {
      for (int64_t c = blocks.begin; c < blocks.end; ++c) {
        if (to) to[c * n_ + s] += dstate_.get()[s * kRow + c];
        dstate_.get()[s * kRow + c] = 0.0f;
      }
    }
  }

  // A step that makes a final state also gets that one's gradient.
  void final_gradient(int64_t t, const Blocks& blocks, int64_t first, int64_t states) {
    if (!after_ || after_[t] < 0 || !g_.dfinal_state) return;
    const float* const from = state_at(g_.dfinal_state, after_[t], unit_.channel);
    for (int64_t s = first; s < first + states; ++s) {
      for (int64_t c = blocks.begin; c < blocks.end; ++c) {
        dstate_.get()[s * kRow + c] += from[c * n_ + s];
      }
    }
  }

  template <int kStates, bool kConstantC, bool kSmall = false>
  void adjoint(int64_t first, const Block& block, int64_t t0, int64_t steps) {
    const int64_t at = first * kRow + block.lane;
    Sweep in{};
    in.steps = tiles_.get() + block.lane;
    in.A = A_.get() + at;
    in.dstate = dstate_.get() + at;
    in.C = kConstantC ? C_.block(static_cast<int>(block.lane / kLanes)) + first * kLanes
                      : C_.at(0) + first;
    in.n = n_;
    const Blocks blocks{block.lane, block.lane + block.count};
    for (int64_t end = steps; end > 0;) {
      const int64_t begin = stretch_begin(before_, after_, t0, end);
      final_gradient(t0 + end - 1, blocks, first, kStates);
      sweep_adjoint<kStates, kConstantC, kSmall>(in, begin, end);
      end_of_sequence(t0 + begin, blocks, first, kStates);
      end = begin;
    }
  }

  // Both sweeps over a chunk of kStates states, from `first` on, of kBlocks blocks.
  template <int kBlocks, int kStates, bool kConstantB, bool kConstantC>
  void sweep(int64_t first, int64_t lane, int64_t t0, int64_t steps) {
    const int64_t at = first * kRow + lane, block = lane / kLanes;
    const Sweep in{tiles_.get() + (t0 - staged_) * kStepRow + lane,
                   lane,
                   A_.get() + at,
                   state_.get() + at,
                   dstate_.get() + at,
                   dA_.get() + at,
                   (kConstantB ? B_.block(static_cast<int>(block)) : B_.at(t0 - staged_)) +
                       first * (kConstantB ? kLanes : 1),
                   (kConstantC ? C_.block(static_cast<int>(block)) : C_.at(t0 - staged_)) +
                       first * (kConstantC ? kLanes : 1),
                   n_,
                   dB_.get() + (kConstantB ? at : 0),
                   dC_.get() + (kConstantC ? at : 0),
                   &lines_};
    const Blocks blocks{lane, std::min(lane + kBlocks * kLanes, unit_.channels)};
    for (int64_t t = 0; t < steps;) {
      restart(t0 + t, blocks, first, kStates);
      const int64_t end = stretch_end(before_, after_, t0 + t, t0 + steps) - t0;
      const bool want_y = p_.z.data != nullptr;
      if (!kConstantB && !kConstantC && small_) {
        sweep_forward<kBlocks, kStates, kConstantB, kConstantC,
                      kSmallPays && !kConstantB && !kConstantC>(in, t, end, want_y);
      } else {
        sweep_forward<kBlocks, kStates, kConstantB, kConstantC, false>(in, t, end, want_y);
      }
      t = end;
    }
    for (int64_t end = steps; end > 0;) {
      const int64_t begin = stretch_begin(before_, after_, t0, end);
      final_gradient(t0 + end - 1, blocks, first, kStates);
      sweep_backward<kBlocks, kStates, kConstantB, kConstantC>(in, begin, end);
      end_of_sequence(t0 + begin, blocks, first, kStates);
      end = begin;
    }
  }

  // States [first, first + kStates) of all blocks, kBlocks at a time.
  template <int kBlocks, int kStates, bool kConstantB, bool kConstantC>
  void sweep_blocks(int64_t first, int64_t t0, int64_t steps) {
    float* const sums = tiles_.get() + (t0 - staged_) * kStepRow + kSums * kRow;
    for (int64_t t = 0; !kOneGroup && t < steps; ++t) {
      std::memset(sums + t * kStepRow, 0, sizeof(float) * 2 * kStates * kLanes);
    }
    for (int64_t lane = 0; lane < unit_.channels; lane += kBlocks * kLanes) {
      sweep<kBlocks, kStates, kConstantB, kConstantC>(first, lane, t0, steps);
    }
    for (int s = 0; s < kStates; ++s) {
      const int64_t to = slice_sums(first + s) + t0;
      if (!kConstantB) sum_lanes(sums + s * kLanes, steps, g_.dB + to);
      if (!kConstantC) sum_lanes(sums + (kStates + s) * kLanes, steps, g_.dC + to);
    }
  }

  template <int kBlocks, int kStates, bool kConstantB, bool kConstantC>
  void sweep_all(const Block& last, int64_t t0, int64_t steps) {
    const int64_t groups = (last.lane / kLanes + kBlocks) / kBlocks;
    if (!lines_spread_) {
      lines_.spread(2 * staged_steps_ * groups * (n_ / kStates + n_ % kStates));
      lines_spread_ = true;
    }
    int64_t s = 0;
    for (; s + kStates <= n_; s += kStates) {
      sweep_blocks<kBlocks, kStates, kConstantB, kConstantC>(s, t0, steps);
    }
    for (; s < n_; ++s) sweep_blocks<kBlocks, 1, kConstantB, kConstantC>(s, t0, steps);
  }

  void sweep_any(const Block& last, int64_t t0, int64_t steps) {
    constexpr int kAll = kRegisterVectors;
    if (p_.constant_B) {
      return p_.constant_C ? sweep_all<4, 1, true, true>(last, t0, steps)
                           : sweep_all<4, 1, true, false>(last, t0, steps);
    }
    if (p_.constant_C) return sweep_all<4, 1, false, true>(last, t0, steps);
    if (last.lane == 0) return sweep_all<1, kAll, false, false>(last, t0, steps);
    if (last.lane == kLanes) return sweep_all<2, kAll / 2, false, false>(last, t0, steps);
    sweep_all<4, kAll / 4, false, false>(last, t0, steps);
  }

  // Chunks [begin, end): what they take is staged together, as long pieces of memory come faster.
  void chunks(int64_t begin, int64_t end) {
    const int64_t t0 = begin * p_.chunk_size, steps = std::min(end * p_.chunk_size, p_.length) - t0;
    B_.stage(t0, steps, before_);
    C_.stage(t0, steps, before_);
    lines_.clear();
    small_ = true;
    Block last{};
    for_each_block([&](const Block& block) {
      stage(block, t0, steps);
      for (const TensorArg* x : {&g_.du, &g_.ddelta, &g_.dz}) {
        if (!streams(p_, *x)) look_ahead(*x, block, t0, steps);
      }
      last = block;
    });
    if (begin * p_.chunk_size > segment_.begin) {
      const int64_t before = (begin - chunks_at_once_) * p_.chunk_size;
      for_each_block([&](const Block& block) {
        for (int64_t chunk = begin - chunks_at_once_; chunk < begin; ++chunk) {
          lines_.add(state_at(p_.chunk_states, unit_.row * p_.chunks + chunk, block.channel),
                     block.count * n_ * static_cast<int64_t>(sizeof(float)));
        }
        for (const TensorArg* x : {&p_.u, &p_.delta, &g_.dout, &p_.z}) {
          look_ahead(*x, block, before, t0 - before);
        }
      });
    }
    staged_ = t0, staged_steps_ = steps, lines_spread_ = false;
    for (int64_t chunk = end - 1; chunk >= begin; --chunk) {
      for_each_block([&](const Block& block) {
        read_states(state_at(p_.chunk_states, unit_.row * p_.chunks + chunk, block.channel), n_,
                    block.count, state_.get() + block.lane, kRow);
      });
      const int64_t t = chunk * p_.chunk_size;
      sweep_any(last, t, std::min(p_.chunk_size, p_.length - t));
    }
    for_each_block([&](const Block& block) { finish(block, t0, steps); });
  }

  void look_ahead(const TensorArg& x, const Block& block, int64_t t0, int64_t steps) {
    lines_.add(x, offset(x, block, t0), x.stride[1], x.stride[2], block.count, steps);
  }

  // From the gradients of delta u and of the decays to those of the inputs.
  void finish(const Block& block, int64_t t0, int64_t steps) {
    const Vec D = load(D_ + block.lane);
    // Of this chunk only, and in four parts: short sums round less.
    Vec dD[4] = {}, dbias[4] = {};
    for (int64_t t = steps - 1; t >= 0; --t) {
      float* const step = tiles_.get() + t * kStepRow + block.lane;
      const Vec u = load(step + kU * kRow), dy = load(step + kDy * kRow);
      const Vec d_delta_u = load(step + kDDeltaU * kRow), raw = load(step + kRaw * kRow);
      Vec ddelta = load(step + kDDelta * kRow) * kLn2 + d_delta_u * u;
      if (p_.delta_softplus) ddelta = raw > 20.0f ? ddelta : ddelta * sigmoid(raw);
      if (before_ && before_[t0 + t] == ScanEvents::kPadding) ddelta = Vec{};
      dD[t % 4] += dy * u;
      dbias[t % 4] += ddelta;
      if (p_.z.data) {
        const Vec y = load(step + kY * kRow) + D * u;
        store(step + kGate * kRow, load(step + kGate * kRow) * y);
      }
      store(step + kDDeltaU * kRow, d_delta_u * load(step + kDelta * kRow) + D * dy);
      store(step + kDDelta * kRow, ddelta);
    }
    add((dD[0] + dD[1]) + (dD[2] + dD[3]), dD_ + block.lane);
    add((dbias[0] + dbias[1]) + (dbias[2] + dbias[3]), dbias_ + block.lane);
    write(g_.du, block, t0, steps, kDDeltaU);
    write(g_.ddelta, block, t0, steps, kDDelta);
    if (p_.z.data) write(g_.dz, block, t0, steps, kGate);
  }

  // Where this unit's sums of dB and dC over the channels are, for one state: a row of steps.
  int64_t slice_sums(int64_t state) const {
    return ((unit_.row * slices_per_row(p_) + unit_.slice) * n_ + state) * p_.length;
  }

  // Adds up the lanes of one slot's vector at each step.
  void sum_lanes(const float* from, int64_t steps, float* to) {
    for (int64_t t = 0; t < steps; t += kLanes, from += kLanes * kStepRow) {
      const int64_t now = std::min<int64_t>(kLanes, steps - t);
      Vec r[kLanes];
      for (int i = 0; i < kLanes; ++i) r[i] = i < now ? load(from + i * kStepRow) : Vec{};
      const Vec sums = sum_each(r);
      if (now == kLanes) {
        store(to + t, sums);
      } else {
        write_some<F32>(to + t, sums, static_cast<int>(now));
      }
    }
  }

  const ScanGradients& g_;
  const ScanParams& p_;
  const ScanUnit unit_;
  const Segment segment_;
  ScanCarry& carry_;
  const int32_t *before_, *after_;
  const int64_t n_, steps_, chunks_at_once_;
  int64_t staged_ = 0, staged_steps_ = 0;  // the steps that tiles_, B_ and C_ hold
  bool lines_spread_ = false, for_state_ = false;
  bool small_ = true;  // for the steps in tiles_, see decay_of
  Buffer A_, dA_, state_, dstate_;
  ProjectionTile B_, C_;
  Buffer dB_, dC_;
  Buffer& tiles_;
  Lines lines_;
  alignas(64) float D_[kRow], bias_[kRow], dD_[kRow] = {}, dbias_[kRow] = {}, deltas_[kRow] = {},
                                           most_A_[kRow];
};

}  // namespace

void scan_backward(const ScanGradients& g, const ScanEvents& events, ScanCarry& carry,
                   ScanPart part, int64_t begin, int64_t end) {
  const ScanParams& p = g.forward;
  Buffer tiles(Walk::tile_floats(p));
  for (int64_t i = begin; i < end; ++i) {
    if (i > begin) tiles.clear();
    if (part == ScanPart::kAll) {
      Walk(g, events, carry, scan_unit(p, i), {0, 0, p.length}, tiles).run();
      continue;
    }
    Walk walk(g, events, carry, scan_unit(p, 0), scan_segment(p, carry, i), tiles);
    part == ScanPart::kFirst&& i < carry.segments - 1 ? walk.run_for_state() : walk.run();
  }
  end_of_stream();
}

}  // namespace MAMBA_ISA
}  // namespace mamba
