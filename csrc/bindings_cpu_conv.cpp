// The causal convolution on the CPU as torch operators. Schemas live in mamba_ssm/ops/schema.py.
#include <algorithm>

#include "bindings_conv.h"
#include "bindings_threads.h"
#include "causal_conv1d/cpu/conv.h"
#include "causal_conv1d/cpu/conv_plan.h"
#include "common/reduce_rows.h"

namespace mamba {
namespace {

constexpr int64_t kGrain = 16384;  // elements that make waking another thread worth it

int64_t grain_of(int64_t elements) {
  return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, elements));
}

const int32_t* ids_of(const OptionalTensor& seq_idx) {
  return seq_idx.has_value() ? static_cast<const int32_t*>(seq_idx->data_ptr()) : nullptr;
}

bool fast_over_channels(const ConvParams& p, const Tensor& x) {
  return is_channel_last(x) && p.width >= 2 && p.width <= 4;
}

using Kernel = void (*)(const ConvParams&, int64_t, int64_t, int64_t, float*);

// Runs the kernel on every group of steps and block of channels.
void run(const ConvParams& p, Kernel kernel, int64_t block, int64_t piece) {
  const int64_t blocks = (p.channels + block - 1) / block;
  const int64_t elements = std::min(block, p.channels) * std::min(piece, p.length);
  parallel_for(0, p.num_groups * blocks, grain_of(elements), [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(static_cast<size_t>(conv_scratch_size(p)));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % blocks * block, last = std::min(first + block, p.channels);
      kernel(p, i / blocks, first, last, scratch.data());
    }
  });
}

std::tuple<Tensor, Tensor> conv_fwd(Tensor x, Tensor weight, OptionalTensor bias,
                                    OptionalTensor initial_states, OptionalTensor seq_idx,
                                    int64_t num_states, bool silu) {
  const char* op = "_causal_conv1d_fwd";
  ConvParams p = conv_params(op, x, weight, bias, initial_states, seq_idx, num_states, silu);
  const int64_t d = p.channels, last = p.width - 1;
  const std::vector<int64_t> state_sizes{num_states, d, last};
  Tensor out = empty_like_layout(x), final = torch::stable::new_empty(x, state_sizes);
  p.out = tensor_arg(op, "out", out, sizes_of(x), x);
  p.final = tensor_arg(op, "final_states", final, state_sizes, x);
  const bool channels = fast_over_channels(p, x);
  const int64_t piece = channels ? kChannelPiece : kTimePiece;
  const ConvPlan plan(p, ids_of(seq_idx), seq_idx.has_value() ? seq_idx->stride(0) : 0,
                      seq_idx.has_value() ? seq_idx->stride(1) : 0, piece);
  run(p, channels ? conv_fwd_channels : conv_fwd_time, channels ? kChannelBlock : kTimeBlock,
      piece);
  parallel_for(0, d, grain_of(num_states * last),
               [&](int64_t begin, int64_t end) { conv_final_states(p, begin, end); });
  return {out, final};
}

// dout in memory that conv_bwd_channels can read.
Tensor channel_last(const Tensor& dout) {
  if (dout.stride(1) == 1) return dout;
  const std::vector<int64_t> sizes{dout.size(0), dout.size(2), dout.size(1)};
  Tensor copy = torch::stable::transpose(torch::stable::new_empty(dout, sizes), 1, 2);
  torch::stable::copy_(copy, dout);
  return copy;
}

// The sums of the groups' shares as dweight (channels, width) and dbias (channels,).
void add_shares(const ConvParams& p, float* dweight, float* dbias) {
  const int64_t d = p.channels, w = p.width;
  parallel_for(0, d, grain_of(p.num_groups * (w + 1)), [&](int64_t begin, int64_t end) {
    for (int64_t k = 0; k <= w; ++k) {
      reduce_rows(p.partial, p.num_groups, (w + 1) * d, k * d + begin, k * d + end);
      for (int64_t c = begin; c < end; ++c) {
        const float sum = p.num_groups > 0 ? p.partial[k * d + c] : 0.0f;
        if (k < w) {
          dweight[c * w + k] = sum;
        } else if (dbias) {
          dbias[c] = sum;
        }
      }
    }
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> conv_bwd(Tensor dout, OptionalTensor dfinal_states,
                                                    Tensor x, Tensor weight, OptionalTensor bias,
                                                    OptionalTensor initial_states,
                                                    OptionalTensor seq_idx, int64_t num_states,
                                                    bool silu) {
  const char* op = "_causal_conv1d_bwd";
  ConvParams p = conv_params(op, x, weight, bias, initial_states, seq_idx, num_states, silu);
  const int64_t d = p.channels, last = p.width - 1;
  const std::vector<int64_t> state_sizes{num_states, d, last};
  p.dout = tensor_arg(op, "dout", dout, sizes_of(x), x);
  p.dfinal = tensor_arg(op, "dfinal_states", dfinal_states, state_sizes, x);
  const bool channels = fast_over_channels(p, x) && p.dout.dtype == p.x.dtype;
  if (channels) {
    dout = channel_last(dout);
    p.dout = tensor_arg(op, "dout", dout, sizes_of(x), x);
  }
  Tensor dx = empty_like_layout(x), dweight = new_floats(x, {d, p.width});
  Tensor dbias = new_floats(x, {bias.has_value() ? d : 0});
  p.dx = tensor_arg(op, "dx", dx, sizes_of(x), x);
  const int64_t piece = channels ? kChannelPiece : kTimePiece;
  const ConvPlan plan(p, ids_of(seq_idx), seq_idx.has_value() ? seq_idx->stride(0) : 0,
                      seq_idx.has_value() ? seq_idx->stride(1) : 0, piece);
  Tensor partial = new_floats(x, {p.num_groups, p.width + 1, d});
  p.partial = floats_of(partial);
  run(p, channels ? conv_bwd_channels : conv_bwd_time, channels ? kChannelBlock : kTimeBlock,
      piece);
  add_shares(p, floats_of(dweight), floats_of(dbias));

  if (!bias.has_value()) dbias = torch::stable::new_empty(x, std::vector<int64_t>{0});
  if (!initial_states.has_value()) {
    return {dx, dweight, dbias, torch::stable::new_empty(x, std::vector<int64_t>{0})};
  }
  Tensor dinitial = new_floats(x, state_sizes);
  p.dinitial = floats_of(dinitial);
  const int64_t work = (num_states + p.num_runs * p.width) * last;
  parallel_for(0, last > 0 ? d : 0, grain_of(work),
               [&](int64_t begin, int64_t end) { conv_initial_grad(p, begin, end); });
  if (p.x.dtype != DType::kFloat32) {
    Tensor rounded = torch::stable::new_empty(x, state_sizes);
    torch::stable::copy_(rounded, dinitial);
    dinitial = rounded;
  }
  return {dx, dweight, dbias, dinitial};
}

int64_t integer_at(const char* op, const char* name, const Tensor& t, int64_t i) {
  const int64_t at = i * t.stride(0);
  switch (t.scalar_type()) {
    case ScalarType::Long:
      return static_cast<const int64_t*>(t.data_ptr())[at];
    case ScalarType::Int:
      return static_cast<const int32_t*>(t.data_ptr())[at];
    case ScalarType::Short:
      return static_cast<const int16_t*>(t.data_ptr())[at];
    case ScalarType::Char:
      return static_cast<const int8_t*>(t.data_ptr())[at];
    case ScalarType::Byte:
      return static_cast<const uint8_t*>(t.data_ptr())[at];
    default:
      STD_TORCH_CHECK(false, op, ": ", name, " must hold integers, got ",
                      torch::headeronly::toString(t.scalar_type()));
  }
}

std::vector<int64_t> integers(const char* op, const char* name, const Tensor& t, int64_t count) {
  const auto sizes = sizes_of(t);
  STD_TORCH_CHECK(sizes == std::vector<int64_t>{count} && !t.is_cuda(), op, ": ", name,
                  " must have shape ", shape_text({count}), " on the CPU, got ", shape_text(sizes));
  std::vector<int64_t> values(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) values[i] = integer_at(op, name, t, i);
  return values;
}

// The row of the state of each batch entry; negative ones are skipped.
std::vector<int64_t> state_rows(const char* op, const OptionalTensor& indices, int64_t batch,
                                int64_t rows) {
  if (!indices.has_value()) {
    STD_TORCH_CHECK(rows == batch, op, ": conv_state has ", rows, " rows but x has ", batch,
                    "; they must be equal unless conv_state_indices is given");
    std::vector<int64_t> all(static_cast<size_t>(batch));
    for (int64_t i = 0; i < batch; ++i) all[i] = i;
    return all;
  }
  std::vector<int64_t> found = integers(op, "conv_state_indices", *indices, batch), used;
  for (int64_t i = 0; i < batch; ++i) {
    STD_TORCH_CHECK(found[i] < rows, op, ": conv_state_indices[", i, "] is ", found[i],
                    " but conv_state has ", rows, " rows");
    if (found[i] >= 0) used.push_back(found[i]);
  }
  std::sort(used.begin(), used.end());
  const auto twice = std::adjacent_find(used.begin(), used.end());
  STD_TORCH_CHECK(twice == used.end(), op, ": conv_state_indices names row ", *twice,
                  " more than once; non-negative indices must be distinct");
  return found;
}

Tensor conv_update_op(Tensor x, Tensor conv_state, Tensor weight, OptionalTensor bias, bool silu,
                      OptionalTensor cache_seqlens, OptionalTensor conv_state_indices) {
  const char* op = "_causal_conv1d_update";
  ConvUpdateParams p = conv_update_params(op, x, conv_state, weight, bias, silu);
  const int64_t b = p.batch, d = p.channels, rows = conv_state.size(0);
  const std::vector<int64_t> state_row = state_rows(op, conv_state_indices, b, rows);
  std::vector<int64_t> start;
  if (cache_seqlens.has_value()) {
    start = integers(op, "cache_seqlens", *cache_seqlens, b);
    for (int64_t& at : start) {
      at = p.columns > 0 ? (at % p.columns + p.columns) % p.columns : 0;
    }
    p.start = start.data();
  }
  p.rows = state_row.data();
  Tensor out = torch::stable::new_empty(x, sizes_of(x));
  p.out = tensor_arg(op, "out", out, sizes_of(x), x);
  const int64_t blocks = (d + kUpdateBlock - 1) / kUpdateBlock;
  const int64_t elements = std::min(d, kUpdateBlock) * (p.length + p.columns);
  parallel_for(0, b * blocks, grain_of(elements), [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(static_cast<size_t>(conv_update_scratch_size(p)));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % blocks * kUpdateBlock;
      conv_update(p, i / blocks, first, std::min(first + kUpdateBlock, d), scratch.data());
    }
  });
  return out;
}

}  // namespace
}  // namespace mamba

STABLE_TORCH_LIBRARY_IMPL(mamba_ssm, CPU, m) {
  m.impl("_causal_conv1d_fwd", TORCH_BOX(&mamba::conv_fwd));
  m.impl("_causal_conv1d_bwd", TORCH_BOX(&mamba::conv_bwd));
  m.impl("_causal_conv1d_update", TORCH_BOX(&mamba::conv_update_op));
}
