// The Mamba mixer on the GPU as two torch operators: what mamba_ssm/ops/mamba_block.py computes op
// by op, in one call each, because in a small model the host's time is the cost. Schemas live in
// mamba_ssm/ops/schema.py.
#include <array>

#include "bindings_cuda_parts.h"
#include "bindings_layout.h"
#include "block/cuda/block.h"

// Of torch's C interface of its CUDA operators, straight to cuBLAS.
extern "C" AOTITorchError aoti_torch_cuda_mm_out(AtenTensorHandle out, AtenTensorHandle self,
                                                 AtenTensorHandle mat2);
extern "C" AOTITorchError aoti_torch_cuda_addmm_out(AtenTensorHandle out, AtenTensorHandle self,
                                                    AtenTensorHandle mat1, AtenTensorHandle mat2,
                                                    double beta, double alpha);

namespace mamba {
namespace {

using Sizes = std::vector<int64_t>;

Tensor empty(const Tensor& like, const Sizes& sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}

// A view by strides; `offset` counts from the first element of t.
Tensor view(const Tensor& t, const Sizes& sizes, const Sizes& strides, int64_t offset = 0) {
  int64_t start = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(t.get(), &start));
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(t.get(), static_cast<int64_t>(sizes.size()), sizes.data(),
                                     strides.data(), start + offset, &handle));
  return Tensor(handle);
}

Tensor transposed(const Tensor& t) {
  return view(t, {t.size(1), t.size(0)}, {t.stride(1), t.stride(0)});
}

void multiply_into(const Tensor& out, const Tensor& a, const Tensor& b) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_mm_out(out.get(), a.get(), b.get()));
}

Tensor multiply(const Tensor& a, const Tensor& b) {
  Tensor out = empty(a, {a.size(0), b.size(1)}, a.scalar_type());
  multiply_into(out, a, b);
  return out;
}

// a (16-bit) times b in fp32.
Tensor multiply_wide(const Tensor& a, const Tensor& b) {
  Tensor out = empty(a, {a.size(0), b.size(1)}, ScalarType::Float);
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

// Tensors in another dtype, converted together in one launch.
struct Converter {
  const char* op;
  Conversions all;

  void add(const Tensor& from, const Tensor& to, bool negative_exp = false) {
    STD_TORCH_CHECK(all.count < kMostConversions, op, ": too many conversions");
    Conversion& c = all.all[all.count++];
    c.from = from.data_ptr(), c.to = to.data_ptr(), c.count = from.numel();
    c.from_dtype = dtype_of(op, "an argument", from), c.to_dtype = dtype_of(op, "a result", to);
    c.negative_exp = negative_exp;
  }

  // t if it has that dtype, else a new tensor, which `run` fills.
  Tensor converted(const Tensor& t, ScalarType dtype) {
    if (t.scalar_type() == dtype) return t;
    const Tensor from = torch::stable::contiguous(t);
    kept.push_back(from);
    Tensor to = empty(t, sizes_of(t), dtype);
    add(from, to);
    return to;
  }

  void run(void* stream) { check_launch(op, convert_cuda(all, stream)); }

  std::vector<Tensor> kept;
};

// The sizes of a call, and views of matrices whose rows are (batch, step).
struct BlockSizes {
  int64_t b, length, d, n, rank;

  // d columns of contiguous rows from `start` on as (b, d, l).
  Tensor sequences(const Tensor& rows, int64_t start = 0) const {
    const int64_t k = rows.size(1);
    return view(rows, {b, d, length}, {length * k, 1, k}, start);
  }
  // (b, d, l) whose memory is that of contiguous (b, l, d) as (b l, d).
  Tensor rows(const Tensor& sequences) const { return view(sequences, {b * length, d}, {d, 1}); }
  // n columns of x_proj's result as (b, 1, n, l).
  Tensor selected(const Tensor& x_dbl, int64_t start) const {
    const int64_t k = x_dbl.size(1);
    return view(x_dbl, {b, 1, n, length}, {length * k, n, 1, k}, start);
  }
  Tensor low_rank(const Tensor& x_dbl) const {
    return view(x_dbl, {b * length, rank}, {x_dbl.size(1), 1});
  }
};

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
  check_dim(op, "conv_weight", conv_weight, 2, "(channels, width)");
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
  Tensor rows = used(torch::stable::contiguous(hidden));
  const Tensor w_in = used(in_proj), w_x = used(x_proj), w_dt = used(dt_proj),
               w_out = used(out_proj);
  const Tensor A_from = torch::stable::contiguous(A_log);
  Tensor A = empty(hidden, {s.d, s.n}, ScalarType::Float);
  convert.add(A_from, A, true);
  convert.run(stream);
  const Tensor matrix = view(rows, {s.b * s.length, m}, {m, 1});
  Tensor xz = multiply(matrix, transposed(w_in));
  const Tensor conv = as_rows(block_conv_forward(s.sequences(xz), conv_weight, conv_bias));
  Tensor x_dbl = multiply(s.rows(conv), transposed(w_x));
  const Tensor delta = multiply(s.low_rank(x_dbl), transposed(w_dt));
  auto [y, final_state, states] = selective_scan_fwd(
      conv, s.sequences(delta), A, s.selected(x_dbl, s.rank), s.selected(x_dbl, s.rank + s.n), D,
      s.sequences(xz, s.d), dt_bias, true, std::nullopt, std::nullopt, s.b, chunk_size);
  y = s.rows(as_rows(y));
  const Tensor flat = multiply(y, transposed(w_out));
  const int64_t e = flat.size(1);
  Tensor out = view(flat, {s.b, s.length, e}, {s.length * e, e, 1});
  // What is an argument as it came is no result.
  const auto made = [&](const Tensor& t, const Tensor& from) {
    return t.get() == from.get() || t.data_ptr() == from.data_ptr() ? absent(xz) : t;
  };
  return {out,
          made(matrix, hidden),
          xz,
          x_dbl,
          A,
          y,
          states,
          final_state,
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

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> block_bwd(
    Tensor d_rows, Tensor out_proj, Tensor conv, Tensor rows, Tensor xz, Tensor x_dbl, Tensor A,
    Tensor states, Tensor in_proj, Tensor conv_weight, OptionalTensor conv_bias, Tensor x_proj,
    Tensor dt_proj, OptionalTensor dt_bias, Tensor D, ScalarType hidden_dtype, ScalarType in_dtype,
    ScalarType x_dtype, ScalarType dt_dtype, int64_t wanted, int64_t chunk_size) {
  const char* op = "_mamba_block_bwd";
  const bool wants_hidden = wanted & 1, wants_in = wanted & 2, wants_x = wanted & 4,
             wants_dt = wanted & 8;
  check_dim(op, "conv", conv, 3, "(batch, channels, length)");
  check_dim(op, "xz", xz, 2, "(rows, 2 channels)");
  const BlockSizes s{conv.size(0), conv.size(2), A.size(0), A.size(1), dt_proj.size(1)};
  check_matrix(op, "out_proj", out_proj, out_proj.size(0), s.d, xz);
  check_matrix(op, "d_rows", d_rows, s.b * s.length, out_proj.size(0), xz);
  check_matrix(op, "xz", xz, s.b * s.length, 2 * s.d, xz);
  check_matrix(op, "x_dbl", x_dbl, s.b * s.length, s.rank + 2 * s.n, xz);
  check_matrix(op, "in_proj", in_proj, 2 * s.d, rows.size(1), xz);
  check_matrix(op, "x_proj", x_proj, s.rank + 2 * s.n, s.d, xz);
  check_matrix(op, "dt_proj", dt_proj, s.d, s.rank, xz);
  const torch::stable::accelerator::DeviceGuard guard(xz.get_device_index());
  void* const stream = current_stream(xz);
  Tensor dxz = empty(xz, {s.b * s.length, 2 * s.d}, xz.scalar_type());
  // The gradient of y lies where that of x will: the scan has read it before the convolution
  // writes.
  multiply_into(view(dxz, {s.b * s.length, s.d}, {2 * s.d, 1}), d_rows, out_proj);
  Tensor d_conv, dA, dD, d_dt_bias;
  Tensor d_hidden = absent(xz), d_in_proj = absent(xz), d_x_proj = absent(xz),
         d_dt_proj = absent(xz);
  {
    Tensor dx_dbl = empty(xz, {s.b * s.length, s.rank + 2 * s.n}, xz.scalar_type());
    {
      // In one memory: delta, then its gradient.
      const Tensor ddelta = multiply(s.low_rank(x_dbl), transposed(dt_proj));
      auto [du, ddelta_, dA_, dB, dC, dD_, dz, dbias, dinitial] = scan_backward(
          s.sequences(dxz), std::nullopt, conv, s.sequences(ddelta), A, s.selected(x_dbl, s.rank),
          s.selected(x_dbl, s.rank + s.n), D, s.sequences(xz, s.d), dt_bias, true, std::nullopt,
          std::nullopt, s.b, chunk_size, states, s.sequences(dxz, s.d), true);
      d_conv = as_rows(du), dA = dA_, dD = dD_, d_dt_bias = dbias;
      if (wants_dt) d_dt_proj = weight_gradient(ddelta, s.low_rank(x_dbl), dt_dtype);
      multiply_into(s.low_rank(dx_dbl), ddelta, dt_proj);
      BlockColumns c;
      c.batch = s.b, c.length = s.length, c.states = s.n;
      c.pitch = s.rank + 2 * s.n, c.column = s.rank;
      c.dtype = dtype_of(op, "xz", xz);
      c.dB = dB.data_ptr(), c.dC = dC.data_ptr(), c.rows = dx_dbl.data_ptr();
      c.dA = floats_of(dA), c.A = floats_of(A), c.count = dA.numel();
      check_launch(op, block_columns_cuda(c, stream));
    }
    if (wants_x) d_x_proj = weight_gradient(dx_dbl, s.rows(conv), x_dtype);
    add_product(s.rows(d_conv), dx_dbl, x_proj);
  }
  auto [dx, d_conv_weight, d_conv_bias, dinitial] =
      conv_backward(d_conv, std::nullopt, s.sequences(xz), conv_weight, conv_bias, std::nullopt,
                    std::nullopt, s.b, true, s.sequences(dxz));
  d_conv = Tensor();
  if (wants_in) d_in_proj = weight_gradient(dxz, rows, in_dtype);
  if (wants_hidden) {
    d_hidden =
        wide_gradient(dxz, hidden_dtype) ? multiply_wide(dxz, in_proj) : multiply(dxz, in_proj);
  }
  return {d_hidden, d_in_proj, d_conv_weight, d_conv_bias, d_x_proj, d_dt_proj, d_dt_bias, dA, dD};
}

}  // namespace
}  // namespace mamba

STABLE_TORCH_LIBRARY_IMPL(mamba_ssm, CUDA, m) {
  m.impl("_mamba_block_fwd", TORCH_BOX(&mamba::block_fwd));
  m.impl("_mamba_block_bwd", TORCH_BOX(&mamba::block_bwd));
}
