// The convolution vectorised over the steps of one channel: any strides, any width.
#include "conv.h"
#include "conv_window.h"

namespace mamba {
namespace MAMBA_ISA {
namespace {

// One channel of one piece. W is the width, or 0 where it is known at run time only.
template <int W>
struct Channel {
  const ConvParams& p;
  const ConvPiece& piece;
  const int64_t channel;
  float* const taps;  // width floats
  float bias = 0.0f;

  MAMBA_INLINE Channel(const ConvParams& p, const ConvPiece& piece, int64_t channel, float* taps)
      : p(p), piece(piece), channel(channel), taps(taps) {
    for (int64_t k = 0; k < p.width; ++k) {
      taps[k] = read_one(p.weight, channel * p.weight.stride[0] + k * p.weight.stride[1]);
    }
    if (p.bias.data) bias = read_one(p.bias, channel * p.bias.stride[0]);
  }

  MAMBA_INLINE int64_t width() const { return W ? W : p.width; }
  MAMBA_INLINE int64_t offset(const TensorArg& t, int64_t step) const {
    return piece.batch * t.stride[0] + channel * t.stride[1] + step * t.stride[2];
  }

  // x of the piece with the width - 1 inputs before it, then those of the steps after it if asked
  // for, then zeros to whole vectors.
  MAMBA_INLINE void read_inputs(float* to, bool with_after) const {
    const int64_t last = width() - 1;
    for (int64_t k = 0; k < last; ++k) {
      to[k] = input_at(p, piece, channel, p.sources[piece.before + k]);
    }
    to += last;
    read_row(p.x, offset(p.x, piece.start), p.x.stride[2], piece.length, to);
    read_after(p.x, to, with_after ? piece.num_after : 0);
  }

  MAMBA_INLINE void read_after(const TensorArg& t, float* to, int64_t count) const {
    for (int64_t k = 0; k < count; ++k) {
      to[piece.length + k] = read_one(t, offset(t, p.sources[piece.after + k]));
    }
    fill(to + piece.length + count, 0.0f, kLanes);
  }

  MAMBA_INLINE Vec pre_activation(const float* inputs) const {
    Vec sum = broadcast(bias);
    for (int64_t k = 0; k < width(); ++k) sum += taps[k] * load(inputs + k);
    return sum;
  }
};

template <int W>
void forward(const ConvParams& p, const ConvPiece& piece, int64_t c, float* scratch) {
  float* const inputs = scratch + p.width;
  const Channel<W> channel(p, piece, c, scratch);
  channel.read_inputs(inputs, false);
  with_dtype(p.out.dtype, [&](auto e) {
    using E = decltype(e);
    const int64_t stride = p.out.stride[2];
    auto* out = static_cast<typename E::T*>(p.out.data) + channel.offset(p.out, piece.start);
    for (int64_t i = 0; i < piece.length; i += kLanes) {
      Vec v = channel.pre_activation(inputs + i);
      if (p.silu) v = silu(v);
      write_lanes<E>(out + i * stride, stride, piece.length - i, v);
    }
  });
}

// d (one lane per step) becomes the gradient before the activation.
template <int W>
MAMBA_INLINE void through_silu(const Channel<W>& channel, const float* inputs, float* d,
                               int64_t steps) {
  for (int64_t i = 0; i < steps; i += kLanes) {
    const Vec pre = channel.pre_activation(inputs + i);
    store(d + i, load(d + i) * silu_grad(pre, sigmoid(pre)));
  }
}

template <int W>
MAMBA_INLINE void input_gradient(const Channel<W>& channel, const float* d, float* dx) {
  const int64_t last = channel.width() - 1;
  for (int64_t i = 0; i < channel.piece.length; i += kLanes) {
    Vec sum = Vec{};
    for (int64_t j = 0; j <= last; ++j) sum += channel.taps[last - j] * load(d + i + j);
    store(dx + i, sum);
  }
}

// Adds to the shares of dweight and of dbias; d is zero past the piece.
template <int W>
MAMBA_INLINE void tap_gradients(const Channel<W>& channel, const float* inputs, const float* d,
                                float* share) {
  constexpr int kTogether = W ? W : 1;  // taps whose sums stay in registers
  const int64_t length = channel.piece.length, channels = channel.p.channels;
  for (int64_t k = 0; k < channel.width(); k += kTogether) {
    Vec sums[kTogether];
    for (int j = 0; j < kTogether; ++j) sums[j] = Vec{};
    for (int64_t i = 0; i < length; i += kLanes) {
      const Vec g = load(d + i);
      for (int j = 0; j < kTogether; ++j) sums[j] += g * load(inputs + i + k + j);
    }
    for (int j = 0; j < kTogether; ++j) share[(k + j) * channels] += sum(sums[j]);
  }
  Vec sums = Vec{};
  for (int64_t i = 0; i < length; i += kLanes) sums += load(d + i);
  share[channel.width() * channels] += sum(sums);
}

template <int W>
void backward(const ConvParams& p, const ConvPiece& piece, int64_t c, float* share,
              float* scratch) {
  const int64_t length = piece.length, last = (W ? W : p.width) - 1;
  const int64_t room = kTimePiece + 2 * p.width + kLanes;
  float* const inputs = scratch + p.width;
  float* const d = inputs + room;
  float* const dx = d + room;
  const Channel<W> channel(p, piece, c, scratch);
  channel.read_inputs(inputs, true);
  read_row(p.dout, channel.offset(p.dout, piece.start), p.dout.stride[2], length, d);
  channel.read_after(p.dout, d, piece.num_after);
  const int64_t steps = length + piece.num_after;
  if (p.silu) through_silu(channel, inputs, d, steps);
  fill(d + steps, 0.0f, last + kLanes);

  input_gradient(channel, d, dx);
  for (int64_t i = length - 1, k; i >= 0 && (k = final_column(p, piece, i)) >= 0; --i) {
    const TensorArg& t = p.dfinal;
    dx[i] += read_one(t, p.runs[piece.run].state * t.stride[0] + c * t.stride[1] + k * t.stride[2]);
  }
  write_row(p.dx, channel.offset(p.dx, piece.start), p.dx.stride[2], length, dx);

  fill(d + length, 0.0f, kLanes);  // the steps after count in their own piece
  tap_gradients(channel, inputs, d, share + c);
}

void clear(const TensorArg& t, const ConvPiece& piece, int64_t begin, int64_t end, float* scratch) {
  fill(scratch, 0.0f, whole_lanes(piece.length));
  for (int64_t c = begin; c < end; ++c) {
    const int64_t offset = piece.batch * t.stride[0] + c * t.stride[1] + piece.start * t.stride[2];
    write_row(t, offset, t.stride[2], piece.length, scratch);
  }
}

template <int W>
void forward_group(const ConvParams& p, int64_t group, int64_t begin, int64_t end, float* scratch) {
  for (int64_t i = p.group_bounds[group]; i < p.group_bounds[group + 1]; ++i) {
    const ConvPiece& piece = p.pieces[i];
    if (piece.run < 0) {
      clear(p.out, piece, begin, end, scratch);
      continue;
    }
    for (int64_t c = begin; c < end; ++c) forward<W>(p, piece, c, scratch);
  }
}

template <int W>
void backward_group(const ConvParams& p, int64_t group, int64_t begin, int64_t end,
                    float* scratch) {
  float* const share = p.partial + group * (p.width + 1) * p.channels;
  for (int64_t k = 0; k <= p.width; ++k) fill(share + k * p.channels + begin, 0.0f, end - begin);
  for (int64_t i = p.group_bounds[group]; i < p.group_bounds[group + 1]; ++i) {
    const ConvPiece& piece = p.pieces[i];
    if (piece.run < 0) {
      clear(p.dx, piece, begin, end, scratch);
      continue;
    }
    for (int64_t c = begin; c < end; ++c) backward<W>(p, piece, c, share, scratch);
  }
}

}  // namespace

void conv_fwd_time(const ConvParams& p, int64_t group, int64_t begin, int64_t end, float* scratch) {
  switch (p.width) {
    case 2:
      return forward_group<2>(p, group, begin, end, scratch);
    case 3:
      return forward_group<3>(p, group, begin, end, scratch);
    case 4:
      return forward_group<4>(p, group, begin, end, scratch);
    default:
      return forward_group<0>(p, group, begin, end, scratch);
  }
}

void conv_bwd_time(const ConvParams& p, int64_t group, int64_t begin, int64_t end, float* scratch) {
  switch (p.width) {
    case 2:
      return backward_group<2>(p, group, begin, end, scratch);
    case 3:
      return backward_group<3>(p, group, begin, end, scratch);
    case 4:
      return backward_group<4>(p, group, begin, end, scratch);
    default:
      return backward_group<0>(p, group, begin, end, scratch);
  }
}

}  // namespace MAMBA_ISA
}  // namespace mamba
