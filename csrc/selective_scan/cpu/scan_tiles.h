// What the forward and the backward of the CPU scan share: one unit's inputs, tile by tile.
#pragma once

#include <memory>
#include <new>

#include "../../common/simd_tiles.h"
#include "scan.h"

namespace mamba {
namespace MAMBA_ISA {

constexpr int kTile = 32;  // steps that are staged at once
constexpr int kMaxBlocks = static_cast<int>(kSliceChannels) / kLanes;

// Zeroed memory aligned for whole vectors.
class Buffer {
 public:
  explicit Buffer(int64_t floats)
      : bytes_(sizeof(float) * static_cast<size_t>(floats + kLanes)),
        data_(static_cast<float*>(::operator new[](bytes_, std::align_val_t(64)))) {
    clear();
  }
  void clear() { std::memset(data_.get(), 0, bytes_); }
  float* get() { return data_.get(); }

 private:
  struct Free {
    void operator()(float* p) const { ::operator delete[](p, std::align_val_t(64)); }
  };
  size_t bytes_;
  std::unique_ptr<float[], Free> data_;
};

// Calls f(row, bytes) for each row of neighbouring elements in steps x channels of x from `offset`
// (in elements) on; for none if neither lie side by side.
template <class F>
inline void each_row(const TensorArg& x, int64_t offset, int64_t stride_c, int64_t stride_t,
                     int64_t channels, int64_t steps, F&& f) {
  const int64_t size = x.dtype == DType::kFloat32 ? 4 : 2;
  const bool channels_inside = stride_c == 1;
  if (!x.data || (!channels_inside && stride_t != 1)) return;
  const int64_t rows = channels_inside ? steps : channels;
  const int64_t bytes = (channels_inside ? channels : steps) * size;
  const int64_t stride = (channels_inside ? stride_t : stride_c) * size;
  const char* row = static_cast<const char*>(x.data) + offset * size;
  for (int64_t i = 0; i < rows; ++i, row += stride) f(row, bytes);
}

// The cache lines of tiles to come, asked for a few at each step of the loops that compute. A tile
// takes a line or two of many rows, which the processor does not foresee by itself; and asked for
// all at once they would hold up the computation, as a core waits for a dozen lines at most.
class Ahead {
 public:
  static constexpr int kTensors = 4;

  Ahead() { clear(); }
  void clear() { std::fill(lines_, lines_ + kTensors * kTile, reinterpret_cast<char*>(this)); }

  // Steps x channels of x from `offset` (in elements) on, as tensor number `slot`.
  void add(int slot, const TensorArg& x, int64_t offset, int64_t stride_c, int64_t stride_t,
           int64_t channels, int64_t steps) {
    int64_t line = slot;
    each_row(x, offset, stride_c, stride_t, channels, steps, [&](const char* row, int64_t bytes) {
      for (int64_t at = 0; at < bytes && line < kTensors * kTile; at += 64, line += kTensors) {
        lines_[line] = row + at;
      }
    });
  }

  MAMBA_INLINE void ask(int64_t step) const {
    const char* const* lines = lines_ + step % kTile * kTensors;
    for (int i = 0; i < kTensors; ++i) __builtin_prefetch(lines[i], 0, 2);
  }

 private:
  const char* lines_[kTensors * kTile];
};

// Whether tiles of a result go to memory around the caches, which saves reading the lines first:
// the tensor is too large to be found in them by whoever reads it next, and tiles are whole lines
// of it.
inline bool streams(const ScanParams& p, const TensorArg& x) {
  constexpr int64_t kLarge = int64_t{8} << 20;
  if (!kCanStream || !x.data || x.dtype != DType::kFloat32) return false;
  if (p.batch * p.channels * p.length * 4 < kLarge) return false;
  const int64_t across = x.stride[2] == 1 ? x.stride[1] : x.stride[2];
  const bool whole = x.stride[1] == 1 || x.stride[2] == 1;
  return whole && (reinterpret_cast<uintptr_t>(x.data) | x.stride[0] * 4 | across * 4) % 64 == 0;
}

// B or C of one unit. Variable: value(t) is n numbers for step t of the tile, shared by all
// channels. Constant: value is n vectors of kLanes for each block of channels.
class ProjectionTile {
 public:
  ProjectionTile(const ScanParams& p, const ScanUnit& unit, const TensorArg& x, bool constant,
                 int64_t steps)
      : x_(x),
        n_(p.state_dim),
        constant_(constant),
        values_(constant ? kMaxBlocks * n_ * kLanes : steps * n_) {
    if (!constant) {
      offset_ = unit.row * x.stride[0] + unit.group * x.stride[1];
      return;
    }
    for (int64_t c = 0; c < unit.channels; ++c) {
      for (int64_t s = 0; s < n_; ++s) {
        values_.get()[((c / kLanes) * n_ + s) * kLanes + c % kLanes] =
            load_float(x.data, x.dtype, (unit.channel + c) * x.stride[0] + s * x.stride[1]);
      }
    }
  }

  // Stages steps [t0, t0 + steps); at padding the values are 0.
  void stage(int64_t t0, int64_t steps, const int32_t* before) {
    if (constant_) return;
    for (int64_t s = 0; s < n_; s += kLanes) {
      const int count = static_cast<int>(std::min<int64_t>(kLanes, n_ - s));
      for (int64_t t = 0; t < steps; t += kTile) {
        const int now = static_cast<int>(std::min<int64_t>(kTile, steps - t));
        alignas(64) float tile[kTile * kLanes];
        const int64_t at = offset_ + s * x_.stride[2] + (t0 + t) * x_.stride[3];
        read_tile(x_, at, x_.stride[2], x_.stride[3], count, now, tile);
        float* to = values_.get() + t * n_ + s;
        for (int i = 0; i < now; ++i, to += n_) {
          if (count == kLanes) {
            store(to, load(tile + i * kLanes));
          } else {
            std::memcpy(to, tile + i * kLanes, sizeof(float) * static_cast<size_t>(count));
          }
        }
      }
    }
    for (int64_t t = 0; before && t < steps; ++t) {
      if (before[t0 + t] != ScanEvents::kPadding) continue;
      std::memset(values_.get() + t * n_, 0, sizeof(float) * n_);
    }
  }

  const float* at(int64_t t) { return values_.get() + t * n_; }
  const float* block(int b) { return values_.get() + b * n_ * kLanes; }

 private:
  const TensorArg& x_;
  int64_t n_, offset_ = 0;
  bool constant_;
  Buffer values_;
};

// One value of B or C, for all lanes: a number of the step, or a vector of the block.
template <bool kConstant>
MAMBA_INLINE Vec projection(const float* p, int s) {
  if constexpr (kConstant) {
    return load(p + s * kLanes);
  } else {
    return broadcast(p[s]);
  }
}

// A as n vectors for each block of a unit, times `factor`.
inline void stage_A(const ScanParams& p, const ScanUnit& unit, float factor, float* A) {
  for (int64_t c = 0; c < unit.channels; ++c) {
    for (int64_t s = 0; s < p.state_dim; ++s) {
      A[((c / kLanes) * p.state_dim + s) * kLanes + c % kLanes] =
          factor *
          load_float(p.A.data, p.A.dtype, (unit.channel + c) * p.A.stride[0] + s * p.A.stride[1]);
    }
  }
}

// With AVX-512, which has instructions for the whole range, exp2_small takes no less time.
constexpr bool kSmallPays = kLanes < 16;

// exp2(delta A); kSmall where |delta A| <= kSmallExponent at every step at hand.
template <bool kSmall>
MAMBA_INLINE Vec decay_of(Vec delta, Vec A) {
  return kSmall ? exp2_small(delta, A) : exp2(delta * A);
}

// The largest |A| of each channel among n vectors `pitch` floats apart; infinity for a NaN.
inline Vec largest_A(const float* A, int64_t n, int64_t pitch) {
  Vec most{};
  for (int64_t s = 0; s < n; ++s) {
    const Vec a = absolute(load(A + s * pitch));
    most = a <= most ? most : (a == a ? a : broadcast(__builtin_inff()));
  }
  return most;
}

// Whether |delta A| <= kSmallExponent at all steps of a tile.
inline bool are_small(const float* delta, int64_t steps, int64_t pitch, Vec most_A) {
  if (!kSmallPays) return false;
  VecI small = VecI{} - 1;
  for (int64_t t = 0; t < steps; ++t) {
    small &= absolute(load(delta + t * pitch)) * most_A <= kSmallExponent;
  }
  int32_t all = -1;
  for (int lane = 0; lane < kLanes; ++lane) all &= small[lane];
  return all != 0;
}

// kLanes channels of a (d,) vector, 0 without one.
inline Vec stage_row(const TensorArg& x, int64_t channel, int count) {
  float lanes[kLanes] = {};
  if (x.data) {
    for (int c = 0; c < count; ++c)
      lanes[c] = load_float(x.data, x.dtype, (channel + c) * x.stride[0]);
  }
  return load(lanes);
}

// A block's states, n vectors `pitch` floats apart, from and to a contiguous (d, n) matrix at the
// block's first channel.
inline void read_states(const float* from, int64_t n, int count, float* to,
                        int64_t pitch = kLanes) {
  read_tile_as<F32>(from, n, 1, count, static_cast<int>(n), to, pitch);
}
inline void write_states(const float* from, int64_t n, int count, float* to,
                         int64_t pitch = kLanes) {
  write_tile_as<F32>(to, n, 1, count, static_cast<int>(n), from, pitch);
}

// raw <- delta + bias; delta <- softplus of it if asked; 0 at padding.
inline void finish_delta(const ScanParams& p, Vec bias, const int32_t* before, int64_t steps,
                         float* raw, float* delta, int64_t pitch = kLanes) {
  for (int64_t t = 0; t < steps; ++t) {
    const Vec x = load(raw + t * pitch) + bias;
    const bool padding = before && before[t] == ScanEvents::kPadding;
    store(raw + t * pitch, padding ? Vec{} : x);
    const Vec value = p.delta_softplus ? softplus(x) : x;
    store(delta + t * pitch, padding ? Vec{} : value);
  }
}

// Zeros the padded steps of a tile.
inline void clear_padding(const int32_t* before, int64_t steps, float* tile,
                          int64_t pitch = kLanes) {
  if (!before) return;
  for (int64_t t = 0; t < steps; ++t) {
    if (before[t] == ScanEvents::kPadding) store(tile + t * pitch, Vec{});
  }
}

// The end of the stretch of steps that starts at t and holds no event inside.
inline int64_t stretch_end(const int32_t* before, const int32_t* after, int64_t t, int64_t end) {
  if (!before) return end;
  for (; t < end; ++t) {
    if (after[t] >= 0) return t + 1;
    if (t + 1 < end && (before[t + 1] >= 0 || before[t + 1] == ScanEvents::kFreshStart)) {
      return t + 1;
    }
  }
  return end;
}

// The beginning, from t0 on, of the stretch that ends at t0 + end and holds no event inside; both
// relative to t0.
inline int64_t stretch_begin(const int32_t* before, const int32_t* after, int64_t t0, int64_t end) {
  if (!before) return 0;
  int64_t begin = end - 1;
  while (begin > 0 && !restarts(before, t0 + begin) && after[t0 + begin - 1] < 0) --begin;
  return begin;
}

// Steps of one unit that are walked in one go.
struct Segment {
  int64_t index, begin, end;
};

inline Segment scan_segment(const ScanParams& p, const ScanCarry& carry, int64_t index) {
  const int64_t begin = index * carry.steps;
  return {index, begin, std::min(begin + carry.steps, p.length)};
}

// state <- carried behind a segment, from `state` before it, for kLanes channels and n states
// `pitch` floats apart; A is times log2(e).
inline void carry_over(Vec delta, const float* A, const float* behind, int64_t n, float* state,
                       int64_t pitch) {
  for (int64_t s = 0; s < n; ++s) {
    const Vec h = load(state + s * pitch);
    // In two factors: one might overflow where the product with a small state does not.
    const Vec root = exp2(delta * load(A + s * pitch) * 0.5f);
    store(state + s * pitch, load(behind + s * pitch) + (h == 0.0f ? Vec{} : h * root * root));
  }
}

inline bool restarts_within(const int32_t* before, const Segment& segment) {
  for (int64_t t = segment.begin; before && t < segment.end; ++t) {
    if (restarts(before, t)) return true;
  }
  return false;
}

}  // namespace MAMBA_ISA
}  // namespace mamba
