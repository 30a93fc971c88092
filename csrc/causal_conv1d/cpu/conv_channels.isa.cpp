// The convolution vectorised over channels, for channel-last tensors and widths 2, 3 and 4.
//
// Steps are taken a few at a time (kSteps), so that memory is read in long stretches while one
// vector of channels keeps its taps and its window in registers. Between these blocks of steps the
// windows of all channels wait in scratch rows.
#include "conv.h"
#include "conv_window.h"

namespace mamba {
namespace MAMBA_ISA {
namespace {

constexpr int64_t kSteps = 8;
constexpr int64_t kRow = kChannelBlock + 16;  // floats from one scratch row to the next

// A block of channels of one piece.
template <class E, int W>
struct Block {
  using T = typename E::T;
  static constexpr int kLast = W - 1;

  const ConvParams& p;
  const ConvPiece& piece;
  const int64_t begin, channels;  // the channels [begin, begin + channels)
  // Rows of scratch: W taps and the bias, the last inputs, the last gradients.
  float* const taps;
  float* const inputs;
  float* const grads;

  MAMBA_INLINE Block(const ConvParams& p, const ConvPiece& piece, int64_t begin, int64_t end,
                     float* scratch)
      : p(p),
        piece(piece),
        begin(begin),
        channels(end - begin),
        taps(scratch),
        inputs(taps + (W + 1) * kRow),
        grads(inputs + kLast * kRow) {}

  MAMBA_INLINE T* address(const TensorArg& t, int64_t step) const {
    return static_cast<T*>(t.data) + piece.batch * t.stride[0] + step * t.stride[2] + begin;
  }

  void read_inputs_before() const {
    for (int k = 0; k < kLast; ++k) {
      float* const to = inputs + k * kRow;
      const int64_t source = p.sources[piece.before + k];
      if (source >= 0) {
        const T* from = address(p.x, source);
        for (int64_t c = 0; c < channels; c += kLanes) {
          store(to + c, read_lanes<E>(from + c, 1, channels - c));
        }
      } else {
        for (int64_t c = 0; c < channels; ++c) to[c] = input_at(p, piece, begin + c, source);
      }
    }
  }
};

void read_taps(const ConvParams& p, int64_t begin, int64_t end, float* taps) {
  for (int64_t k = 0; k < p.width; ++k) {
    read_row(p.weight, begin * p.weight.stride[0] + k * p.weight.stride[1], p.weight.stride[0],
             end - begin, taps + k * kRow);
  }
  float* const bias = taps + p.width * kRow;
  if (p.bias.data) {
    read_row(p.bias, begin * p.bias.stride[0], p.bias.stride[0], end - begin, bias);
  } else {
    fill(bias, 0.0f, whole_lanes(end - begin));
  }
}

// `steps` steps from `from` on, of all channels. kWhole: there are kLanes channels at c.
template <bool kWhole, class E, int W>
MAMBA_INLINE void forward_vector(const Block<E, W>& b, const typename E::T* x, typename E::T* out,
                                 int64_t steps, int64_t c) {
  constexpr int kLast = W - 1;
  const int64_t lanes = b.channels - c, step_x = b.p.x.stride[2], step_out = b.p.out.stride[2];
  Vec w[W], h[W];
  for (int k = 0; k < W; ++k) w[k] = load(b.taps + k * kRow + c);
  const Vec bias = load(b.taps + W * kRow + c);
  for (int k = 0; k < kLast; ++k) h[k] = load(b.inputs + k * kRow + c);
  const bool with_silu = b.p.silu;
  for (int64_t t = 0; t < steps; ++t) {
    h[kLast] = kWhole ? E::read(x + t * step_x) : read_lanes<E>(x + t * step_x, 1, lanes);
    Vec v = bias;
    for (int k = 0; k < W; ++k) v += w[k] * h[k];
    if (with_silu) v = silu(v);
    if (kWhole) {
      E::write(out + t * step_out, v);
    } else {
      write_lanes<E>(out + t * step_out, 1, lanes, v);
    }
    for (int k = 0; k < kLast; ++k) h[k] = h[k + 1];
  }
  for (int k = 0; k < kLast; ++k) store(b.inputs + k * kRow + c, h[k]);
}

template <class E, int W>
void forward(const Block<E, W>& b) {
  b.read_inputs_before();
  for (int64_t t = 0; t < b.piece.length; t += kSteps) {
    const int64_t steps = smaller(kSteps, b.piece.length - t);
    const auto* x = b.address(b.p.x, b.piece.start + t);
    auto* out = b.address(b.p.out, b.piece.start + t);
    int64_t c = 0;
    for (; c + kLanes <= b.channels; c += kLanes) {
      forward_vector<true>(b, x + c, out + c, steps, c);
    }
    if (c < b.channels) forward_vector<false>(b, x + c, out + c, steps, c);
  }
}

// Some neighbouring steps of the backward pass. The gradient of an input is complete W - 1 steps
// after it, so dx runs behind: step t of the block completes dx_first + t.
template <class T>
struct Steps {
  const T* x;  // null: no steps are left, the gradients that come in are zero
  const T* dout;
  T* dx;  // address of the completed step of t = 0; not used before `skip`
  int64_t count;
  int64_t skip;      // of the first steps, how many complete nothing
  bool counted;      // these steps are the piece's own: they count in dweight and dbias
  const float* add;  // or null: a row added to dx, when count is 1
};

template <bool kWhole, class E, int W>
MAMBA_INLINE void backward_vector(const Block<E, W>& b, const Steps<typename E::T>& s, float* share,
                                  int64_t c) {
  constexpr int kLast = W - 1;
  const ConvParams& p = b.p;
  const int64_t lanes = b.channels - c;
  Vec w[W], h[W], g[W], dw[W], dbias = Vec{};
  for (int k = 0; k < W; ++k) w[k] = load(b.taps + k * kRow + c), dw[k] = Vec{};
  const Vec bias = load(b.taps + W * kRow + c);
  for (int k = 0; k < kLast; ++k) h[k] = load(b.inputs + k * kRow + c);
  for (int k = 0; k < kLast; ++k) g[k] = load(b.grads + k * kRow + c);
  for (int64_t t = 0; t < s.count; ++t) {
    h[kLast] = g[kLast] = Vec{};
    if (s.x) {
      const auto* x = s.x + t * p.x.stride[2] + c;
      const auto* d = s.dout + t * p.dout.stride[2] + c;
      h[kLast] = kWhole ? E::read(x) : read_lanes<E>(x, 1, lanes);
      g[kLast] = kWhole ? E::read(d) : read_lanes<E>(d, 1, lanes);
      if (p.silu) {
        Vec pre = bias;
        for (int k = 0; k < W; ++k) pre += w[k] * h[k];
        g[kLast] *= silu_grad(pre, sigmoid(pre));
      }
    }
    if (s.counted) {
      for (int k = 0; k < W; ++k) dw[k] += g[kLast] * h[k];
      dbias += g[kLast];
    }
    if (t >= s.skip) {
      Vec v = s.add ? load(s.add + c) : Vec{};
      for (int k = 0; k < W; ++k) v += w[kLast - k] * g[k];
      auto* dx = s.dx + t * p.dx.stride[2] + c;
      if (kWhole) {
        E::write(dx, v);
      } else {
        write_lanes<E>(dx, 1, lanes, v);
      }
    }
    for (int k = 0; k < kLast; ++k) h[k] = h[k + 1], g[k] = g[k + 1];
  }
  for (int k = 0; k < kLast; ++k) store(b.inputs + k * kRow + c, h[k]);
  for (int k = 0; k < kLast; ++k) store(b.grads + k * kRow + c, g[k]);
  if (s.counted) {
    for (int k = 0; k < W; ++k) store(share + k * kRow + c, load(share + k * kRow + c) + dw[k]);
    store(share + W * kRow + c, load(share + W * kRow + c) + dbias);
  }
}

template <class E, int W>
__attribute__((noinline)) void backward_steps(const Block<E, W>& b, const Steps<typename E::T>& s,
                                              float* share) {
  int64_t c = 0;
  for (; c + kLanes <= b.channels; c += kLanes) backward_vector<true>(b, s, share, c);
  if (c < b.channels) backward_vector<false>(b, s, share, c);
}

template <class E, int W>
void backward(const Block<E, W>& b, float* share, float* add) {
  constexpr int64_t kLast = W - 1;
  const ConvParams& p = b.p;
  const ConvPiece& piece = b.piece;
  b.read_inputs_before();
  fill(b.grads, 0.0f, kLast * kRow);
  for (int64_t t = 0; t < piece.length; t += kSteps) {
    const int64_t steps = smaller(kSteps, piece.length - t), skip = kLast - t;
    backward_steps(b,
                   {b.address(p.x, piece.start + t), b.address(p.dout, piece.start + t),
                    b.address(p.dx, piece.start + t - kLast), steps, skip, true, nullptr},
                   share);
  }
  for (int64_t after = 0; after < kLast; ++after) {  // these complete the last steps of the piece
    const int64_t i = piece.length + after - kLast, column = i < 0 ? -1 : final_column(p, piece, i);
    if (column >= 0) {
      const TensorArg& t = p.dfinal;
      read_row(t,
               p.runs[piece.run].state * t.stride[0] + b.begin * t.stride[1] + column * t.stride[2],
               t.stride[1], b.channels, add);
    }
    const bool there = after < piece.num_after;
    const int64_t at = there ? p.sources[piece.after + after] : 0;
    backward_steps(
        b,
        {there ? b.address(p.x, at) : nullptr, there ? b.address(p.dout, at) : nullptr,
         b.address(p.dx, piece.start + i), 1, i < 0 ? 1 : 0, false, column >= 0 ? add : nullptr},
        share);
  }
}

template <class E, int W>
void clear(const Block<E, W>& b, const TensorArg& t) {
  for (int64_t i = 0; i < b.piece.length; ++i) {
    auto* to = b.address(t, b.piece.start + i);
    for (int64_t c = 0; c < b.channels; ++c) to[c] = 0;  // the same bits in every dtype
  }
}

template <class E, int W>
void forward_group(const ConvParams& p, int64_t group, int64_t begin, int64_t end, float* scratch) {
  read_taps(p, begin, end, scratch);
  for (int64_t i = p.group_bounds[group]; i < p.group_bounds[group + 1]; ++i) {
    const Block<E, W> block(p, p.pieces[i], begin, end, scratch);
    if (block.piece.run < 0) {
      clear(block, p.out);
    } else {
      forward(block);
    }
  }
}

template <class E, int W>
void backward_group(const ConvParams& p, int64_t group, int64_t begin, int64_t end,
                    float* scratch) {
  read_taps(p, begin, end, scratch);
  float* const share = scratch + (W + 1 + 2 * (W - 1)) * kRow;
  float* const add = share + (W + 1) * kRow;
  fill(share, 0.0f, (W + 1) * kRow);
  for (int64_t i = p.group_bounds[group]; i < p.group_bounds[group + 1]; ++i) {
    const Block<E, W> block(p, p.pieces[i], begin, end, scratch);
    if (block.piece.run < 0) {
      clear(block, p.dx);
    } else {
      backward(block, share, add);
    }
  }
  float* const to = p.partial + group * (W + 1) * p.channels;
  for (int64_t k = 0; k <= W; ++k) {
    for (int64_t c = begin; c < end; ++c) to[k * p.channels + c] = share[k * kRow + c - begin];
  }
}

template <int W>
struct Width {
  static constexpr int value = W;
};

template <class F>
MAMBA_INLINE void with_width(int64_t width, F&& f) {
  switch (width) {
    case 2:
      return f(Width<2>{});
    case 3:
      return f(Width<3>{});
    default:
      return f(Width<4>{});
  }
}

}  // namespace

void conv_fwd_channels(const ConvParams& p, int64_t group, int64_t begin, int64_t end,
                       float* scratch) {
  with_dtype(p.x.dtype, [&](auto e) {
    with_width(p.width, [&](auto w) {
      forward_group<decltype(e), decltype(w)::value>(p, group, begin, end, scratch);
    });
  });
}

void conv_bwd_channels(const ConvParams& p, int64_t group, int64_t begin, int64_t end,
                       float* scratch) {
  with_dtype(p.x.dtype, [&](auto e) {
    with_width(p.width, [&](auto w) {
      backward_group<decltype(e), decltype(w)::value>(p, group, begin, end, scratch);
    });
  });
}

}  // namespace MAMBA_ISA
}  // namespace mamba
