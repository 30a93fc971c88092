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

BlockForward block_forward(const BlockSizes& s, const Tensor& rows, const BlockWeights& w,
                           int64_t chunk_size) {
  BlockForward f;
  f.xz = multiply(rows, transposed(w.in_proj));
  const Tensor conv = as_rows(block_conv_forward(s.sequences(f.xz), w.taps, w.conv_bias));
  f.x_dbl = multiply(s.rows(conv), transposed(w.x_proj));
  const Tensor delta = multiply(s.low_rank(f.x_dbl), transposed(w.dt_proj));
  std::tie(f.y, f.final_state, f.states) = selective_scan_fwd(
      conv, s.sequences(delta), w.A, s.selected(f.x_dbl, s.rank), s.selected(f.x_dbl, s.rank + s.n),
      w.D, s.sequences(f.xz, s.d), w.dt_bias, true, std::nullopt, std::nullopt, s.b, chunk_size);
  f.y = s.rows(as_rows(f.y));
  f.out = multiply(f.y, transposed(w.out_proj));
  return f;
}

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
           Tensor>
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
  const BlockForward f = block_forward(
      s, matrix, {w_in, block_taps(op, conv_weight), w_x, w_dt, A, D, w_out, conv_bias, dt_bias},
      chunk_size);
  const int64_t e = f.out.size(1);
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
          made(w_out, out_proj)};
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
BlockInnerGradients block_inner_backward(const char* op, const BlockSizes& s,
                                         const BlockWanted& wanted, const Tensor& dxz,
                                         const Tensor& conv, const Tensor& xz, const Tensor& x_dbl,
                                         const Tensor& A, const Tensor& states,
                                         const Tensor& x_proj, const Tensor& dt_proj,
                                         const OptionalTensor& dt_bias, const Tensor& D,
                                         ScalarType x_dtype, ScalarType dt_dtype,
                                         int64_t chunk_size) {
  // In one memory: delta, then its gradient.
  const Tensor ddelta = multiply(s.low_rank(x_dbl), transposed(dt_proj));
  auto [du, ddelta_, dA, dB, dC, dD, dz, d_dt_bias, dinitial] = scan_backward(
      s.sequences(dxz), std::nullopt, conv, s.sequences(ddelta), A, s.selected(x_dbl, s.rank),
      s.selected(x_dbl, s.rank + s.n), D, s.sequences(xz, s.d), dt_bias, true, std::nullopt,
      std::nullopt, s.b, chunk_size, states, s.sequences(dxz, s.d), true);
  BlockInnerGradients g{as_rows(du), dA, dD, d_dt_bias, absent(xz), absent(xz)};
  if (wanted.dt) g.dt_proj = weight_gradient(ddelta, s.low_rank(x_dbl), dt_dtype);
  const Tensor dx_dbl = fresh(xz, {s.b * s.length, s.rank + 2 * s.n});
  multiply_into(s.low_rank(dx_dbl), ddelta, dt_proj);
  BlockColumns c;
  c.batch = s.b, c.length = s.length, c.states = s.n;
  c.pitch = s.rank + 2 * s.n, c.column = s.rank;
  c.dtype = dtype_of(op, "xz", xz);
  c.dB = dB.data_ptr(), c.dC = dC.data_ptr(), c.rows = dx_dbl.data_ptr();
  c.dA = floats_of(dA), c.A = floats_of(A), c.count = dA.numel();
  check_launch(op, block_columns_cuda(c, current_stream(xz)));
  if (wanted.x) g.x_proj = weight_gradient(dx_dbl, s.rows(conv), x_dtype);
  add_product(s.rows(g.conv), dx_dbl, x_proj);
  return g;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
block_bwd(Tensor d_rows, OptionalTensor y, Tensor out_proj, OptionalTensor rows, Tensor xz,
          Tensor x_dbl, Tensor A, Tensor states, OptionalTensor in_proj, Tensor conv_weight,
          OptionalTensor conv_bias, Tensor x_proj, Tensor dt_proj, OptionalTensor dt_bias, Tensor D,
          ScalarType hidden_dtype, ScalarType in_dtype, ScalarType x_dtype, ScalarType dt_dtype,
          ScalarType out_dtype, int64_t wanted_bits, int64_t chunk_size) {
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
  if (wanted.out) check_matrix(op, "y", y.value(), m, s.d, xz);
  if (wanted.in) check_matrix(op, "rows", rows.value(), m, rows->size(1), xz);
  if (wanted.hidden) check_matrix(op, "in_proj", in_proj.value(), 2 * s.d, in_proj->size(1), xz);
  const Tensor taps = block_taps(op, conv_weight);
  const torch::stable::accelerator::DeviceGuard guard(xz.get_device_index());
  // Before any product: torch warns where a thread's first work on a GPU is a matrix product.
  Tensor conv = as_rows(block_conv_forward(s.sequences(xz), taps, conv_bias));
  const Tensor d_out = wanted.out ? weight_gradient(d_rows, *y, out_dtype) : absent(xz);
  Tensor dxz = fresh(xz, {m, 2 * s.d});
  // The scan reads whole pieces of 16 bytes of y's gradient, the last of a row into z's.
  if (s.d % 8 != 0) torch::stable::zero_(dxz);
  // The gradient of y lies where that of x will: the scan has read it before the convolution
  // writes.
  multiply_into(view(dxz, {m, s.d}, {2 * s.d, 1}), d_rows, out_proj);
  BlockInnerGradients g =
      block_inner_backward(op, s, wanted, dxz, conv, xz, x_dbl, A, states, x_proj, dt_proj, dt_bias,
                           D, x_dtype, dt_dtype, chunk_size);
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
          d_conv_bias,
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
