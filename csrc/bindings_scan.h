// Checks and descriptions of the scan's arguments, shared by the CPU and CUDA bindings.
#pragma once

#include <algorithm>
#include <tuple>

#include "bindings_layout.h"
#include "selective_scan/params.h"

namespace mamba {

using Sizes = std::vector<int64_t>;

inline const float* float_data(const Tensor& t) { return static_cast<const float*>(t.data_ptr()); }
inline float* mutable_float_data(const Tensor& t) { return static_cast<float*>(t.data_ptr()); }

// Keeps converted inputs alive as long as the kernel's pointers into them.
struct ScanCall {
  ScanParams p;
  std::vector<Tensor> kept;
  const char* op;

  TensorArg arg(const char* name, const Tensor& t, const Shape& shape, const Tensor& like) {
    return tensor_arg(op, name, t, shape, like);
  }
  TensorArg arg(const char* name, const OptionalTensor& t, const Shape& shape, const Tensor& like) {
    return tensor_arg(op, name, t, shape, like);
  }

  // Contiguous fp32 states of the given shape.
  const float* states(const char* name, const OptionalTensor& t, const Sizes& shape) {
    if (!t.has_value()) return nullptr;
    STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float, op, ": ", name, " must be float32, got ",
                    torch::headeronly::toString(t->scalar_type()));
    STD_TORCH_CHECK(sizes_of(*t) == shape, op, ": ", name, " must have shape ", shape_text(shape),
                    ", got ", shape_text(sizes_of(*t)));
    kept.push_back(contiguous_of(*t));
    return float_data(kept.back());
  }

  // B or C: (d, n), or (b, g, n, l). Returns the number of groups, 0 for a constant.
  int64_t projection(const char* name, const Tensor& t, const Tensor& u, TensorArg* to) {
    if (t.dim() == 2) {
      *to = arg(name, t, {p.channels, p.state_dim}, u);
      return 0;
    }
    check_dim(op, name, t, 4, "(batch, groups, state_dim, length)");
    const int64_t groups = t.size(1);
    STD_TORCH_CHECK(groups > 0 && p.channels % groups == 0, op, ": ", name, " has ", groups,
                    " groups, which do not divide the ", p.channels, " channels");
    *to = arg(name, t, {p.batch, groups, p.state_dim, p.length}, u);
    return groups;
  }

  void sequence_numbers(const OptionalTensor& seq_idx) {
    if (!seq_idx.has_value()) {
      STD_TORCH_CHECK(p.num_states == p.batch, op, ": num_states is ", p.num_states,
                      " but the batch is ", p.batch);
      return;
    }
    STD_TORCH_CHECK(seq_idx->scalar_type() == ScalarType::Int, op, ": seq_idx must be int32, got ",
                    torch::headeronly::toString(seq_idx->scalar_type()));
    STD_TORCH_CHECK(sizes_of(*seq_idx) == (Sizes{p.batch, p.length}), op,
                    ": seq_idx must have shape ", shape_text({p.batch, p.length}), ", got ",
                    shape_text(sizes_of(*seq_idx)));
    kept.push_back(contiguous_of(*seq_idx));
    p.seq_idx = static_cast<const int32_t*>(kept.back().data_ptr());
    p.seq_idx_stride[0] = p.length;
    p.seq_idx_stride[1] = 1;
  }
};

inline ScanCall scan_call(const char* op, const Tensor& u, const Tensor& delta, const Tensor& A,
                          const Tensor& B, const Tensor& C, const OptionalTensor& D,
                          const OptionalTensor& z, const OptionalTensor& delta_bias,
                          bool delta_softplus, const OptionalTensor& initial_state,
                          const OptionalTensor& seq_idx, int64_t num_states, int64_t chunk_size) {
  ScanCall call;
  call.op = op;
  ScanParams& p = call.p;
  check_dim(op, "u", u, 3, "(batch, channels, length)");
  check_dim(op, "A", A, 2, "(channels, state_dim)");
  p.batch = u.size(0), p.channels = u.size(1), p.length = u.size(2), p.state_dim = A.size(1);
  STD_TORCH_CHECK(chunk_size > 0, op, ": chunk_size must be positive, got ", chunk_size);
  STD_TORCH_CHECK(num_states >= 0, op, ": num_states must not be negative, got ", num_states);
  p.num_states = num_states, p.chunk_size = chunk_size;
  p.chunks = (p.length + chunk_size - 1) / chunk_size;
  p.delta_softplus = delta_softplus;
  const int64_t bdl_sizes[] = {p.batch, p.channels, p.length};
  const Shape bdl(bdl_sizes, 3);
  p.u = call.arg("u", u, bdl, u);
  p.delta = call.arg("delta", delta, bdl, u);
  p.z = call.arg("z", z, bdl, u);
  p.A = call.arg("A", A, {p.channels, p.state_dim}, u);
  p.D = call.arg("D", D, {p.channels}, u);
  p.delta_bias = call.arg("delta_bias", delta_bias, {p.channels}, u);
  const int64_t groups_B = call.projection("B", B, u, &p.B);
  const int64_t groups_C = call.projection("C", C, u, &p.C);
  STD_TORCH_CHECK(groups_B == groups_C || !groups_B || !groups_C, op, ": B has ", groups_B,
                  " groups but C has ", groups_C);
  p.constant_B = !groups_B, p.constant_C = !groups_C;
  p.groups = std::max<int64_t>(1, std::max(groups_B, groups_C));
  call.sequence_numbers(seq_idx);
  p.initial_state =
      call.states("initial_state", initial_state, {num_states, p.channels, p.state_dim});
  return call;
}

using ScanNineTensors =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

}  // namespace mamba
