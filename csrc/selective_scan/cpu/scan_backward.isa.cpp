#include "scan_tiles.h"

namespace mamba {
namespace MAMBA_ISA {
namespace {

// States of a block that stay in registers at once; each also needs a register for dA.
constexpr int kRegisterStates = kLanes == 16 ? 8 : 4;

struct Block {
  int64_t channel;
  int count;
};

// One block's staged chunk. Tiles are [t][lane]; B and C [t][n], or n vectors when constant.
struct Steps {
  const float *delta, *delta_u, *dy;
  float *y, *d_delta, *d_delta_u;
  const float *B, *C;
  float *dB, *dC;  // [t][n][lane], or [n][lane] when constant
  int64_t n;
  const Ahead *outputs, *inputs;  // of this chunk, and of the next one to come
};

// What the forward sweep leaves for the backward one, for kStates states: [t][s][lane].
struct History {
  float* decayed;  // what is left at step t of the state before it
  float* decay;
};

template <int kStates, bool kConstantB, bool kConstantC>
void sweep_forward(const Steps& in, const float* A, float* state, int64_t first, int64_t begin,
                   int64_t end, const History& history, bool want_y) {
  Vec h[kStates];
#pragma GCC unroll 8
  for (int s = 0; s < kStates; ++s) h[s] = load(state + (first + s) * kLanes);
  for (int64_t t = begin; t < end; ++t) {
    if (first == 0) in.outputs->ask(t);
    const Vec delta = load(in.delta + t * kLanes), delta_u = load(in.delta_u + t * kLanes);
    const float* B = kConstantB ? in.B + first * kLanes : in.B + t * in.n + first;
    const float* C = kConstantC ? in.C + first * kLanes : in.C + t * in.n + first;
    float* const decayed = history.decayed + t * kStates * kLanes;
    float* const decays = history.decay + t * kStates * kLanes;
    Vec y = Vec{};
#pragma GCC unroll 8
    for (int s = 0; s < kStates; ++s) {
      const Vec decay = exp2(delta * load(A + (first + s) * kLanes));
      const Vec left = decay * h[s];
      store(decayed + s * kLanes, left);
      store(decays + s * kLanes, decay);
      h[s] = left + delta_u * projection<kConstantB>(B, s);
      if (want_y) y += h[s] * projection<kConstantC>(C, s);
    }
    if (want_y) store(in.y + t * kLanes, load(in.y + t * kLanes) + y);
  }
#pragma GCC unroll 8
  for (int s = 0; s < kStates; ++s) store(state + (first + s) * kLanes, h[s]);
}

// Adds to memory, or to a register.
template <bool kInRegister>
MAMBA_INLINE void add(Vec x, float* memory, Vec* in_register) {
  if constexpr (kInRegister) {
    *in_register += x;
  } else {
    store(memory, load(memory) + x);
  }
}

template <int kStates, bool kConstantB, bool kConstantC>
void sweep_backward(const Steps& in, const float* A, float* dstate, float* dA, int64_t first,
                    int64_t begin, int64_t end, const History& history) {
  // Sums over time are of this stretch only, then added to the total: two levels round less.
  Vec dh[kStates], dA_sum[kStates], dB_sum[kStates], dC_sum[kStates];
#pragma GCC unroll 8
  for (int s = 0; s < kStates; ++s) {
    dh[s] = load(dstate + (first + s) * kLanes);
    dA_sum[s] = dB_sum[s] = dC_sum[s] = Vec{};
  }
  for (int64_t t = end - 1; t >= begin; --t) {
    if (first == 0) in.inputs->ask(t);
    const Vec delta = load(in.delta + t * kLanes), delta_u = load(in.delta_u + t * kLanes);
    const Vec dy = load(in.dy + t * kLanes);
    const float* B = kConstantB ? in.B + first * kLanes : in.B + t * in.n + first;
    const float* C = kConstantC ? in.C + first * kLanes : in.C + t * in.n + first;
    float* const dB = in.dB + (t * in.n + first) * kLanes;
    float* const dC = in.dC + (t * in.n + first) * kLanes;
    const float* const decayed = history.decayed + t * kStates * kLanes;
    const float* const decays = history.decay + t * kStates * kLanes;
    Vec d_delta = Vec{}, d_delta_u = Vec{};
#pragma GCC unroll 8
    for (int s = 0; s < kStates; ++s) {
      const Vec b = projection<kConstantB>(B, s), c = projection<kConstantC>(C, s);
      const Vec left = load(decayed + s * kLanes), after = left + delta_u * b;
      dh[s] += c * dy;
      add<kConstantC>(after * dy, dC + s * kLanes, dC_sum + s);
      add<kConstantB>(dh[s] * delta_u, dB + s * kLanes, dB_sum + s);
      d_delta_u += dh[s] * b;
      const Vec through = dh[s] * left;
      dA_sum[s] += through * delta;
      d_delta += through * load(A + (first + s) * kLanes);
      dh[s] *= load(decays + s * kLanes);
    }
    store(in.d_delta + t * kLanes, load(in.d_delta + t * kLanes) + d_delta * kLn2);
    store(in.d_delta_u + t * kLanes, load(in.d_delta_u + t * kLanes) + d_delta_u);
  }
#pragma GCC unroll 8
  for (int s = 0; s < kStates; ++s) {
    store(dstate + (first + s) * kLanes, dh[s]);
    add<false>(dA_sum[s], dA + (first + s) * kLanes, nullptr);
    if (kConstantB) add<false>(dB_sum[s], in.dB + (first + s) * kLanes, nullptr);
    if (kConstantC) add<false>(dC_sum[s], in.dC + (first + s) * kLanes, nullptr);
  }
}

// One unit: a slice of channels of one row, chunk after chunk from the end.
class Walk {
 public:
  Walk(const ScanGradients& g, const ScanEvents& events, const ScanUnit& unit)
      : g_(g),
        p_(g.forward),
        unit_(unit),
        before_(events.row_before(unit.row)),
        after_(events.row_after(unit.row)),
        n_(p_.state_dim),
        steps_(std::min(p_.chunk_size, p_.length)),
        A_(kMaxBlocks * n_ * kLanes),
        dA_(kMaxBlocks * n_ * kLanes),
        dstate_(kMaxBlocks * n_ * kLanes),
        state_(n_ * kLanes),
        B_(p_, unit, p_.B, p_.constant_B, steps_),
        C_(p_, unit, p_.C, p_.constant_C, steps_),
        dB_((p_.constant_B ? kMaxBlocks : steps_) * n_ * kLanes),
        dC_((p_.constant_C ? kMaxBlocks : steps_) * n_ * kLanes),
        history_(2 * steps_ * kRegisterStates * kLanes),
        tiles_(kTiles * steps_ * kLanes) {
    stage_A(p_, unit, kLog2e, A_.get());
    if (g.dfinal_state && !before_) {
      for_each_block([&](int b, const Block& block) {
        read_states(state_at(g_.dfinal_state, unit_.row, block), n_, block.count, dstate(b));
      });
    }
  }

  void run() {
    for (int64_t chunk = p_.chunks - 1; chunk >= 0; --chunk) {
      const int64_t t0 = chunk * p_.chunk_size, steps = std::min(p_.chunk_size, p_.length - t0);
      B_.stage(t0, steps, before_);
      C_.stage(t0, steps, before_);
      for_each_block([&](int b, const Block& block) { this->chunk(b, block, chunk, t0, steps); });
      if (!p_.constant_B) sum_lanes(dB_.get(), g_.dB, t0, steps);
      if (!p_.constant_C) sum_lanes(dC_.get(), g_.dC, t0, steps);
    }
    for_each_block([&](int b, const Block& block) {
      const int64_t at = b * n_ * kLanes;
      write_states(dA_.get() + at, n_, block.count, state_at(g_.dA, unit_.row, block));
      if (p_.constant_B) {
        write_states(dB_.get() + at, n_, block.count, state_at(g_.dB, unit_.row, block));
      }
      if (p_.constant_C) {
        write_states(dC_.get() + at, n_, block.count, state_at(g_.dC, unit_.row, block));
      }
      if (g_.dinitial_state && !before_) {
        write_states(dstate(b), n_, block.count, state_at(g_.dinitial_state, unit_.row, block));
      }
      for (int c = 0; c < block.count; ++c) {
        const int64_t channel = unit_.row * p_.channels + block.channel + c;
        if (g_.dD) g_.dD[channel] = dD_[b * kLanes + c];
        if (g_.ddelta_bias) g_.ddelta_bias[channel] = dbias_[b * kLanes + c];
      }
    });
  }

 private:
  static constexpr int kTiles = 10;
  enum Tile { kU, kRaw, kDelta, kDeltaU, kDout, kDy, kY, kDDelta, kDDeltaU, kZ };

  float* tile(Tile which) { return tiles_.get() + which * steps_ * kLanes; }
  float* dstate(int b) { return dstate_.get() + b * n_ * kLanes; }

  template <class F>
  void for_each_block(F&& f) {
    for (int b = 0; b * kLanes < unit_.channels; ++b) {
      const int64_t left = unit_.channels - b * kLanes;
      f(b, Block{unit_.channel + b * kLanes, static_cast<int>(std::min<int64_t>(kLanes, left))});
    }
  }

  template <class T>
  T* state_at(T* states, int64_t index, const Block& block) const {
    return states + (index * p_.channels + block.channel) * n_;
  }

  int64_t offset(const TensorArg& x, const Block& block, int64_t t) const {
    return unit_.row * x.stride[0] + block.channel * x.stride[1] + t * x.stride[2];
  }

  void read(const TensorArg& x, const Block& block, int64_t t0, int64_t steps, float* to) {
    read_tile(x, offset(x, block, t0), x.stride[1], x.stride[2], block.count,
              static_cast<int>(steps), to);
  }
  void write(const TensorArg& x, const Block& block, int64_t t0, int64_t steps, const float* from) {
    write_tile(x, offset(x, block, t0), x.stride[1], x.stride[2], block.count,
               static_cast<int>(steps), from);
  }

  void stage(const Block& block, const int32_t* before, int64_t t0, int64_t steps) {
    read(p_.u, block, t0, steps, tile(kU));
    clear_padding(before, steps, tile(kU));
    read(p_.delta, block, t0, steps, tile(kRaw));
    const Vec bias = stage_row(p_.delta_bias, block.channel, block.count);
    finish_delta(p_, bias, before, steps, tile(kRaw), tile(kDelta));
    read(g_.dout, block, t0, steps, tile(kDout));
    clear_padding(before, steps, tile(kDout));
    if (p_.z.data) {
      read(p_.z, block, t0, steps, tile(kZ));
      clear_padding(before, steps, tile(kZ));
    }
    for (int64_t at = 0; at < steps * kLanes; at += kLanes) {
      const Vec dout = load(tile(kDout) + at);
      store(tile(kDy) + at, p_.z.data ? dout * silu(load(tile(kZ) + at)) : dout);
      store(tile(kDeltaU) + at, load(tile(kDelta) + at) * load(tile(kU) + at));
      store(tile(kY) + at, Vec{});
      store(tile(kDDelta) + at, Vec{});
      store(tile(kDDeltaU) + at, Vec{});
    }
  }

  void restart(int64_t t, const Block& block, float* h) {
    if (!restarts(before_, t)) return;
    if (before_[t] == ScanEvents::kFreshStart) {
      std::memset(h, 0, sizeof(float) * n_ * kLanes);
    } else {
      read_states(state_at(p_.initial_state, before_[t], block), n_, block.count, h);
    }
  }

  // A restart hands the gradient of the state to the initial state that it took.
  void end_of_sequence(int64_t t, const Block& block, float* dh, int64_t first, int64_t states) {
    if (!restarts(before_, t)) return;
    if (before_[t] >= 0 && g_.dinitial_state) {
      float* const to = state_at(g_.dinitial_state, before_[t], block);
      for (int c = 0; c < block.count; ++c) {
        for (int64_t s = first; s < first + states; ++s) to[c * n_ + s] += dh[s * kLanes + c];
      }
    }
    std::memset(dh + first * kLanes, 0, sizeof(float) * states * kLanes);
  }

  // A step that makes a final state also gets that one's gradient.
  void final_gradient(int64_t t, const Block& block, float* dh, int64_t first, int64_t states) {
    if (!after_ || after_[t] < 0 || !g_.dfinal_state) return;
    const float* const from = state_at(g_.dfinal_state, after_[t], block);
    for (int c = 0; c < block.count; ++c) {
      for (int64_t s = first; s < first + states; ++s) dh[s * kLanes + c] += from[c * n_ + s];
    }
  }

  template <int kStates, bool kConstantB, bool kConstantC>
  void states(const Steps& in, int b, const Block& block, int64_t first, int64_t t0,
              int64_t steps) {
    const History history{history_.get(), history_.get() + steps_ * kRegisterStates * kLanes};
    const float* const A = A_.get() + b * n_ * kLanes;
    for (int64_t t = 0; t < steps;) {
      restart(t0 + t, block, state_.get());
      const int64_t end = stretch_end(before_, after_, t0 + t, t0 + steps) - t0;
      sweep_forward<kStates, kConstantB, kConstantC>(in, A, state_.get(), first, t, end, history,
                                                     p_.z.data != nullptr);
      t = end;
    }
    for (int64_t end = steps; end > 0;) {
      int64_t begin = end - 1;
      if (!before_) begin = 0;
      while (begin > 0 && !restarts(before_, t0 + begin) && after_[t0 + begin - 1] < 0) --begin;
      final_gradient(t0 + end - 1, block, dstate(b), first, kStates);
      sweep_backward<kStates, kConstantB, kConstantC>(in, A, dstate(b), dA_.get() + b * n_ * kLanes,
                                                      first, begin, end, history);
      end_of_sequence(t0 + begin, block, dstate(b), first, kStates);
      end = begin;
    }
  }

  template <bool kConstantB, bool kConstantC>
  void all_states(const Steps& in, int b, const Block& block, int64_t chunk, int64_t t0,
                  int64_t steps) {
    // The forward sweep moves `state_` on, and a restart overwrites all of it: each group of states
    // starts anew from the chunk's own.
    const float* const entering = state_at(p_.chunk_states, unit_.row * p_.chunks + chunk, block);
    int64_t s = 0;
    const auto group = [&](auto count) {
      constexpr int kStates = decltype(count)::value;
      for (; s + kStates <= n_; s += kStates) {
        read_states(entering, n_, block.count, state_.get());
        states<kStates, kConstantB, kConstantC>(in, b, block, s, t0, steps);
      }
    };
    group(std::integral_constant<int, kRegisterStates>{});
    group(std::integral_constant<int, kRegisterStates / 2>{});
    group(std::integral_constant<int, 1>{});
  }

  // Lists where this chunk's gradients will go, and the inputs of the chunk before it.
  void look_ahead(const Block& block, int64_t t0, int64_t steps) {
    outputs_.clear();
    inputs_.clear();
    int slot = 0;
    for (const TensorArg* x : {&g_.du, &g_.ddelta, &g_.dz}) {
      outputs_.add(slot++, *x, offset(*x, block, t0), x->stride[1], x->stride[2], block.count,
                   steps);
    }
    const int64_t t = t0 - p_.chunk_size;
    if (t < 0) return;
    slot = 0;
    for (const TensorArg* x : {&p_.u, &p_.delta, &g_.dout, &p_.z}) {
      inputs_.add(slot++, *x, offset(*x, block, t), x->stride[1], x->stride[2], block.count,
                  p_.chunk_size);
    }
  }

  void chunk(int b, const Block& block, int64_t chunk, int64_t t0, int64_t steps) {
    const int32_t* before = before_ ? before_ + t0 : nullptr;
    stage(block, before, t0, steps);
    look_ahead(block, t0, steps);
    const int64_t at = b * n_ * kLanes;
    const Steps in{tile(kDelta),
                   tile(kDeltaU),
                   tile(kDy),
                   tile(kY),
                   tile(kDDelta),
                   tile(kDDeltaU),
                   p_.constant_B ? B_.block(b) : B_.at(0),
                   p_.constant_C ? C_.block(b) : C_.at(0),
                   dB_.get() + (p_.constant_B ? at : 0),
                   dC_.get() + (p_.constant_C ? at : 0),
                   n_,
                   &outputs_,
                   &inputs_};
    if (p_.constant_B) {
      p_.constant_C ? all_states<true, true>(in, b, block, chunk, t0, steps)
                    : all_states<true, false>(in, b, block, chunk, t0, steps);
    } else {
      p_.constant_C ? all_states<false, true>(in, b, block, chunk, t0, steps)
                    : all_states<false, false>(in, b, block, chunk, t0, steps);
    }
    finish(b, block, before, t0, steps);
  }

  // From the gradients of delta u and of the decays to those of the inputs.
  void finish(int b, const Block& block, const int32_t* before, int64_t t0, int64_t steps) {
    const Vec D = stage_row(p_.D, block.channel, block.count);
    // Of this chunk only, and in four parts: short sums round less.
    Vec dD[4] = {}, dbias[4] = {};
    for (int64_t at = (steps - 1) * kLanes; at >= 0; at -= kLanes) {
      const Vec u = load(tile(kU) + at), dy = load(tile(kDy) + at);
      const Vec d_delta_u = load(tile(kDDeltaU) + at), raw = load(tile(kRaw) + at);
      Vec ddelta = load(tile(kDDelta) + at) + d_delta_u * u;
      if (p_.delta_softplus) ddelta = raw > 20.0f ? ddelta : ddelta * sigmoid(raw);
      if (before && before[at / kLanes] == ScanEvents::kPadding) ddelta = Vec{};
      const int part = static_cast<int>(at / kLanes % 4);
      dD[part] += dy * u;
      dbias[part] += ddelta;
      if (p_.z.data) {
        const Vec z = load(tile(kZ) + at), s = sigmoid(z);
        const Vec y = load(tile(kY) + at) + D * u;
        store(tile(kZ) + at, load(tile(kDout) + at) * y * s * (1.0f + z * (1.0f - s)));
      }
      store(tile(kDDeltaU) + at, d_delta_u * load(tile(kDelta) + at) + D * dy);
      store(tile(kDDelta) + at, ddelta);
    }
    add<false>((dD[0] + dD[1]) + (dD[2] + dD[3]), dD_ + b * kLanes, nullptr);
    add<false>((dbias[0] + dbias[1]) + (dbias[2] + dbias[3]), dbias_ + b * kLanes, nullptr);
    write(g_.du, block, t0, steps, tile(kDDeltaU));
    write(g_.ddelta, block, t0, steps, tile(kDDelta));
    if (p_.z.data) write(g_.dz, block, t0, steps, tile(kZ));
  }

  // Adds up the lanes of [t][n][lane] into (n, l) at this unit's slice, and zeroes it.
  void sum_lanes(float* from, float* to, int64_t t0, int64_t steps) {
    to += (unit_.row * slices_per_row(p_) + unit_.slice) * n_ * p_.length + t0;
    for (int64_t s = 0; s < n_; s += kLanes) {
      const int states = static_cast<int>(std::min<int64_t>(kLanes, n_ - s));
      for (int64_t begin = 0; begin < steps; begin += kTile) {
        const int now = static_cast<int>(std::min<int64_t>(kTile, steps - begin));
        alignas(64) float sums[kTile * kLanes];
        for (int t = 0; t < now; ++t) {
          float* const rows = from + ((begin + t) * n_ + s) * kLanes;
          Vec r[kLanes];
          for (int i = 0; i < kLanes; ++i) r[i] = i < states ? load(rows + i * kLanes) : Vec{};
          store(sums + t * kLanes, sum_each(r));
          std::memset(rows, 0, sizeof(float) * static_cast<size_t>(states) * kLanes);
        }
        write_tile_as<F32>(to + s * p_.length + begin, p_.length, 1, states, now, sums);
      }
    }
  }

  const ScanGradients& g_;
  const ScanParams& p_;
  const ScanUnit unit_;
  const int32_t *before_, *after_;
  const int64_t n_, steps_;
  Buffer A_, dA_, dstate_, state_;
  ProjectionTile B_, C_;
  Buffer dB_, dC_, history_, tiles_;
  Ahead outputs_, inputs_;
  alignas(64) float dD_[kSliceChannels] = {}, dbias_[kSliceChannels] = {};
};

}  // namespace

void scan_backward(const ScanGradients& g, const ScanEvents& events, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) Walk(g, events, scan_unit(g.forward, i)).run();
}

}  // namespace MAMBA_ISA
}  // namespace mamba
