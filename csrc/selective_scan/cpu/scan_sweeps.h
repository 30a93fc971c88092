// The backward's two sweeps over the steps of a chunk, for a few blocks of channels at once.
#pragma once

#include <vector>

#include "scan_tiles.h"

namespace mamba {
namespace MAMBA_ISA {

// Vectors of states (blocks x states) that stay in registers at once; each also needs a register
// for dA.
constexpr int kRegisterVectors = kLanes == 16 ? 8 : 4;

// A slice's states are rows of this many floats, blocks side by side; so are the numbers of a step,
// each in a slot of this size.
constexpr int64_t kRow = kSliceChannels;

// All that the sweeps touch at a step lies in one row of slots, each row two slots further on
// modulo a page of 4096 bytes. For to the processor a load that agrees with a store still under way
// in the lowest 12 bits of the address looks like one that depends on it, and waits; with these
// places no load agrees with a store of the few steps before it, in either direction of time. Rows
// 16 apart fill the first cache's sets evenly.
enum Slot : int64_t {
  kDelta = 0,
  kDy = 1,
  kDeltaU = 2,
  kY = 3,
  kDDelta = 4,
  kDDeltaU = 5,
  kSums = 6,  // for dB and dC, [B, C][s][lane]: up to four slots
  kU = 10,
  kRaw = 11,
  kHistory = 12,  // [block][s][2][lane]: what is left of the state before the step, and the decay
  kGate = 16,     // the gradient of z over y
  kSlots = 18
};
constexpr int64_t kStepRow = kSlots * kRow;
static_assert(2 * kRegisterVectors * kLanes <= 4 * kRow, "sums and history fit their slots");

// The cache lines of a chunk's gradients and of the next chunk's inputs, asked for a few at every
// step of the sweeps (see Ahead).
class Lines {
 public:
  void clear() { lines_.clear(); }

  // Steps x channels of x from `offset` (in elements) on.
  void add(const TensorArg& x, int64_t offset, int64_t stride_c, int64_t stride_t, int64_t channels,
           int64_t steps) {
    each_row(x, offset, stride_c, stride_t, channels, steps,
             [&](const char* row, int64_t bytes) { add(row, bytes); });
  }

  void add(const void* p, int64_t bytes) {
    const size_t begin = lines_.size();
    lines_.resize(begin + static_cast<size_t>((bytes + 63) / 64));
    const char* line = static_cast<const char*>(p);
    for (size_t i = begin; i < lines_.size(); ++i, line += 64) lines_[i] = line;
  }

  // To be called when all is added, with the number of steps to come.
  void spread(int64_t steps) {
    const int64_t count = static_cast<int64_t>(lines_.size());
    each = static_cast<int>((count + steps - 1) / steps);
    lines_.resize(static_cast<size_t>(each * steps), count ? lines_[0] : nullptr);
    next = lines_.data();
  }

  const char* const* next = nullptr;
  int each = 0;  // to ask for at every step

 private:
  std::vector<const char*> lines_;
};

// The arguments of a sweep for kBlocks x kStates vectors, from the first of them on. By value:
// behind a pointer, any store of a vector might change them.
struct Sweep {
  float* steps;  // [t][slot][channel]
  int64_t lane;  // of the first channel; the sums are shared by all
  const float* A;
  float *state, *dstate, *dA;  // [s][channel]
  const float *B, *C;          // [t][n], or [block][n][lane] when constant
  int64_t n;
  float *dB, *dC;  // [s][channel], of a constant only
  Lines* lines;
};

template <bool kConstant>
MAMBA_INLINE Vec projected(const float* p, int64_t n, int b, int s) {
  if constexpr (kConstant) {
    return load(p + (b * n + s) * kLanes);
  } else {
    return broadcast(p[s]);
  }
}

MAMBA_INLINE void add(Vec x, float* to) { store(to, load(to) + x); }

template <int kBlocks, int kStates, bool kConstantB, bool kConstantC, bool kSmall>
void sweep_forward(const Sweep in, int64_t begin, int64_t end, bool want_y) {
  Vec h[kBlocks][kStates], A[kBlocks][kStates];
#pragma GCC unroll 8
  for (int b = 0; b < kBlocks; ++b) {
#pragma GCC unroll 8
    for (int s = 0; s < kStates; ++s) {
      h[b][s] = load(in.state + s * kRow + b * kLanes);
      A[b][s] = load(in.A + s * kRow + b * kLanes);
    }
  }
  const char* const* ahead = in.lines->next;
  const int each = in.lines->each;
  for (int64_t t = begin; t < end; ++t) {
    for (int i = 0; i < each; ++i) __builtin_prefetch(*ahead++, 0, 2);
    float* const step = in.steps + t * kStepRow;
    float* history = step + kHistory * kRow;
    const float* const B = kConstantB ? in.B : in.B + t * in.n;
    const float* const C = kConstantC ? in.C : in.C + t * in.n;
#pragma GCC unroll 8
    for (int b = 0; b < kBlocks; ++b) {
      const Vec delta = load(step + kDelta * kRow + b * kLanes);
      const Vec delta_u = load(step + kDeltaU * kRow + b * kLanes);
#pragma GCC unroll 8
      for (int s = 0; s < kStates; ++s, history += 2 * kLanes) {
        const Vec decay = decay_of<kSmall>(delta, A[b][s]);
        const Vec left = decay * h[b][s];
        store(history, left);
        store(history + kLanes, decay);
        h[b][s] = left + delta_u * projected<kConstantB>(B, in.n, b, s);
      }
      if (!want_y) continue;
      Vec y = load(step + kY * kRow + b * kLanes);
#pragma GCC unroll 8
      for (int s = 0; s < kStates; ++s) y += h[b][s] * projected<kConstantC>(C, in.n, b, s);
      store(step + kY * kRow + b * kLanes, y);
    }
  }
  in.lines->next = ahead;
#pragma GCC unroll 8
  for (int b = 0; b < kBlocks; ++b) {
#pragma GCC unroll 8
    for (int s = 0; s < kStates; ++s) store(in.state + s * kRow + b * kLanes, h[b][s]);
  }
}

// A slice of whole 16-lane blocks has one group of them, whose sums need no memory to be added to.
constexpr bool kOneGroup = kLanes == 16;

template <int kBlocks, int kStates, bool kConstantB, bool kConstantC>
void sweep_backward(const Sweep in, int64_t begin, int64_t end) {
  // Sums over time are of this stretch only, then added to the total: two levels round less.
  Vec dh[kBlocks][kStates], dA[kBlocks][kStates];
  Vec constant_dB[kBlocks][kStates], constant_dC[kBlocks][kStates];
#pragma GCC unroll 8
  for (int b = 0; b < kBlocks; ++b) {
#pragma GCC unroll 8
    for (int s = 0; s < kStates; ++s) {
      dh[b][s] = load(in.dstate + s * kRow + b * kLanes);
      dA[b][s] = constant_dB[b][s] = constant_dC[b][s] = Vec{};
    }
  }
  const char* const* ahead = in.lines->next;
  const int each = in.lines->each;
  for (int64_t t = end - 1; t >= begin; --t) {
    for (int i = 0; i < each; ++i) __builtin_prefetch(*ahead++, 0, 2);
    float* const step = in.steps + t * kStepRow;
    const float* history = step + kHistory * kRow;
    const float* const B = kConstantB ? in.B : in.B + t * in.n;
    const float* const C = kConstantC ? in.C : in.C + t * in.n;
    Vec dB[kStates], dC[kStates];
#pragma GCC unroll 8
    for (int b = 0; b < kBlocks; ++b) {
      const Vec delta = load(step + kDelta * kRow + b * kLanes);
      const Vec delta_u = load(step + kDeltaU * kRow + b * kLanes);
      const Vec dy = load(step + kDy * kRow + b * kLanes);
      Vec d_delta = load(step + kDDelta * kRow + b * kLanes);
      Vec d_delta_u = load(step + kDDeltaU * kRow + b * kLanes);
#pragma GCC unroll 8
      for (int s = 0; s < kStates; ++s, history += 2 * kLanes) {
        const Vec b_value = projected<kConstantB>(B, in.n, b, s);
        const Vec left = load(history), after = left + delta_u * b_value;
        dh[b][s] += projected<kConstantC>(C, in.n, b, s) * dy;
        d_delta_u += dh[b][s] * b_value;
        const Vec through = dh[b][s] * left;
        dA[b][s] += through * delta;
        d_delta += through * load(in.A + s * kRow + b * kLanes);
        if constexpr (kConstantB) {
          constant_dB[b][s] += dh[b][s] * delta_u;
        } else {
          dB[s] = b ? dB[s] + dh[b][s] * delta_u : dh[b][s] * delta_u;
        }
        if constexpr (kConstantC) {
          constant_dC[b][s] += after * dy;
        } else {
          dC[s] = b ? dC[s] + after * dy : after * dy;
        }
        dh[b][s] *= load(history + kLanes);
      }
      store(step + kDDelta * kRow + b * kLanes, d_delta);
      store(step + kDDeltaU * kRow + b * kLanes, d_delta_u);
    }
#pragma GCC unroll 8
    for (int s = 0; s < kStates; ++s) {
      float* const sums = step - in.lane + kSums * kRow + s * kLanes;
      if (!kConstantB) kOneGroup ? store(sums, dB[s]) : add(dB[s], sums);
      float* const sums_C = sums + kStates * kLanes;
      if (!kConstantC) kOneGroup ? store(sums_C, dC[s]) : add(dC[s], sums_C);
    }
  }
  in.lines->next = ahead;
#pragma GCC unroll 8
  for (int b = 0; b < kBlocks; ++b) {
#pragma GCC unroll 8
    for (int s = 0; s < kStates; ++s) {
      store(in.dstate + s * kRow + b * kLanes, dh[b][s]);
      add(dA[b][s], in.dA + s * kRow + b * kLanes);
      if (kConstantB) add(constant_dB[b][s], in.dB + s * kRow + b * kLanes);
      if (kConstantC) add(constant_dC[b][s], in.dC + s * kRow + b * kLanes);
    }
  }
}

// The backward sweep of kStates vectors for the adjoint state alone.
template <int kStates, bool kConstantC, bool kSmall = false>
void sweep_adjoint(const Sweep in, int64_t begin, int64_t end) {
  Vec dh[kStates], A[kStates];
#pragma GCC unroll 8
  for (int s = 0; s < kStates; ++s) {
    dh[s] = load(in.dstate + s * kRow);
    A[s] = load(in.A + s * kRow);
  }
  for (int64_t t = end - 1; t >= begin; --t) {
    const float* const step = in.steps + t * kStepRow;
    const float* const C = kConstantC ? in.C : in.C + t * in.n;
    const Vec delta = load(step + kDelta * kRow), dy = load(step + kDy * kRow);
#pragma GCC unroll 8
    for (int s = 0; s < kStates; ++s) {
      dh[s] = (dh[s] + projected<kConstantC>(C, in.n, 0, s) * dy) * decay_of<kSmall>(delta, A[s]);
    }
  }
#pragma GCC unroll 8
  for (int s = 0; s < kStates; ++s) store(in.dstate + s * kRow, dh[s]);
}

}  // namespace MAMBA_ISA
}  // namespace mamba
