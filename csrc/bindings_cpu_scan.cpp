// The selective scan on the CPU as torch operators. Schemas live in mamba_ssm/ops/schema.py.
#include "bindings_scan.h"
#include "bindings_threads.h"
#include "selective_scan/cpu/scan.h"

namespace mamba {
namespace {

void check_sequence_numbers(const ScanCall& call) {
  const ScanParams& p = call.p;
  if (!p.seq_idx || p.num_states == 0) return;
  for (int64_t i = 0; i < p.batch * p.length; ++i) {
    STD_TORCH_CHECK(p.seq_idx[i] < p.num_states, call.op, ": seq_idx holds sequence number ",
                    p.seq_idx[i], ", but there are ", p.num_states, " states");
  }
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
  check_sequence_numbers(call);
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
  ScanCarry carry(p, false);
  const auto run = [&](ScanPart part, int64_t first, int64_t last) {
    parallel_for(first, last, 1, [&](int64_t begin, int64_t end) {
      scan_forward(p, events, carry, part, begin, end);
    });
  };
  if (carry.segments > 1) {
    run(ScanPart::kFirst, 0, carry.segments - 1);
    run(ScanPart::kSecond, 1, carry.segments);
  } else if (p.length > 0) {
    run(ScanPart::kAll, 0, p.batch * slices_per_row(p));
  }
  return {out, final_state, chunk_states};
}

// to[i] = sum of `parts` rows of from, in order.
void sum_rows(const float* from, int64_t parts, int64_t size, float* to) {
  parallel_for(0, size, 4096, [&](int64_t begin, int64_t end) {
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
  int64_t parts;  // rows of partial sums

  Tensor floats(const Sizes& sizes) {
    return torch::stable::new_empty(like, sizes, std::make_optional(ScalarType::Float));
  }
  Tensor absent() { return torch::stable::new_empty(like, Sizes{0}); }

  // Partial sums of each batch row, or segment of it, to be added up.
  Tensor over_batch(const Tensor& from, const Sizes& sizes) {
    Tensor total = floats(sizes);
    int64_t size = 1;
    for (int64_t s : sizes) size *= s;
    sum_rows(float_data(from), parts, size, mutable_float_data(total));
    return total;
  }

  Tensor projection_parts(bool constant) {
    const ScanParams& p = call.p;
    return constant ? floats({parts, p.channels, p.state_dim})
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

ScanNineTensors selective_scan_bwd(Tensor dout, OptionalTensor dfinal_state, Tensor u, Tensor delta,
                                   Tensor A, Tensor B, Tensor C, OptionalTensor D, OptionalTensor z,
                                   OptionalTensor delta_bias, bool delta_softplus,
                                   OptionalTensor initial_state, OptionalTensor seq_idx,
                                   int64_t num_states, int64_t chunk_size, Tensor chunk_states) {
  const char* op = "_selective_scan_bwd";
  ScanCall call = scan_call(op, u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state,
                            seq_idx, num_states, chunk_size);
  check_sequence_numbers(call);
  ScanGradients g;
  ScanParams& p = call.p;
  const Sizes bdl{p.batch, p.channels, p.length}, sdn{num_states, p.channels, p.state_dim};
  g.dout = call.arg("dout", dout, bdl, u);
  g.dfinal_state = call.states("dfinal_state", dfinal_state, sdn);
  p.chunk_states = const_cast<float*>(
      call.states("chunk_states", chunk_states, {p.batch, p.chunks, p.channels, p.state_dim}));

  ScanCarry carry(p, true);
  Gradients make{call, u, p.batch * carry.segments};
  Tensor du = empty_like_layout(u), ddelta = empty_like_layout(delta);
  Tensor dz = z.has_value() ? empty_like_layout(*z) : make.absent();
  Tensor dA = make.floats({make.parts, p.channels, p.state_dim});
  Tensor dB = make.projection_parts(p.constant_B), dC = make.projection_parts(p.constant_C);
  Tensor dD = D.has_value() ? make.floats({make.parts, p.channels}) : make.absent();
  Tensor dbias = delta_bias.has_value() ? make.floats({make.parts, p.channels}) : make.absent();
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
  const int64_t units = p.batch * slices_per_row(p), segments = carry.segments;
  // Segments of a row may share an initial state as well.
  const bool alone = events.shared_starts || (segments > 1 && p.seq_idx && g.dinitial_state);
  const auto run = [&](ScanPart part, int64_t first, int64_t last) {
    parallel_for(
        first, last, alone ? std::max<int64_t>(1, last - first) : 1,
        [&](int64_t begin, int64_t end) { scan_backward(g, events, carry, part, begin, end); });
  };
  if (segments > 1) {
    run(ScanPart::kFirst, 1, segments);
    run(ScanPart::kSecond, 0, segments - 1);
  } else {
    run(ScanPart::kAll, 0, units);
  }
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
