// The Mamba mixer on the GPU as two torch operators: what mamba_ssm/ops/mamba_block.py computes op
// by op, in one call each, because in a small model the host's time is the cost. Schemas live in
// mamba_ssm/ops/schema.py.
#include <array>

#include "bindings_cuda_block.h"
#include "bindings_layout.h"

// Of torch's C interface of its CUDA operators, straight to cuBLAS.
extern "C" AOTITorchError aoti_torch_cuda_addmm_out(AtenTensorHandle out, AtenTensorHandle self,
                                                    AtenTensorHandle mat1, AtenTensorHandle mat2,
                                                    double beta, double alpha);
// Since torch 2.11; null before.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_cuda_mm_dtype_out(AtenTensorHandle out,
                                                                             AtenTensorHandle self,
                                                                             AtenTensorHandle mat2,
                                                                             int32_t out_dtype);

namespace mamba {
namespace {

using Sizes = std::vector<int64_t>;

Tensor multiply(const Tensor& a, const Tensor& b) {
  Tensor out = fresh(a, {a.size(0), b.size(1)}, a.scalar_type());
  multiply_into(out, a, b);
  return out;
}

// a (16-bit) times b in fp32.
Tensor multiply_wide(const Tensor& a, const Tensor& b) {
  Tensor out = fresh(a, {a.size(0), b.size(1)}, ScalarType::Float);
  if (aoti_torch_cuda_mm_dtype_out) {
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_cuda_mm_dtype_out(out.get(), a.get(), b.get(), aoti_torch_dtype_float32()));
    return out;
  }
  std::array<StableIValue, 4> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                    torch::stable::detail::from(ScalarType::Float),
                                    torch::stable::detail::from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::mm", "dtype_out", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

void add_product(const Tensor& to, const Tensor& a, const Tensor& b) {
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_cuda_addmm_out(to.get(), to.get(), a.get(), b.get(), 1.0, 1.0));
}

void check_matrix(const char* op, const char* name, const Tensor& t, int64_t rows, int64_t columns,
                  const Tensor& like) {
  (void)tensor_arg(op, name, t, {rows, columns}, like);
}

// The new memory of conv and scan must have steps as rows; with one channel it has no order.
Tensor as_rows(const Tensor& sequences) {
  if (sequences.stride(1) == 1 && sequences.stride(2) == sequences.size(1)) return sequences;
  const int64_t b = sequences.size(0), d = sequences.size(1), l = sequences.size(2);
  return view(sequences, {b, d, l}, {d * l, 1, d});
}

}  // namespace

// The convolution's weight (channels, 1, width) as (channels, width).
Tensor block_taps(const char* op, const Tensor& weight) {
  check_dim(op, "conv_weight", weight, 3, "(channels, 1, width)");
  STD_TORCH_CHECK(weight.size(1) == 1, op,
                  ": conv_weight must have shape (channels, 1, width), got ",
                  shape_text(sizes_of(weight)));
  return view(weight, {weight.size(0), weight.size(2)}, {weight.stride(0), weight.stride(2)});
}

BlockForward::BlockForward(const BlockSizes& s, const Tensor& like, int64_t e, int64_t chunk_size) {
  const int64_t m = s.b * s.length, chunks = (s.length + chunk_size - 1) / chunk_size;
  xz = fresh(like, {m, 2 * s.d}), conv = fresh(like, {m, s.d});
  x_dbl = fresh(like, {m, s.rank + 2 * s.n}), delta = fresh(like, {m, s.d});
  y = fresh(like, {m, s.d}), out = fresh(like, {m, e});
  final_state = new_floats(like, {s.b, s.d, s.n});
  states = new_floats(like, {s.b, chunks, s.d, s.n});
  x = s.sequences(xz), z = s.sequences(xz, s.d), u = s.sequences(conv);
  delta_steps = s.sequences(delta), scanned = s.sequences(y), low_rank = s.low_rank(x_dbl);
  B = s.selected(x_dbl, s.rank), C = s.selected(x_dbl, s.rank + s.n);
}

void block_forward(const Tensor& rows, const BlockWeights& w, int64_t chunk_size,
                   const BlockForward& f) {
  multiply_into(f.xz, rows, transposed(w.in_proj));
  block_conv_forward(f.x, w.taps, w.conv_bias, f.u);
  multiply_into(f.x_dbl, f.conv, transposed(w.x_proj));
  multiply_into(f.delta, f.low_rank, transposed(w.dt_proj));
  block_scan_forward(f.u, f.delta_steps, w.A, f.B, f.C, w.D, f.z, w.dt_bias, chunk_size, f.scanned,
                     f.final_state, f.states);
  multiply_into(f.out, f.y, transposed(w.out_proj));
}

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
           Tensor, Tensor, Tensor>
block_fwd(Tensor hidden, Tensor in_proj, Tensor conv_weight, OptionalTensor conv_bias,
          Tensor x_proj, Tensor dt_proj, OptionalTensor dt_bias, Tensor A_log, Tensor D,
          Tensor out_proj, ScalarType dtype, int64_t chunk_size) {
  const char* op = "_mamba_block_fwd";
  check_dim(op, "hidden", hidden, 3, "(batch, length, model)");
  check_dim(op, "A_log", A_log, 2, "(channels, state_dim)");
  check_dim(op, "dt_proj", dt_proj, 2, "(channels, rank)");
  check_dim(op, "out_proj", out_proj, 2, "(outputs, channels)");
  const int64_t m = hidden.size(2);
  const BlockSizes s{hidden.size(0), hidden.size(1), A_log.size(0), A_log.size(1), dt_proj.size(1)};
  check_matrix(op, "in_proj", in_proj, 2 * s.d, m, hidden);
  check_matrix(op, "x_proj", x_proj, s.rank + 2 * s.n, s.d, hidden);
  check_matrix(op, "dt_proj", dt_proj, s.d, s.rank, hidden);
  check_matrix(op, "out_proj", out_proj, out_proj.size(0), s.d, hidden);
  const torch::stable::accelerator::DeviceGuard guard(hidden.get_device_index());
  void* const stream = current_stream(hidden);
  Converter convert{op, {}, {}};
  const auto used = [&](const Tensor& t) { return convert.converted(t, dtype); };
  Tensor rows = used(contiguous_of(hidden));
  const Tensor w_in = used(in_proj), w_x = used(x_proj), w_dt = used(dt_proj),
               w_out = used(out_proj);
  const Tensor A_from = contiguous_of(A_log);
  Tensor A = fresh(hidden, {s.d, s.n}, ScalarType::Float);
  convert.add(A_from, A, true);
  convert.run(stream);
  const Tensor matrix = view(rows, {s.b * s.length, m}, {m, 1});
  const int64_t e = out_proj.size(0);
  STD_TORCH_CHECK(chunk_size > 0, op, ": chunk_size must be positive, got ", chunk_size);
  const BlockForward f(s, matrix, e, chunk_size);
  block_forward(matrix,
                {w_in, block_taps(op, conv_weight), w_x, w_dt, A, D, w_out, conv_bias, dt_bias},
                chunk_size, f);
  Tensor out = view(f.out, {s.b, s.length, e}, {s.length * e, e, 1});
  // What is an argument as it came is no result.
  const auto made = [&](const Tensor& t, const Tensor& from) {
    return t.get() == from.get() || t.data_ptr() == from.data_ptr() ? absent(f.xz) : t;
  };
  return {out,
          made(matrix, hidden),
          f.xz,
          f.x_dbl,
          A,
          f.y,
          f.states,
          f.final_state,
          made(w_in, in_proj),
          made(w_x, x_proj),
          made(w_dt, dt_proj),
          made(w_out, out_proj),
          f.conv,
          f.delta};
}

// The gradients' dtypes: those of the parameters, where a product gives them at once.
bool wide_gradient(const Tensor& rows, ScalarType dtype) {
  return dtype == ScalarType::Float && rows.scalar_type() != ScalarType::Float;
}

// dy^T x of rows (m, o) and (m, i).
Tensor weight_gradient(const Tensor& dy, const Tensor& x, ScalarType dtype) {
  const Tensor a = transposed(dy);
  return wide_gradient(dy, dtype) ? multiply_wide(a, x) : multiply(a, x);
}

// What block_bwd is asked for, a bit each.
struct BlockWanted {
  bool hidden, in, x, dt, out, dxz;
  explicit BlockWanted(int64_t bits)
      : hidden(bits & 1), in(bits & 2), x(bits & 4), dt(bits & 8), out(bits & 16), dxz(bits & 32) {}
};

// Gradients behind the convolution's output, of conv (b, d, l) itself among them.
struct BlockInnerGradients {
  Tensor conv, A, D, dt_bias, x_proj, dt_proj;
};

// From y's gradient, in the first half of dxz, to conv's; z's goes to the second half.
BlockInnerGradients block_inner_backward(const BlockSizes& s, const BlockWanted& wanted,
                                         const Tensor& dxz, const Tensor& conv, const Tensor& xz,
                                         const Tensor& x_dbl, const OptionalTensor& delta,
                                         const Tensor& A, const Tensor& states,
                                         const Tensor& x_proj, const Tensor& dt_proj,
                                         const OptionalTensor& dt_bias, const Tensor& D,
                                         ScalarType x_dtype, ScalarType dt_dtype,
                                         int64_t chunk_size) {
  const Tensor ddelta = fresh(xz, {s.b * s.length, s.d});
  if (!delta.has_value()) multiply_into(ddelta, s.low_rank(x_dbl), transposed(dt_proj));
  const Tensor dx_dbl = fresh(xz, {s.b * s.length, s.rank + 2 * s.n});
  // In one memory, unless delta was given: delta, then its gradient.
  const ScanGradientsInto into{s.sequences(ddelta), s.sequences(dxz, s.d),
                               s.selected(dx_dbl, s.rank), s.selected(dx_dbl, s.rank + s.n), true};
  auto [du, ddelta_, dA, dB, dC, dD, dz, d_dt_bias, dinitial] = scan_backward(
      s.sequences(dxz), std::nullopt, conv, delta.has_value() ? s.sequences(*delta) : into.ddelta,
      A, s.selected(x_dbl, s.rank), s.selected(x_dbl, s.rank + s.n), D, s.sequences(xz, s.d),
      dt_bias, true, std::nullopt, std::nullopt, s.b, chunk_size, states, into);
  BlockInnerGradients g{as_rows(du), dA, dD, dt_bias.has_value() ? d_dt_bias : absent(xz), {}, {}};
  g.dt_proj = wanted.dt ? weight_gradient(ddelta, s.low_rank(x_dbl), dt_dtype) : absent(xz);
  multiply_into(s.low_rank(dx_dbl), ddelta, dt_proj);
  g.x_proj = wanted.x ? weight_gradient(dx_dbl, s.rows(conv), x_dtype) : absent(xz);
  add_product(s.rows(g.conv), dx_dbl, x_proj);
  return g;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
block_bwd(Tensor d_rows, OptionalTensor y, Tensor out_proj, OptionalTensor rows, Tensor xz,
          Tensor x_dbl, OptionalTensor conv_rows, OptionalTensor delta, Tensor A, Tensor states,
          OptionalTensor in_proj, Tensor conv_weight, OptionalTensor conv_bias, Tensor x_proj,
          Tensor dt_proj, OptionalTensor dt_bias, Tensor D, ScalarType hidden_dtype,
          ScalarType in_dtype, ScalarType x_dtype, ScalarType dt_dtype, ScalarType out_dtype,
          int64_t wanted_bits, int64_t chunk_size) {
  const char* op = "_mamba_block_bwd";
  const BlockWanted wanted(wanted_bits);
  check_dim(op, "states", states, 4, "(batch, chunks, channels, state_dim)");
  check_dim(op, "xz", xz, 2, "(rows, 2 channels)");
  const int64_t b = states.size(0), m = xz.size(0);
  STD_TORCH_CHECK(b > 0 && m % b == 0, op, ": the ", m, " rows of xz are not of ", b, " sequences");
  const BlockSizes s{b, m / b, A.size(0), A.size(1), dt_proj.size(1)};
  check_matrix(op, "xz", xz, m, 2 * s.d, xz);
  check_matrix(op, "out_proj", out_proj, out_proj.size(0), s.d, xz);
  check_matrix(op, "d_rows", d_rows, m, out_proj.size(0), xz);
  check_matrix(op, "x_dbl", x_dbl, m, s.rank + 2 * s.n, xz);
  check_matrix(op, "x_proj", x_proj, s.rank + 2 * s.n, s.d, xz);
  check_matrix(op, "dt_proj", dt_proj, s.d, s.rank, xz);
  if (conv_rows.has_value()) check_matrix(op, "conv", *conv_rows, m, s.d, xz);
  if (delta.has_value()) check_matrix(op, "delta", *delta, m, s.d, xz);
  if (wanted.out) check_matrix(op, "y", y.value(), m, s.d, xz);
  if (wanted.in) check_matrix(op, "rows", rows.value(), m, rows->size(1), xz);
  if (wanted.hidden) check_matrix(op, "in_proj", in_proj.value(), 2 * s.d, in_proj->size(1), xz);
  const Tensor taps = block_taps(op, conv_weight);
  const torch::stable::accelerator::DeviceGuard guard(xz.get_device_index());
  check_launch(op, enter_device_cuda());
  Tensor conv = s.sequences(conv_rows.has_value() ? *conv_rows : fresh(xz, {m, s.d}));
  if (!conv_rows.has_value()) block_conv_forward(s.sequences(xz), taps, conv_bias, conv);
  conv_rows.reset();
  const Tensor d_out = wanted.out ? weight_gradient(d_rows, *y, out_dtype) : absent(xz);
  Tensor dxz = fresh(xz, {m, 2 * s.d});
  // The scan reads whole pieces of 16 bytes of y's gradient, the last of a row into z's.
  if (s.d % 8 != 0) torch::stable::zero_(dxz);
  // The gradient of y lies where that of x will: the scan has read it before the convolution
  // writes.
  multiply_into(view(dxz, {m, s.d}, {2 * s.d, 1}), d_rows, out_proj);
  BlockInnerGradients g =
      block_inner_backward(s, wanted, dxz, conv, xz, x_dbl, delta, A, states, x_proj, dt_proj,
                           dt_bias, D, x_dtype, dt_dtype, chunk_size);
  conv = Tensor();
  auto [dx, d_taps, d_conv_bias, dinitial] =
      conv_backward(g.conv, std::nullopt, s.sequences(xz), taps, conv_bias, std::nullopt,
                    std::nullopt, s.b, true, s.sequences(dxz));
  g.conv = Tensor();
  const Tensor d_in = wanted.in ? weight_gradient(dxz, *rows, in_dtype) : absent(xz);
  Tensor d_hidden;
  if (!wanted.hidden) {
    d_hidden = absent(xz);
  } else {
    const Tensor flat =
        wide_gradient(dxz, hidden_dtype) ? multiply_wide(dxz, *in_proj) : multiply(dxz, *in_proj);
    const int64_t k = flat.size(1);
    d_hidden = view(flat, {s.b, s.length, k}, {s.length * k, k, 1});
  }
  const int64_t w = d_taps.size(1);
  const Tensor d_conv_weight = view(d_taps, {s.d, 1, w}, {w, w, 1});
  return {d_hidden,
          d_in,
          d_conv_weight,
          conv_bias.has_value() ? d_conv_bias : absent(xz),
          g.x_proj,
          g.dt_proj,
          g.dt_bias,
          g.A,
          g.D,
          d_out,
          wanted.dxz ? dxz : absent(xz)};
}

}  // namespace
}  // namespace mamba

STABLE_TORCH_LIBRARY_IMPL(mamba_ssm, CUDA, m) {
  m.impl("_mamba_block_fwd", TORCH_BOX(&mamba::block_fwd));
  m.impl("_mamba_block_bwd", TORCH_BOX(&mamba::block_bwd));
}
