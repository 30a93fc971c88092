#include <algorithm>
#include <cstring>
#include <type_traits>

#include "products.h"

namespace mamba {
namespace MAMBA_ISA {
namespace {

// Where everything lies in the scratch memory. The first members are shared by the team, the last
// ones are each member's own: they are small, and computing them twice saves a barrier.
struct Scratch {
  float *hidden, *z, *conv_out, *projected;  // rows of floats
  Activations x_in, y_in;                    // inputs of x_proj and out_proj
  float *residual, *B, *C;                   // own
  Activations normed, dt_in, head_in;        // own
  char* prepared = nullptr;                  // own: the rows that a product reads
  Stretch* stretches = nullptr;              // own: what it reads, see Worker::list_stretches
  int64_t bytes = 0;

  Scratch(const DecodeParams& p, void* base, int64_t member, int64_t members) {
    const DecodeLayer& layer = p.layer[0];
    const int64_t rows = padded_rows(p), channels = p.channels();
    const int64_t width = round_up(p.d_model, kBlock);
    auto take = [&](int64_t floats) {
      float* p = reinterpret_cast<float*>(static_cast<char*>(base) + bytes);
      bytes += round_up(floats * 4, 64);
      return p;
    };
    auto activations = [&](const PackedWeight& w) {
      return Activations{take(Activations::floats(rows, w.in)), w.in, layout_for(w)};
    };
    hidden = take(p.batch * width);
    z = take(p.batch * channels);
    conv_out = take(p.batch * channels);
    projected = take(p.batch * layer.x_proj.blocks() * kBlock);
    x_in = activations(layer.x_proj);
    y_in = activations(layer.out_proj);
    const int64_t shared = bytes;
    bytes = 0;
    base = static_cast<char*>(base) + shared;
    for (int64_t i = 0; i <= member; ++i) {
      base = static_cast<char*>(base) + bytes;
      bytes = 0;
      residual = take(p.batch * width);
      B = take(p.batch * p.padded_state());
      C = take(p.batch * p.padded_state());
      normed = activations(layer.in_x);
      dt_in = activations(layer.dt_proj);
      head_in = activations(p.lm_head);
      int64_t most = 0;
      for (const auto* w : {&layer.in_x, &layer.x_proj, &layer.out_proj, &p.lm_head}) {
        most = std::max(most, prepared_bytes(*w));
      }
      prepared = reinterpret_cast<char*>(take(rows * most / 4));
      stretches = reinterpret_cast<Stretch*>(
          take((kLayerStretches * p.layers + 1) * static_cast<int64_t>(sizeof(Stretch) / 4)));
    }
    for (auto* x : {&x_in, &y_in, &normed, &dt_in, &head_in}) x->prepared = prepared;
    bytes = shared + bytes * members;
  }
};
// The sum of all lanes in a fixed order.
MAMBA_INLINE float sum_lanes(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  return sum(v);
#endif
}

template <class E>
MAMBA_INLINE float read_one(const typename E::T* p) {
  if constexpr (std::is_same_v<E, F32>) return *p;
  if constexpr (std::is_same_v<E, F16>) return half_to_float(*p);
  if constexpr (std::is_same_v<E, BF16>) return bfloat16_to_float(*p);
}
template <class E>
MAMBA_INLINE void write_one(typename E::T* p, float value) {
  if constexpr (std::is_same_v<E, F32>) *p = value;
  if constexpr (std::is_same_v<E, F16>) *p = float_to_half(value);
  if constexpr (std::is_same_v<E, BF16>) *p = float_to_bfloat16(value);
}

struct Range {
  int64_t begin, end;
};

// Asks for `bytes` of memory that this thread will read and write soon.
MAMBA_INLINE void ask_for(const void* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) {
    __builtin_prefetch(static_cast<const char*>(p) + i, 1);
  }
}

// What one thread does of one token.
struct Worker {
  const DecodeParams& p;
  Team& team;
  const int64_t member, members;
  const Scratch s;
  const int64_t channels, width, state;
  mutable Upcoming upcoming;

  Worker(const DecodeParams& params, Team& team, int64_t member, int64_t members, void* scratch)
      : p(params),
        team(team),
        member(member),
        members(members),
        s(params, scratch, member, members),
        channels(params.channels()),
        width(round_up(params.d_model, kBlock)),
        state(params.padded_state()),
        upcoming(s.stretches, list_stretches()) {}

  Range share(int64_t count) const {
    return {count * member / members, count * (member + 1) / members};
  }

  Share share_of(const PackedWeight& w) const {
    const Range mine = share(w.blocks());
    return {&w, mine.begin, mine.end};
  }

  // Writes them in the order of the calls of for_each_output; what the states' steps read comes
  // after dt_proj. Returns their number.
  int64_t list_stretches() const {
    Stretch* next = s.stretches;
    for (const DecodeLayer* layer = p.layer; layer < p.layer + p.layers; ++layer) {
      for (const auto* w : {&layer->in_x, &layer->in_z, &layer->x_proj, &layer->dt_proj}) {
        *next++ = share_of(*w).stretch();
      }
      const Range blocks = share(layer->dt_proj.blocks());
      const int64_t bytes = kBlock * state * 4;
      *next++ = {reinterpret_cast<const char*>(layer->A) + blocks.begin * bytes,
                 (blocks.end - blocks.begin) * bytes};
      *next++ = share_of(layer->out_proj).stretch();
    }
    *next++ = share_of(p.lm_head).stretch();
    return next - s.stretches;
  }

  // How many lines of what comes next to ask for after each output of a product.
  int64_t lines(const PackedWeight& w) const {
    // Products of few rows keep memory busy themselves, and so do those of many rows in fp32, which
    // asking costs 3 %; with bf16 it saves 6 % (16 rows, 130M parameters).
    return has_many_rows() && w.kind != WeightKind::kFloat32 ? 16 : 0;
  }

  bool has_many_rows() const { return p.batch >= 8; }

  // Returns when the whole team is here; until then memory works for the next phase.
  void wait() const {
    team.barrier(members, [&] {
      if (!has_many_rows()) upcoming.ask(2);
    });
  }

  void embed() const {
    for (int64_t r = 0; r < p.batch; ++r) {
      float* row = s.residual + r * width;
      const float* from = row_as_float(p.embedding, p.ids[r] * p.embedding.stride[0],
                                       p.embedding.stride[1], p.d_model, row);
      if (from != row) std::copy(from, from + p.d_model, row);
    }
  }

  // residual += hidden, then the norm of the sum (before it is rounded) into `to`.
  void add_norm(const NormWeights& norm, bool add, const Activations& to) const {
    for (int64_t first = 0; first < p.batch;) {
      const Tile tile = next_tile(p, first);
      for (int64_t r = 0; r < tile.rows; ++r) {
        norm_row(norm, add ? s.hidden + (first + r) * width : nullptr,
                 s.residual + (first + r) * width, tile, r, to);
      }
      first += tile.width;
    }
  }

  // Padding of the rows is 0 and stays 0, except for the mean's sake in the middle of a layer norm.
  void norm_row(const NormWeights& norm, const float* hidden, float* row, const Tile& tile,
                int64_t r, const Activations& to) const {
    Vec total{}, square{};
    for (int64_t i = 0; i < width; i += kLanes) {
      const Vec v = hidden ? load(row + i) + load(hidden + i) : load(row + i);
      store(row + i, v);
      total += v;
      square += v * v;
    }
    const float n = static_cast<float>(p.d_model);
    float mean = 0, variance = sum_lanes(square) / n;
    if (!p.is_rms_norm) {
      mean = sum_lanes(total) / n;
      square = Vec{};
      for (int64_t i = 0; i < width; i += kLanes) {
        const Vec v = load(row + i) - mean;
        square += v * v;
      }
      variance = (sum_lanes(square) - static_cast<float>(width - p.d_model) * mean * mean) / n;
    }
    const float scale = 1.0f / __builtin_sqrtf(variance + norm.eps);
    alignas(64) float values[kBlock];
    for (int64_t i = 0; i < width; i += kBlock) {
      for (int64_t j = 0; j < kBlock; j += kLanes) {
        Vec v = (load(row + i + j) - mean) * scale * load(norm.weight + i + j);
        if (norm.bias) v += load(norm.bias + i + j);
        store(values + j, v);
      }
      to.put(tile, r, i, values, std::min(kBlock, p.d_model - i));
    }
    if (p.residual_dtype == DType::kBFloat16) {
      for (int64_t i = 0; i < p.d_model; ++i) {
        row[i] = bfloat16_to_float(float_to_bfloat16(row[i]));
      }
    } else if (p.residual_dtype == DType::kFloat16) {
      for (int64_t i = 0; i < p.d_model; ++i) row[i] = half_to_float(float_to_half(row[i]));
    }
  }

  // x and z of this member's channels; x goes through the convolution at once.
  void project_in(const DecodeLayer& layer) const {
    s.normed.prepare(layer.in_x, p);  // in_z has scales of the same groups
    for_each_output(share_of(layer.in_x), s.normed, p, upcoming, lines(layer.in_x),
                    [&](int64_t block, const Tile& tile, int64_t r, float* values) {
                      convolve(layer, block, tile, r, values);
                    });
    for_each_output(share_of(layer.in_z), s.normed, p, upcoming, lines(layer.in_z),
                    [&](int64_t block, const Tile& tile, int64_t r, const float* values) {
                      std::copy(values, values + kBlock,
                                s.z + (tile.first + r) * channels + block * kBlock);
                    });
  }

  // A block's states of the rows after the one at hand lie apart: nothing but this foresees them.
  void ask_for_next(const TensorArg& states, int64_t size, int64_t block, int64_t row) const {
    constexpr int64_t kRowsAhead = 2;
    int64_t next = row + kRowsAhead;
    if (next >= p.batch) next -= p.batch, ++block;
    if (next >= p.batch || (block + 1) * kBlock > p.d_inner) return;
    const int64_t at = next * states.stride[0] + block * kBlock * size;
    const int64_t bytes = states.dtype == DType::kFloat32 ? 4 : 2;
    ask_for(static_cast<const char*>(states.data) + at * bytes, kBlock * size * bytes);
  }

  void convolve(const DecodeLayer& layer, int64_t block, const Tile& tile, int64_t r,
                const float* values) const {
    ask_for_next(layer.conv_state, p.d_conv, block, tile.first + r);
    const int64_t c0 = block * kBlock, row = tile.first + r;
    const int64_t count = std::min(kBlock, p.d_inner - c0);
    alignas(64) float out[kBlock];
    for (int64_t i = 0; i < kBlock; i += kLanes) {
      store(out + i, layer.conv_bias ? load(layer.conv_bias + c0 + i) : Vec{});
    }
    const float* taps = layer.conv_weight + c0;
    with_dtype(layer.conv_state.dtype, [&](auto type) {
      using E = decltype(type);
      auto* window = static_cast<typename E::T*>(layer.conv_state.data) +
                     row * layer.conv_state.stride[0] + c0 * p.d_conv;
      switch (count == kBlock ? p.d_conv : 0) {
        case 2:
          return slide<E, 2>(window, values, taps, count, out);
        case 3:
          return slide<E, 3>(window, values, taps, count, out);
        case 4:
#if defined(__AVX512F__)
          return slide_four<E>(window, values, taps, out);
#else
          return slide<E, 4>(window, values, taps, count, out);
#endif
        default:
          return slide<E, 0>(window, values, taps, count, out);
      }
    });
    for (int64_t i = 0; i < kBlock; i += kLanes) store(out + i, silu(load(out + i)));
    std::copy(out, out + kBlock, s.conv_out + row * channels + c0);
    s.x_in.put(tile, r, c0, out, count);
  }

  // Moves the windows (count, d_conv) of a block on by one input and adds their products with the
  // taps to `out`. With kWidth > 0, that is d_conv, and the block is whole.
  template <class E, int kWidth>
  MAMBA_INLINE void slide(typename E::T* window, const float* values, const float* taps,
                          int64_t count, float* out) const {
    const int64_t w = kWidth ? kWidth : p.d_conv, n = kWidth ? kBlock : count;
    // All windows at once: what crosses from one into the one before is the place of the input.
    std::memmove(window, window + 1, static_cast<size_t>(n * w - 1) * sizeof(*window));
    for (int64_t i = 0; i < n; ++i) write_one<E>(window + i * w + w - 1, values[i]);
    alignas(64) float inputs[kBlock * (kWidth ? kWidth : 1)];
    if constexpr (kWidth > 0) {
      for (int64_t i = 0; i < kBlock * kWidth; i += kLanes) store(inputs + i, E::read(window + i));
    }
    for (int64_t t = 0; t + 1 < w; ++t) {
      for (int64_t i = 0; i < n; ++i) {
        const float input = kWidth ? inputs[i * w + t] : read_one<E>(window + i * w + t);
        out[i] += input * taps[t * channels + i];
      }
    }
    for (int64_t i = 0; i < n; ++i) out[i] += values[i] * taps[(w - 1) * channels + i];
  }

#if defined(__AVX512F__)
  // The same for a block of windows of four, 16 channels in four registers, without a store that a
  // later load of another width would have to wait for.
  template <class E>
  MAMBA_INLINE void slide_four(typename E::T* window, const float* values, const float* taps,
                               float* out) const {
    const __m512i four =
        _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
    const __m512i last = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 3);
    const __m512 input = (__m512)load(values);
    __m512 old[4];
    for (int i = 0; i < 4; ++i) {
      old[i] = (__m512)E::read(window + i * kLanes);
      const __m512i from = _mm512_add_epi32(last, _mm512_set1_epi32(4 * i));
      const __m512 moved = _mm512_permute_ps(old[i], 0xf9);  // the second to fourth, one place on
      E::write(window + i * kLanes, (Vec)_mm512_mask_permutexvar_ps(moved, 0x8888, from, input));
    }
    Vec sum = load(out);
    for (int t = 1; t < 4; ++t) {
      const __m512i every = _mm512_add_epi32(four, _mm512_set1_epi32(t));
      const __m512 low = _mm512_permutex2var_ps(old[0], every, old[1]);
      const __m512 high = _mm512_permutex2var_ps(old[2], every, old[3]);
      const Vec tap = (Vec)_mm512_shuffle_f32x4(low, high, 0x44);
      sum += tap * load(taps + (t - 1) * channels);
    }
    store(out, sum + (Vec)input * load(taps + 3 * channels));
  }
#endif

  void select(const DecodeLayer& layer) const {
    const int64_t outputs = layer.x_proj.blocks() * kBlock;
    s.x_in.prepare(layer.x_proj, p);
    for_each_output(share_of(layer.x_proj), s.x_in, p, upcoming, lines(layer.x_proj),
                    [&](int64_t block, const Tile& tile, int64_t r, const float* values) {
                      std::copy(values, values + kBlock,
                                s.projected + (tile.first + r) * outputs + block * kBlock);
                    });
  }

  // dt of this member's channels, the recurrence, skip and gate.
  void advance(const DecodeLayer& layer) const {
    const int64_t outputs = layer.x_proj.blocks() * kBlock;
    for (int64_t first = 0; first < p.batch;) {
      const Tile tile = next_tile(p, first);
      for (int64_t r = 0; r < tile.rows; ++r) {
        const float* projected = s.projected + (first + r) * outputs;
        s.dt_in.put(tile, r, 0, projected, p.dt_rank);
        projected += p.dt_rank;
        std::copy(projected, projected + p.d_state, s.B + (first + r) * state);
        projected += p.d_state;
        std::copy(projected, projected + p.d_state, s.C + (first + r) * state);
      }
      first += tile.width;
    }
    // Memory has time during the steps of the states.
    const int64_t ahead = p.batch == 1 ? 32 : lines(layer.dt_proj);
    for_each_output(share_of(layer.dt_proj), s.dt_in, p, upcoming, ahead,
                    [&](int64_t block, const Tile& tile, int64_t r, float* values) {
                      update_state(layer, block, tile, r, values);
                    });
    upcoming.next_stretch();  // A
  }

  void update_state(const DecodeLayer& layer, int64_t block, const Tile& tile, int64_t r,
                    float* dt) const {
    const int64_t c0 = block * kBlock, row = tile.first + r;
    const int64_t count = std::min(kBlock, p.d_inner - c0);
    ask_for_next(layer.ssm_state, p.d_state, block, row);
    const float* u = s.conv_out + row * channels + c0;
    alignas(64) float y[kBlock] = {};
    for (int64_t i = 0; i < kBlock; i += kLanes) store(dt + i, softplus(load(dt + i)));
    const int64_t start = row * layer.ssm_state.stride[0] + c0 * p.d_state;
    with_dtype(layer.ssm_state.dtype, [&](auto type) {
      using E = decltype(type);
      auto* h = static_cast<typename E::T*>(layer.ssm_state.data) + start;
      const float *A = layer.A + c0 * state, *B = s.B + row * state, *C = s.C + row * state;
#if defined(__AVX512F__)
      if (p.d_state == kLanes && count == kBlock) return update_block<E>(h, A, B, C, dt, u, y);
#endif
      for (int64_t i = 0; i < count; ++i, h += p.d_state, A += state) {
        y[i] = update_channel<E>(h, A, B, C, dt[i], dt[i] * u[i]);
      }
    });
    const float* z = s.z + row * channels + c0;
    for (int64_t i = 0; i < kBlock; i += kLanes) {
      const Vec skipped = load(y + i) + load(u + i) * load(layer.D + c0 + i);
      store(y + i, skipped * silu(load(z + i)));
    }
    s.y_in.put(tile, r, c0, y, count);
  }

#if defined(__AVX512F__)
  // A whole block of channels whose states fill a register each.
  template <class E>
  MAMBA_INLINE static void update_block(typename E::T* h, const float* A, const float* B,
                                        const float* C, const float* dt, const float* u, float* y) {
    Vec products[kBlock];
    for (int64_t i = 0; i < kBlock; ++i, h += kLanes, A += kLanes) {
      const Vec next = E::read(h) * exp2(load(A) * dt[i]) + load(B) * (dt[i] * u[i]);
      E::write(h, next);
      products[i] = next * load(C);
    }
    store(y, sums_of(products));
  }
#endif

  // h = exp(dt A) h + dt B u in place; returns C h.
  template <class E>
  MAMBA_INLINE float update_channel(typename E::T* h, const float* A, const float* B,
                                    const float* C, float dt, float input) const {
    Vec total{};
    int64_t i = 0;
    for (; i + kLanes <= p.d_state; i += kLanes) {
      const Vec next = E::read(h + i) * exp2(load(A + i) * dt) + load(B + i) * input;
      E::write(h + i, next);
      total += next * load(C + i);
    }
    if (i < p.d_state) {
      const int rest = static_cast<int>(p.d_state - i);
      const Vec next = read_some<E>(h + i, rest) * exp2(load(A + i) * dt) + load(B + i) * input;
      write_some<E>(h + i, next, rest);
      total += next * load(C + i);
    }
    return sum_lanes(total);
  }

  void project_out(const DecodeLayer& layer) const {
    s.y_in.prepare(layer.out_proj, p);
    for_each_output(share_of(layer.out_proj), s.y_in, p, upcoming, lines(layer.out_proj),
                    [&](int64_t block, const Tile& tile, int64_t r, const float* values) {
                      std::copy(values, values + kBlock,
                                s.hidden + (tile.first + r) * width + block * kBlock);
                    });
  }

  void logits() const {
    s.head_in.prepare(p.lm_head, p);
    with_dtype(p.logits.dtype, [&](auto type) {
      using E = decltype(type);
      auto* to = static_cast<typename E::T*>(p.logits.data);
      for_each_output(share_of(p.lm_head), s.head_in, p, upcoming, lines(p.lm_head),
                      [&](int64_t block, const Tile& tile, int64_t r, const float* values) {
                        const int64_t first = block * kBlock;
                        auto* row = to + (tile.first + r) * p.vocab + first;
                        const int64_t count = std::min(kBlock, p.vocab - first);
                        int64_t i = 0;
                        for (; i + kLanes <= count; i += kLanes)
                          E::write(row + i, load(values + i));
                        for (; i < count; ++i) write_one<E>(row + i, values[i]);
                      });
    });
  }

  // Rows are dealt out whole: who chooses one has no say in what is chosen.
  void choose() const {
    if (!p.chooser) return;
    wait();
    for (int64_t r = member; r < p.batch; r += members) {
      p.chooser->row(p.choice, r, p.choice_scratch + member * p.choice_scratch_bytes);
    }
  }

  void run() const {
    embed();
    for (int64_t i = 0; i < p.layers; ++i) {
      const DecodeLayer& layer = p.layer[i];
      add_norm(layer.norm, i > 0, s.normed);
      project_in(layer);
      wait();
      select(layer);
      wait();
      advance(layer);
      wait();
      project_out(layer);
      wait();
    }
    add_norm(p.norm_f, true, s.head_in);
    logits();
    choose();
  }
};

int64_t scratch_bytes(const DecodeParams& p, int64_t members) {
  return Scratch(p, nullptr, 0, members).bytes;
}

void step(const DecodeParams& p, Team& team, int64_t member, int64_t members, void* scratch) {
  begin_products();
  Worker(p, team, member, members, scratch).run();
  end_products();
}

}  // namespace

DecodeKernels decode_kernels() { return {scratch_bytes, step}; }

}  // namespace MAMBA_ISA
}  // namespace mamba
