// The selective scan on the GPU as torch operators. Schemas live in mamba_ssm/ops/schema.py.
#include "bindings_cuda_parts.h"
#include "bindings_scan.h"
#include "selective_scan/cuda/scan.h"
#include "selective_scan/cuda/scan_backward.h"

namespace mamba {
namespace {

// The meaning of seq_idx on the device, and the memory that holds it.
struct DeviceEvents {
  CudaScanEvents events;
  std::vector<Tensor> kept;

  DeviceEvents(const ScanCall& call, const Tensor& u, void* stream) {
    const ScanParams& p = call.p;
    if (!p.seq_idx) return;
    const auto integers = [&](const Sizes& sizes, ScalarType type) {
      kept.push_back(fresh(u, sizes, type));
      return kept.back().data_ptr();
    };
    auto* before = static_cast<int*>(integers({p.batch, p.length}, ScalarType::Int));
    auto* after = static_cast<int*>(integers({p.batch, p.length}, ScalarType::Int));
    auto* last = static_cast<long long*>(integers({p.num_states}, ScalarType::Long));
    check_launch(call.op, scan_events_cuda(p, before, after, last, stream));
    events.before = before, events.after = after, events.last = last;
  }
};

void check_limits(const ScanCall& call) {
  const ScanParams& p = call.p;
  STD_TORCH_CHECK(p.chunk_size == kCudaChunk || p.chunk_size >= p.length, call.op,
                  ": chunk_size must be ", kCudaChunk, " or cover the whole length ", p.length,
                  " on CUDA, got ", p.chunk_size);
  STD_TORCH_CHECK(p.state_dim <= kCudaMaxStates, call.op,
                  ": the CUDA kernel serves a state of up to ", kCudaMaxStates, ", got ",
                  p.state_dim);
}

// The forward's kernels, with the scratch memory that they want.
void launch_forward(const ScanCall& call, const ScanParams& p, const CudaScanEvents& events,
                    const Tensor& like, void* stream) {
  std::optional<Tensor> scratch;
  if (const int64_t count = scan_forward_scratch(p, events)) {
    scratch = fresh(like, Sizes{count}, ScalarType::Float);
  }
  check_launch(call.op, scan_forward_cuda(
                            p, events, scratch ? mutable_float_data(*scratch) : nullptr, stream));
}

ThreeTensors selective_scan_fwd(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C,
                                OptionalTensor D, OptionalTensor z, OptionalTensor delta_bias,
                                bool delta_softplus, OptionalTensor initial_state,
                                OptionalTensor seq_idx, int64_t num_states, int64_t chunk_size) {
  ScanCall call = scan_call("_selective_scan_fwd", u, delta, A, B, C, D, z, delta_bias,
                            delta_softplus, initial_state, seq_idx, num_states, chunk_size);
  check_limits(call);
  const torch::stable::accelerator::DeviceGuard guard(u.get_device_index());
  void* const stream = current_stream(u);
  ScanParams& p = call.p;
  Tensor out = empty_like_layout(u);
  Tensor final_state = fresh(u, Sizes{num_states, p.channels, p.state_dim}, ScalarType::Float);
  Tensor chunk_states =
      fresh(u, Sizes{p.batch, p.chunks, p.channels, p.state_dim}, ScalarType::Float);
  p.out = call.arg("out", out, {p.batch, p.channels, p.length}, u);
  p.final_state = mutable_float_data(final_state);
  p.chunk_states = mutable_float_data(chunk_states);
  const DeviceEvents device(call, u, stream);
  check_launch(call.op,
               fill_unused_states_cuda(p, device.events, p.initial_state, p.final_state, stream));
  launch_forward(call, p, device.events, u, stream);
  return {out, final_state, chunk_states};
}

}  // namespace

void block_scan_forward(const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B,
                        const Tensor& C, const Tensor& D, const Tensor& z,
                        const OptionalTensor& delta_bias, int64_t chunk_size, const Tensor& out,
                        const Tensor& final_state, const Tensor& chunk_states) {
  ScanCall call = scan_call("_selective_scan_fwd", u, delta, A, B, C, D, z, delta_bias, true,
                            std::nullopt, std::nullopt, u.size(0), chunk_size);
  check_limits(call);
  ScanParams& p = call.p;
  p.out = call.arg("out", out, {p.batch, p.channels, p.length}, u);
  p.final_state = mutable_float_data(final_state);
  p.chunk_states = mutable_float_data(chunk_states);
  void* const stream = current_stream(u);
  const CudaScanEvents events;
  // A sequence without a step ends in the state it began with.
  check_launch(call.op, fill_unused_states_cuda(p, events, nullptr, p.final_state, stream));
  launch_forward(call, p, events, u, stream);
}

namespace {

// What the backward allocates beside its results.
struct BackwardMemory {
  const Tensor& like;
  std::vector<Tensor> kept = {};
  float* next = nullptr;
  int64_t left = 0;

  Tensor floats(const Sizes& sizes) { return fresh(like, sizes, ScalarType::Float); }
  // Scratch memory comes out of one allocation as long as that lasts.
  void reserve(int64_t count) {
    kept.push_back(floats({count}));
    next = mutable_float_data(kept.back()), left = count;
  }
  float* scratch(const Sizes& sizes) {
    int64_t count = 1;
    for (const int64_t size : sizes) count *= size;
    count = padded(count);
    if (count > left) reserve(count);
    float* const from = next;
    next += count, left -= count;
    return from;
  }
  // Every piece begins at a multiple of 256 bytes.
  static int64_t padded(int64_t count) { return (count + 63) / 64 * 64; }
  int* integers(int64_t count) {
    kept.push_back(fresh(like, Sizes{count}, ScalarType::Int));
    return static_cast<int*>(kept.back().data_ptr());
  }
};

// Results that are sums over rows and segments or over slices, and what they are summed from.
struct PendingSums {
  BackwardSums sums;
  BackwardMemory& memory;

  // Returns the memory of the parts; `to` is the contiguous result.
  float* add_parts(const ScanCall& call, const char* name, const Tensor& to,
                   const float* factor = nullptr) {
    PartialSum& sum = sums.parts[sums.part_sums++];
    sum.to = call_arg(call, name, to);
    sum.size = to.numel(), sum.factor = factor;
    float* const from = memory.scratch({sums.part_count, sum.size});
    sum.from = from;
    return from;
  }
  // The same of what slices of channels share; `to` may have any strides.
  float* add_slices(const ScanCall& call, const char* name, const Tensor& to, const Sizes& sizes) {
    SliceSum& sum = sums.slices[sums.slice_sums++];
    sum.to = call_arg(call, name, to);
    float* const from = memory.scratch(sizes);
    sum.from = from;
    return from;
  }
  static TensorArg call_arg(const ScanCall& call, const char* name, const Tensor& t) {
    return tensor_arg(call.op, name, t, shape_of(t), t);
  }
};

// The floats that a backward with selective B and C takes as scratch.
int64_t backward_scratch(int64_t parts, const ScanParams& p, const BackwardPlan& plan) {
  const auto padded = BackwardMemory::padded;
  const int64_t states = p.channels * p.state_dim;
  int64_t count = padded(parts * states) + 2 * padded(parts * p.channels);
  count += 2 * padded(p.batch * plan.slices * p.state_dim * plan.padded_length);
  return count + (plan.segments > 1 ? 2 * padded(p.batch * plan.segments * states) : 0);
}

// The states that enter each chunk of kCudaChunk steps, if the forward kept fewer.
void recompute_chunk_states(ScanCall& call, const CudaScanEvents& events, const Tensor& u,
                            BackwardMemory& memory, void* stream) {
  ScanParams& p = call.p;
  if (p.chunk_size == kCudaChunk) return;
  p.chunk_size = kCudaChunk;
  p.chunks = (p.length + kCudaChunk - 1) / kCudaChunk;
  p.chunk_states = memory.scratch({p.batch, p.chunks, p.channels, p.state_dim});
  ScanParams forward = p;
  memory.kept.push_back(empty_like_layout(u));
  forward.out = call.arg("out", memory.kept.back(), {p.batch, p.channels, p.length}, u);
  forward.final_state = memory.scratch({p.num_states, p.channels, p.state_dim});
  launch_forward(call, forward, events, u, stream);
}

// The gradient of the initial state starts as what passes through states without a step.
void begin_dinitial(const ScanCall& call, const ScanGradients& g, const CudaScanEvents& events,
                    const Tensor& dinitial, void* stream) {
  torch::stable::zero_(const_cast<Tensor&>(dinitial));
  check_launch(call.op,
               fill_unused_states_cuda(call.p, events, g.dfinal_state, g.dinitial_state, stream));
}

}  // namespace

NineTensors scan_backward(Tensor dout, OptionalTensor dfinal_state, Tensor u, Tensor delta,
                          Tensor A, Tensor B, Tensor C, OptionalTensor D, OptionalTensor z,
                          OptionalTensor delta_bias, bool delta_softplus,
                          OptionalTensor initial_state, OptionalTensor seq_idx, int64_t num_states,
                          int64_t chunk_size, Tensor chunk_states, const ScanGradientsInto& into) {
  ScanCall call = scan_call("_selective_scan_bwd", u, delta, A, B, C, D, z, delta_bias,
                            delta_softplus, initial_state, seq_idx, num_states, chunk_size);
  check_limits(call);
  const torch::stable::accelerator::DeviceGuard guard(u.get_device_index());
  void* const stream = current_stream(u);
  ScanParams& p = call.p;
  ScanGradients g;
  const Sizes bdl{p.batch, p.channels, p.length}, sdn{num_states, p.channels, p.state_dim};
  STD_TORCH_CHECK(!into.dA_times_A || (A.is_contiguous() && p.A.dtype == DType::kFloat32), call.op,
                  ": A must be contiguous and float32");
  g.dout = call.arg("dout", dout, bdl, u);
  g.dfinal_state = call.states("dfinal_state", dfinal_state, sdn);
  p.chunk_states = const_cast<float*>(
      call.states("chunk_states", chunk_states, {p.batch, p.chunks, p.channels, p.state_dim}));
  BackwardMemory memory{u};
  const DeviceEvents device(call, u, stream);
  if (p.batch * p.channels * p.length > 0) {
    recompute_chunk_states(call, device.events, u, memory, stream);
  }

  Tensor du = empty_like_layout(u);
  // A block has read the steps of its channels before it writes them.
  Tensor ddelta = into.ddelta.defined() ? into.ddelta : empty_like_layout(delta);
  Tensor dz = into.dz.defined() ? into.dz : z.has_value() ? empty_like_layout(*z) : Tensor();
  Tensor dA = memory.floats({p.channels, p.state_dim});
  Tensor dB = into.dB.defined() ? into.dB : fresh(B, shape_of(B));
  Tensor dC = into.dC.defined() ? into.dC : fresh(C, shape_of(C));
  Tensor dD = D.has_value() ? memory.floats({p.channels}) : Tensor();
  Tensor dbias = delta_bias.has_value() ? memory.floats({p.channels}) : Tensor();
  Tensor dinitial = initial_state.has_value() ? memory.floats(sdn) : Tensor();
  g.du = call.arg("du", du, bdl, u), g.ddelta = call.arg("ddelta", ddelta, bdl, u);
  if (z.has_value()) g.dz = call.arg("dz", dz, bdl, u);
  g.forward = p;
  const BackwardPlan plan = backward_plan(g, device.events);
  STD_TORCH_CHECK(plan.warps > 0, call.op, ": a state of ", p.state_dim,
                  " does not fit this GPU's shared memory; choose the reference backend");
  const int64_t parts = p.length > 0 ? p.batch * plan.segments : 0;
  const Sizes slices{p.batch, plan.slices, p.state_dim, plan.padded_length};
  const Sizes segments{p.batch, plan.segments, p.channels, p.state_dim};
  memory.reserve(backward_scratch(parts, p, plan));
  PendingSums pending{{}, memory};
  pending.sums.part_count = parts;
  g.dA = pending.add_parts(call, "dA", dA, into.dA_times_A ? float_data(A) : nullptr);
  if (D.has_value()) g.dD = pending.add_parts(call, "dD", dD);
  if (delta_bias.has_value()) g.ddelta_bias = pending.add_parts(call, "ddelta_bias", dbias);
  g.dB =
      p.constant_B ? pending.add_parts(call, "dB", dB) : pending.add_slices(call, "dB", dB, slices);
  g.dC =
      p.constant_C ? pending.add_parts(call, "dC", dC) : pending.add_slices(call, "dC", dC, slices);

  BackwardScratch scratch;
  if (plan.segments > 1) {
    scratch.adjoint = memory.scratch(segments), scratch.decay = memory.scratch(segments);
  }
  if (initial_state.has_value()) {
    g.dinitial_state = mutable_float_data(dinitial);
    begin_dinitial(call, g, device.events, dinitial, stream);
    if (seq_idx.has_value()) {
      scratch.shared_starts = memory.integers(1), scratch.starts = memory.integers(num_states);
    }
  }
  check_launch(call.op, scan_backward_cuda(g, device.events, plan, scratch, stream));
  check_launch(call.op, sum_backward_cuda(pending.sums, p, plan, stream));
  return {du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial};
}

namespace {

NineTensors selective_scan_bwd(Tensor dout, OptionalTensor dfinal_state, Tensor u, Tensor delta,
                               Tensor A, Tensor B, Tensor C, OptionalTensor D, OptionalTensor z,
                               OptionalTensor delta_bias, bool delta_softplus,
                               OptionalTensor initial_state, OptionalTensor seq_idx,
                               int64_t num_states, int64_t chunk_size, Tensor chunk_states) {
  NineTensors all =
      scan_backward(dout, dfinal_state, u, delta, A, B, C, D, z, delta_bias, delta_softplus,
                    initial_state, seq_idx, num_states, chunk_size, chunk_states, {});
  for (Tensor* t : {&std::get<5>(all), &std::get<6>(all), &std::get<7>(all), &std::get<8>(all)}) {
    if (!t->defined()) *t = absent(u);
  }
  return all;
}

}  // namespace
}  // namespace mamba

STABLE_TORCH_LIBRARY_IMPL(mamba_ssm, CUDA, m) {
  m.impl("_selective_scan_fwd", TORCH_BOX(&mamba::selective_scan_fwd));
  m.impl("_selective_scan_bwd", TORCH_BOX(&mamba::selective_scan_bwd));
}
