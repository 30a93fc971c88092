// The selective scan on the GPU as torch operators. Schemas live in mamba_ssm/ops/schema.py.
#include "bindings_cuda.h"
#include "bindings_scan.h"
#include "selective_scan/cuda/scan.h"

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
      kept.push_back(torch::stable::new_empty(u, sizes, std::make_optional(type)));
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

std::tuple<Tensor, Tensor, Tensor> selective_scan_fwd(
    Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, OptionalTensor D, OptionalTensor z,
    OptionalTensor delta_bias, bool delta_softplus, OptionalTensor initial_state,
    OptionalTensor seq_idx, int64_t num_states, int64_t chunk_size) {
  ScanCall call = scan_call("_selective_scan_fwd", u, delta, A, B, C, D, z, delta_bias,
                            delta_softplus, initial_state, seq_idx, num_states, chunk_size);
  check_limits(call);
  const torch::stable::accelerator::DeviceGuard guard(u.get_device_index());
  void* const stream = current_stream(u);
  ScanParams& p = call.p;
  Tensor out = empty_like_layout(u);
  Tensor final_state = torch::stable::new_empty(u, Sizes{num_states, p.channels, p.state_dim},
                                                std::make_optional(ScalarType::Float));
  Tensor chunk_states = torch::stable::new_empty(
      u, Sizes{p.batch, p.chunks, p.channels, p.state_dim}, std::make_optional(ScalarType::Float));
  p.out = call.arg("out", out, {p.batch, p.channels, p.length}, u);
  p.final_state = mutable_float_data(final_state);
  p.chunk_states = mutable_float_data(chunk_states);
  const DeviceEvents device(call, u, stream);
  check_launch(call.op,
               fill_unused_states_cuda(p, device.events, p.initial_state, p.final_state, stream));
  check_launch(call.op, scan_forward_cuda(p, device.events, stream));
  return {out, final_state, chunk_states};
}

}  // namespace
}  // namespace mamba

STABLE_TORCH_LIBRARY_IMPL(mamba_ssm, CUDA, m) {
  m.impl("_selective_scan_fwd", TORCH_BOX(&mamba::selective_scan_fwd));
}
