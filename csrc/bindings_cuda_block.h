// The Mamba mixer's forward on the GPU between its bindings: as one operator for a layer, and for
// all layers of a model that consumes a prompt.
#pragma once

#include "bindings_cuda_parts.h"
#include "bindings_cuda_views.h"
#include "block/cuda/block.h"

namespace mamba {

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
    const Tensor from = contiguous_of(t);
    kept.push_back(from);
    Tensor to = fresh(t, sizes_of(t), dtype);
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

// A layer's weights in the dtype of its products; A (d, n) in fp32, taps (d, width).
struct BlockWeights {
  Tensor in_proj, taps, x_proj, dt_proj, A, D, out_proj;
  OptionalTensor conv_bias, dt_bias;
};

// The memory of a forward, which one layer after another may fill: allocations and views take the
// host longer than the kernels of a short prompt take the GPU.
struct BlockForward {
  // In the dtype of `like`, for e outputs a step.
  BlockForward(const BlockSizes& s, const Tensor& like, int64_t e, int64_t chunk_size);

  Tensor xz, conv, x_dbl, delta, y, out;       // rows
  Tensor final_state, states;                  // (b, d, n), and those kept for the backward
  Tensor x, u, delta_steps, B, C, z, scanned;  // sequences: views of rows, as the scan takes them
  Tensor low_rank;                             // of x_dbl, rows
};

// `rows` are the contiguous rows of the input. On the current device.
void block_forward(const Tensor& rows, const BlockWeights& w, int64_t chunk_size,
                   const BlockForward& f);

// The convolution's weight (channels, 1, width) as (channels, width).
Tensor block_taps(const char* op, const Tensor& weight);

}  // namespace mamba
