// The convolution for a few new inputs: decoding.
#include "conv.h"
#include "conv_window.h"

namespace mamba {
namespace MAMBA_ISA {
namespace {

// Four neighbouring floats whatever the instruction set: the columns of one channel of the cache.
typedef float Four __attribute__((vector_size(16)));

MAMBA_INLINE Four load_four(const float* p) {
  Four v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

// The sums of a, b, c and d.
MAMBA_INLINE Four sums_of(Four a, Four b, Four c, Four d) {
  typedef int32_t Order __attribute__((vector_size(16)));
#if defined(__clang__)
#define MAMBA_SHUFFLE(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
  (void)sizeof(Order);
#else
#define MAMBA_SHUFFLE(x, y, ...) __builtin_shuffle(x, y, Order{__VA_ARGS__})
#endif
  const Four ab = MAMBA_SHUFFLE(a, b, 0, 4, 1, 5) + MAMBA_SHUFFLE(a, b, 2, 6, 3, 7);
  const Four cd = MAMBA_SHUFFLE(c, d, 0, 4, 1, 5) + MAMBA_SHUFFLE(c, d, 2, 6, 3, 7);
  return MAMBA_SHUFFLE(ab, cd, 0, 1, 4, 5) + MAMBA_SHUFFLE(ab, cd, 2, 3, 6, 7);
#undef MAMBA_SHUFFLE
}

// Finishes `count` channels of one step: bias, activation, output.
MAMBA_INLINE void finish(const ConvUpdateParams& p, int64_t row, int64_t begin, int64_t count,
                         int64_t step, float* sums, float* scratch) {
  if (p.bias.data) {
    read_row(p.bias, begin * p.bias.stride[0], p.bias.stride[0], count, scratch);
  } else {
    fill(scratch, 0.0f, whole_lanes(count));
  }
  for (int64_t c = 0; c < count; c += kLanes) {
    Vec v = load(sums + c) + load(scratch + c);
    if (p.silu) v = silu(v);
    store(sums + c, v);
  }
  const int64_t offset = row * p.out.stride[0] + begin * p.out.stride[1] + step * p.out.stride[2];
  write_row(p.out, offset, p.out.stride[1], count, sums);
}

// Where the columns of neighbouring channels follow each other in memory.
MAMBA_INLINE bool is_dense(const TensorArg& t, int64_t channel_stride, int64_t column_stride) {
  return channel_stride == 4 && column_stride == 1 && t.data;
}

// The usual cache: width 4 and four columns, one step. Rows of four floats, no gathers.
void update_four(const ConvUpdateParams& p, int64_t row, int64_t begin, int64_t count,
                 float* scratch) {
  float* const sums = scratch;
  float* const x = sums + kUpdateBlock;
  float* state = x + kUpdateBlock;
  const float* taps = state + 4 * kUpdateBlock;
  const int64_t state_offset = p.rows[row] * p.state.stride[0] + begin * 4;
  const bool in_place = p.state.dtype == DType::kFloat32;
  if (in_place) {
    state = static_cast<float*>(p.state.data) + state_offset;
  } else {
    read_row(p.state, state_offset, 1, 4 * count, state);
  }
  if (p.weight.dtype == DType::kFloat32) {
    taps = static_cast<const float*>(p.weight.data) + begin * 4;
  } else {
    read_row(p.weight, begin * 4, 1, 4 * count, const_cast<float*>(taps));
  }
  read_row(p.x, row * p.x.stride[0] + begin * p.x.stride[1], p.x.stride[1], count, x);
  const auto advance = [&](int64_t c) {
    const Four old = load_four(state + 4 * c);
    const Four now = Four{old[1], old[2], old[3], x[c]};
    std::memcpy(state + 4 * c, &now, sizeof(now));
    return now * load_four(taps + 4 * c);
  };
  int64_t c = 0;
  for (; c + 4 <= count; c += 4) {
    const Four a = advance(c), b = advance(c + 1), d = advance(c + 2), e = advance(c + 3);
    const Four v = sums_of(a, b, d, e);
    std::memcpy(sums + c, &v, sizeof(v));
  }
  for (; c < count; ++c) {
    const Four v = advance(c);
    sums[c] = (v[0] + v[2]) + (v[1] + v[3]);
  }
  if (!in_place) write_row(p.state, state_offset, 1, 4 * count, state);
  finish(p, row, begin, count, 0, sums, x);
}

// Any width, number of steps, strides, ring buffer: one row of scratch for each input of a window.
void update_any(const ConvUpdateParams& p, int64_t row, int64_t begin, int64_t count,
                float* scratch) {
  const int64_t last = p.width - 1, size = p.columns;
  float* const sums = scratch;
  float* const taps = sums + kUpdateBlock;
  float* const inputs = taps + kUpdateBlock;  // last + length rows
  const TensorArg& t = p.state;
  const int64_t offset = p.rows[row] * t.stride[0] + begin * t.stride[1];
  const bool ring = p.start && size > 0;
  const int64_t start = ring ? p.start[row] : 0;
  const auto state_at = [&](int64_t column) { return offset + column * t.stride[2]; };
  const auto input_row = [&](int64_t i) { return inputs + i * kUpdateBlock; };

  for (int64_t k = 0; k < last; ++k) {
    // Neither term is below -size: the window is never longer than the buffer.
    const int64_t column = ring ? (start - last + k + size) % size : size - last + k;
    read_row(t, state_at(column), t.stride[1], count, input_row(k));
  }
  for (int64_t i = 0; i < p.length; ++i) {
    const int64_t at = row * p.x.stride[0] + begin * p.x.stride[1] + i * p.x.stride[2];
    read_row(p.x, at, p.x.stride[1], count, input_row(last + i));
  }
  if (ring) {
    const int64_t first = p.length > size ? p.length - size : 0;  // older ones are overwritten
    for (int64_t i = first; i < p.length; ++i) {
      write_row(t, state_at((start + i) % size), t.stride[1], count, input_row(last + i));
    }
  } else {
    for (int64_t k = 0; k < size; ++k) {
      const int64_t from = k + p.length;  // in (old state, x)
      if (from >= size) {
        write_row(t, state_at(k), t.stride[1], count, input_row(last + from - size));
      } else {
        read_row(t, state_at(from), t.stride[1], count, sums);
        write_row(t, state_at(k), t.stride[1], count, sums);
      }
    }
  }
  for (int64_t i = 0; i < p.length; ++i) {
    fill(sums, 0.0f, whole_lanes(count));
    for (int64_t k = 0; k <= last; ++k) {
      read_row(p.weight, begin * p.weight.stride[0] + k * p.weight.stride[1], p.weight.stride[0],
               count, taps);
      for (int64_t c = 0; c < count; c += kLanes) {
        store(sums + c, load(sums + c) + load(taps + c) * load(input_row(i + k) + c));
      }
    }
    finish(p, row, begin, count, i, sums, taps);
  }
}

}  // namespace

void conv_update(const ConvUpdateParams& p, int64_t row, int64_t begin, int64_t end,
                 float* scratch) {
  const int64_t count = end - begin;
  if (p.rows[row] < 0) {
    fill(scratch, 0.0f, kUpdateBlock);
    for (int64_t i = 0; i < p.length; ++i) {
      const int64_t at = row * p.out.stride[0] + begin * p.out.stride[1] + i * p.out.stride[2];
      write_row(p.out, at, p.out.stride[1], count, scratch);
    }
    return;
  }
  const bool four = p.width == 4 && p.columns == 4 && p.length == 1 && !p.start &&
                    is_dense(p.state, p.state.stride[1], p.state.stride[2]) &&
                    is_dense(p.weight, p.weight.stride[0], p.weight.stride[1]);
  if (four) {
    update_four(p, row, begin, count, scratch);
  } else {
    update_any(p, row, begin, count, scratch);
  }
}

}  // namespace MAMBA_ISA
}  // namespace mamba
