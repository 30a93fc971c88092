// The layers of a model that consumes a prompt, as one torch operator: for a short prompt the
// host's time for each layer is the cost. What each layer computes is that of _add_norm_fwd and
// _mamba_block_fwd. Schemas live in mamba_ssm/ops/schema.py.
#include <algorithm>

#include "bindings_cuda_block.h"

namespace mamba {
namespace {

constexpr const char* kOp = "_prefill_layers";
// The order of mamba_ssm/ops/decode_weights.py.
enum Weight : int64_t {
  kNormWeight,
  kNormBias,
  kInProj,
  kInBias,
  kConvWeight,
  kConvBias,
  kXProj,
  kDtProj,
  kDtBias,
  kALog,
  kD,
  kOutProj,
  kOutBias,
  kLayerWeights
};
constexpr int64_t kTailWeights = 2;

OptionalTensor given(const Tensor& t) { return t.numel() ? OptionalTensor(t) : std::nullopt; }

// One layer's tensors, by Weight.
class Layer {
 public:
  Layer(const std::vector<Tensor>& weights, size_t layer)
      : first_(weights.data() + layer * kLayerWeights) {}

  const Tensor& operator[](Weight w) const { return first_[w]; }

  void check(const BlockSizes& s, const Tensor& hidden, const Tensor& conv,
             const Tensor& ssm) const {
    const int64_t m = hidden.size(2);
    const auto is = [&](const char* name, const Tensor& t, const std::vector<int64_t>& shape,
                        std::optional<ScalarType> dtype) {
      (void)tensor_arg(kOp, name, t, shape, hidden);
      STD_TORCH_CHECK(!dtype.has_value() || t.scalar_type() == *dtype, kOp, ": ", name, " must be ",
                      torch::headeronly::toString(*dtype), ", got ",
                      torch::headeronly::toString(t.scalar_type()));
      STD_TORCH_CHECK(t.is_contiguous(), kOp, ": ", name, " must be contiguous");
    };
    const ScalarType dtype = hidden.scalar_type();
    (void)tensor_arg(kOp, "norm.weight", first_[kNormWeight], {m}, hidden);
    (void)tensor_arg(kOp, "norm.bias", given(first_[kNormBias]), {m}, hidden);
    (void)tensor_arg(kOp, "conv_weight", first_[kConvWeight], {s.d, 1, first_[kConvWeight].size(2)},
                     hidden);
    (void)tensor_arg(kOp, "conv_bias", given(first_[kConvBias]), {s.d}, hidden);
    (void)tensor_arg(kOp, "dt_bias", given(first_[kDtBias]), {s.d}, hidden);
    (void)tensor_arg(kOp, "D", first_[kD], {s.d}, hidden);
    is("in_proj", first_[kInProj], {2 * s.d, m}, dtype);
    is("x_proj", first_[kXProj], {s.rank + 2 * s.n, s.d}, dtype);
    is("dt_proj", first_[kDtProj], {s.d, s.rank}, dtype);
    is("out_proj", first_[kOutProj], {m, s.d}, dtype);
    is("A_log", first_[kALog], {s.d, s.n}, std::nullopt);
    is("conv_states", conv, {s.b, s.d, first_[kConvWeight].size(2)}, std::nullopt);
    is("ssm_states", ssm, {s.b, s.d, s.n}, std::nullopt);
    STD_TORCH_CHECK(first_[kConvWeight].size(2) <= s.length, kOp, ": the prompt has ", s.length,
                    " steps, which do not fill a convolution of width ",
                    first_[kConvWeight].size(2));
    for (const Weight w : {kInBias, kOutBias}) {
      STD_TORCH_CHECK(first_[w].numel() == 0, kOp, ": in_proj and out_proj must have no bias");
    }
  }

 private:
  const Tensor* first_;
};

void keep_states(const BlockSizes& s, const BlockForward& f, const Tensor& conv, const Tensor& ssm,
                 void* stream) {
  BlockStates to;
  to.batch = s.b, to.length = s.length, to.channels = s.d;
  to.pitch = f.xz.size(1), to.width = conv.size(2), to.states = ssm.numel();
  to.dtype = dtype_of(kOp, "hidden", f.xz);
  to.conv_dtype = dtype_of(kOp, "conv_states", conv);
  to.ssm_dtype = dtype_of(kOp, "ssm_states", ssm);
  to.rows = f.xz.data_ptr(), to.final_states = floats_of(f.final_state);
  to.conv = conv.data_ptr(), to.ssm = ssm.data_ptr();
  check_launch(kOp, block_states_cuda(to, stream));
}

// A of some layers at once, in memory that the next ones take over.
class Decays {
 public:
  Decays(const BlockSizes& s, const Tensor& like) {
    const Tensor all = new_floats(like, {kMostConversions, s.d, s.n});
    for (int64_t i = 0; i < kMostConversions; ++i) {
      each_.push_back(view(all, {s.d, s.n}, {s.n, 1}, i * s.d * s.n));
    }
  }

  const Tensor& operator()(const std::vector<Tensor>& weights, size_t layer, size_t layers,
                           void* stream) {
    const size_t first = layer % kMostConversions;
    if (first == 0) {
      Converter convert{kOp, {}, {}};
      for (size_t i = layer; i < std::min<size_t>(layer + kMostConversions, layers); ++i) {
        convert.add(Layer(weights, i)[kALog], each_[i - layer], true);
      }
      convert.run(stream);
    }
    return each_[first];
  }

 private:
  std::vector<Tensor> each_;
};

// Each sum of x and what went before, and the norm of it. The sums alternate between two memories.
struct Norms {
  double eps;
  bool is_rms_norm;
  ScalarType dtype;  // of the sums
  Tensor y, sums[2];
  OptionalTensor residual;
  int next = 0;

  // The first sum is the embedding itself, in that dtype.
  void run(const Tensor& x, const Tensor& weight, const Tensor& bias) {
    if (!residual.has_value() && x.scalar_type() == dtype) {
      block_add_norm(kOp, x, residual, weight, given(bias), eps, is_rms_norm, std::nullopt, y);
      residual = x;
      return;
    }
    Tensor& sum = sums[next];
    if (!sum.defined()) sum = fresh(x, shape_of(x), dtype);
    block_add_norm(kOp, x, residual, weight, given(bias), eps, is_rms_norm, sum, y);
    residual = sum, next ^= 1;
  }
};

Tensor prefill_layers(Tensor hidden, std::vector<Tensor> weights, double eps, bool is_rms_norm,
                      ScalarType residual_dtype, std::vector<Tensor> conv_states,
                      std::vector<Tensor> ssm_states) {
  check_dim(kOp, "hidden", hidden, 3, "(batch, length, model)");
  const size_t layers = conv_states.size();
  STD_TORCH_CHECK(layers > 0 && ssm_states.size() == layers &&
                      weights.size() == layers * kLayerWeights + kTailWeights,
                  kOp, ": ", layers, " conv_states need as many ssm_states and ",
                  layers * kLayerWeights + kTailWeights, " weights, got ", ssm_states.size(),
                  " and ", weights.size());
  const Layer like(weights, 0);
  check_dim(kOp, "A_log", like[kALog], 2, "(channels, state_dim)");
  check_dim(kOp, "dt_proj", like[kDtProj], 2, "(channels, rank)");
  const int64_t b = hidden.size(0), length = hidden.size(1), m = hidden.size(2);
  const BlockSizes s{b, length, like[kALog].size(0), like[kALog].size(1), like[kDtProj].size(1)};
  std::vector<Tensor> taps;
  for (size_t i = 0; i < layers; ++i) {
    const Layer w(weights, i);
    taps.push_back(block_taps(kOp, w[kConvWeight]));
    w.check(s, hidden, conv_states[i], ssm_states[i]);
  }
  (void)tensor_arg(kOp, "norm_f.weight", weights[layers * kLayerWeights], {m}, hidden);
  (void)tensor_arg(kOp, "norm_f.bias", given(weights[layers * kLayerWeights + 1]), {m}, hidden);
  const torch::stable::accelerator::DeviceGuard guard(hidden.get_device_index());
  void* const stream = current_stream(hidden);
  const Tensor embedding = view(contiguous_of(hidden), {b * length, m}, {m, 1});
  const BlockForward f(s, embedding, m, length);
  Norms norms{eps, is_rms_norm, residual_dtype, fresh(embedding, {b * length, m}), {}, {}};
  Decays decays(s, embedding);
  for (size_t i = 0; i < layers; ++i) {
    const Layer w(weights, i);
    norms.run(i == 0 ? embedding : f.out, w[kNormWeight], w[kNormBias]);
    block_forward(norms.y,
                  {w[kInProj], taps[i], w[kXProj], w[kDtProj], decays(weights, i, layers, stream),
                   w[kD], w[kOutProj], given(w[kConvBias]), given(w[kDtBias])},
                  length, f);
    keep_states(s, f, conv_states[i], ssm_states[i], stream);
  }
  // The last step of each row is all that is read.
  const auto last = [&](const Tensor& rows) {
    return view(rows, {b, m}, {length * m, 1}, (length - 1) * m);
  };
  const Tensor y = fresh(embedding, {b, m});
  block_add_norm(kOp, last(f.out), last(*norms.residual), weights[layers * kLayerWeights],
                 given(weights[layers * kLayerWeights + 1]), eps, is_rms_norm, std::nullopt, y);
  return y;
}

}  // namespace
}  // namespace mamba

STABLE_TORCH_LIBRARY_IMPL(mamba_ssm, CUDA, m) {
  m.impl("_prefill_layers", TORCH_BOX(&mamba::prefill_layers));
}
