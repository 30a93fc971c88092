// The selective scan on the CPU as torch operators. Schemas live in mamba_ssm/ops/schema.py.
#include <tuple>

#include "bindings_layout.h"
#include "selective_scan/cpu/scan.h"

namespace mamba {
namespace {

using Sizes = std::vector<int64_t>;

const float* float_data(const Tensor& t) { return static_cast<const float*>(t.data_ptr()); }
float* mutable_float_data(const Tensor& t) { return static_cast<float*>(t.data_ptr()); }

// Keeps converted inputs alive as long as the kernel's pointers into them.
struct ScanCall {
  ScanParams p;
  std::vector<Tensor> kept;
  const char* op;

  TensorArg arg(const char* name, const Tensor& t, const Sizes& shape, const Tensor& like) {
    return tensor_arg(op, name, t, shape, like);
  }
  TensorArg arg(const char* name, const OptionalTensor& t, const Sizes& shape, const Tensor& like) {
    return tensor_arg(op, name, t, shape, like);
  }

  // Contiguous fp32 states of the given shape.
  const float* states(const char* name, const OptionalTensor& t, const Sizes& shape) {
    if (!t.has_value()) return nullptr;
    STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float, op, ": ", name, " must be float32, got ",
                    torch::headeronly::toString(t->scalar_type()));
    STD_TORCH_CHECK(sizes_of(*t) == shape, op, ": ", name, " must have shape ", shape_text(shape),
                    ", got ", shape_text(sizes_of(*t)));
    kept.push_back(torch::stable::contiguous(*t));
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
    kept.push_back(torch::stable::contiguous(*seq_idx));
    p.seq_idx = static_cast<const int32_t*>(kept.back().data_ptr());
    p.seq_idx_stride[0] = p.length;
    p.seq_idx_stride[1] = 1;
    if (p.num_states == 0) return;
    for (int64_t i = 0; i < p.batch * p.length; ++i) {
      STD_TORCH_CHECK(p.seq_idx[i] < p.num_states, op, ": seq_idx holds sequence number ",
                      p.seq_idx[i], ", but there are ", p.num_states, " states");
    }
  }
};

ScanCall scan_call(const char* op, const Tensor& u, const Tensor& delta, const Tensor& A,
                   const Tensor& B, const Tensor& C, const OptionalTensor& D,
                   const OptionalTensor& z, const OptionalTensor& delta_bias, bool delta_softplus,
                   const OptionalTensor& initial_state, const OptionalTensor& seq_idx,
                   int64_t num_states, int64_t chunk_size) {
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
  const Sizes bdl{p.batch, p.channels, p.length};
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

// States that no step belongs to keep their initial value.
void fill_unused_states(const ScanParams& p, const ScanEvents& events) {
  const int64_t size = p.channels * p.state_dim;
  for (int64_t s = 0; s < p.num_states; ++s) {
    if (events.used.empty() ? p.length > 0 : events.used[s]) continue;
    float* const to = p.final_state + s * size;
    for (int64_t i = 0; i < size; ++i)
      to[i] = p.initial_state ? p.initial_state[s * size + i] : 0.0f;
  }
}

std::tuple<Tensor, Tensor, Tensor> selective_scan_fwd(
    Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, OptionalTensor D, OptionalTensor z,
    OptionalTensor delta_bias, bool delta_softplus, OptionalTensor initial_state,
    OptionalTensor seq_idx, int64_t num_states, int64_t chunk_size) {
  ScanCall call = scan_call("_selective_scan_fwd", u, delta, A, B, C, D, z, delta_bias,
                            delta_softplus, initial_state, seq_idx, num_states, chunk_size);
  ScanParams& p = call.p;
  Tensor out = empty_like_layout(u);
  Tensor final_state = torch::stable::new_empty(u, Sizes{num_states, p.channels, p.state_dim},
                                                std::make_optional(ScalarType::Float));
  Tensor chunk_states = torch::stable::new_empty(
      u, Sizes{p.batch, p.chunks, p.channels, p.state_dim}, std::make_optional(ScalarType::Float));
  p.out = call.arg("out", out, {p.batch, p.channels, p.length}, u);
  p.final_state = mutable_float_data(final_state);
  p.chunk_states = mutable_float_data(chunk_states);
  const ScanEvents events = scan_events(p);
  fill_unused_states(p, events);
  if (p.length > 0) {
    torch::stable::parallel_for(0, p.batch * slices_per_row(p), 1, [&](int64_t begin, int64_t end) {
      scan_forward(p, events, begin, end);
    });
  }
  return {out, final_state, chunk_states};
}

// to[i] = sum of `parts` rows of from, in order.
void sum_rows(const float* from, int64_t parts, int64_t size, float* to) {
  torch::stable::parallel_for(0, size, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) to[i] = 0.0f;
    for (int64_t part = 0; part < parts; ++part) {
      for (int64_t i = begin; i < end; ++i) to[i] += from[part * size + i];
    }
  });
}

// The gradient of a variable B or C: sums a group's slices, (b, slices, n, l) -> (b, g, n, l).
void sum_slices(const ScanParams& p, const float* from, float* to) {
  const int64_t size = p.state_dim * p.length, per_group = slices_per_group(p);
  for (int64_t i = 0; i < p.batch * p.groups; ++i) {
    sum_rows(from + i * per_group * size, per_group, size, to + i * size);
  }
}

struct Gradients {
  ScanCall& call;
  const Tensor& like;

  Tensor floats(const Sizes& sizes) {
    return torch::stable::new_empty(like, sizes, std::make_optional(ScalarType::Float));
  }
  Tensor absent() { return torch::stable::new_empty(like, Sizes{0}); }

  // Per batch row partial sums, to be added up over the batch.
  Tensor over_batch(const Tensor& parts, const Sizes& sizes) {
    Tensor total = floats(sizes);
    int64_t size = 1;
    for (int64_t s : sizes) size *= s;
    sum_rows(float_data(parts), call.p.batch, size, mutable_float_data(total));
    return total;
  }

  Tensor projection_parts(bool constant) {
    const ScanParams& p = call.p;
    return constant ? floats({p.batch, p.channels, p.state_dim})
                    : floats({p.batch, slices_per_row(p), p.state_dim, p.length});
  }
  Tensor projection(const Tensor& parts, bool constant, const Tensor& input) {
    const ScanParams& p = call.p;
    Tensor total;
    if (constant) {
      total = over_batch(parts, {p.channels, p.state_dim});
    } else {
      total = floats({p.batch, p.groups, p.state_dim, p.length});
      sum_slices(p, float_data(parts), mutable_float_data(total));
    }
    return input.scalar_type() == ScalarType::Float
               ? total
               : torch::stable::to(total, std::make_optional(input.scalar_type()));
  }
};

using Nine = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Nine selective_scan_bwd(Tensor dout, OptionalTensor dfinal_state, Tensor u, Tensor delta, Tensor A,
                        Tensor B, Tensor C, OptionalTensor D, OptionalTensor z,
                        OptionalTensor delta_bias, bool delta_softplus,
                        OptionalTensor initial_state, OptionalTensor seq_idx, int64_t num_states,
                        int64_t chunk_size, Tensor chunk_states) {
  const char* op = "_selective_scan_bwd";
  ScanCall call = scan_call(op, u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state,
                            seq_idx, num_states, chunk_size);
  ScanGradients g;
  ScanParams& p = call.p;
  const Sizes bdl{p.batch, p.channels, p.length}, sdn{num_states, p.channels, p.state_dim};
  g.dout = call.arg("dout", dout, bdl, u);
  g.dfinal_state = call.states("dfinal_state", dfinal_state, sdn);
  p.chunk_states = const_cast<float*>(
      call.states("chunk_states", chunk_states, {p.batch, p.chunks, p.channels, p.state_dim}));

  Gradients make{call, u};
  Tensor du = empty_like_layout(u), ddelta = empty_like_layout(delta);
  Tensor dz = z.has_value() ? empty_like_layout(*z) : make.absent();
  Tensor dA = make.floats({p.batch, p.channels, p.state_dim});
  Tensor dB = make.projection_parts(p.constant_B), dC = make.projection_parts(p.constant_C);
  Tensor dD = D.has_value() ? make.floats({p.batch, p.channels}) : make.absent();
  Tensor dbias = delta_bias.has_value() ? make.floats({p.batch, p.channels}) : make.absent();
  Tensor dinitial = initial_state.has_value() ? make.floats(sdn) : make.absent();
  g.du = call.arg("du", du, bdl, u);
  g.ddelta = call.arg("ddelta", ddelta, bdl, u);
  if (z.has_value()) g.dz = call.arg("dz", dz, bdl, u);
  g.dA = mutable_float_data(dA), g.dB = mutable_float_data(dB), g.dC = mutable_float_data(dC);
  if (D.has_value()) g.dD = mutable_float_data(dD);
  if (delta_bias.has_value()) g.ddelta_bias = mutable_float_data(dbias);
  const ScanEvents events = scan_events(p);
  if (initial_state.has_value()) {
    g.dinitial_state = mutable_float_data(dinitial);
    // A state that no step belongs to passes its gradient straight on.
    const int64_t size = p.channels * p.state_dim;
    for (int64_t i = 0; i < num_states * size; ++i) {
      const bool unused = events.used.empty() ? p.length == 0 : !events.used[i / size];
      g.dinitial_state[i] = unused && g.dfinal_state ? g.dfinal_state[i] : 0.0f;
    }
  }
  g.forward = p;
  const int64_t units = p.batch * slices_per_row(p);
  const int64_t grain = events.shared_starts ? std::max<int64_t>(1, units) : 1;
  torch::stable::parallel_for(
      0, units, grain, [&](int64_t begin, int64_t end) { scan_backward(g, events, begin, end); });
  Tensor total_dB = make.projection(dB, p.constant_B, B);
  Tensor total_dC = make.projection(dC, p.constant_C, C);
  return {du,
          ddelta,
          make.over_batch(dA, {p.channels, p.state_dim}),
          total_dB,
          total_dC,
          D.has_value() ? make.over_batch(dD, {p.channels}) : dD,
          dz,
          delta_bias.has_value() ? make.over_batch(dbias, {p.channels}) : dbias,
          dinitial};
}

}  // namespace
}  // namespace mamba

STABLE_TORCH_LIBRARY_IMPL(mamba_ssm, CPU, m) {
  m.impl("_selective_scan_fwd", TORCH_BOX(&mamba::selective_scan_fwd));
  m.impl("_selective_scan_bwd", TORCH_BOX(&mamba::selective_scan_bwd));
}
