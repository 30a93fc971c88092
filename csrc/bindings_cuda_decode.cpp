// The fused decode step on the GPU as a torch operator: one token of a whole model, from its own
// weights.
#include "bindings_cuda.h"
#include "decode/cuda/decode.h"

namespace mamba {
namespace {

constexpr const char* kOp = "_decode_step_weights";
// The order in which ops/schema.py lists a layer's weights.
constexpr int64_t kLayerWeights = 13, kTailWeights = 3;
// Of int8 weights there are scales as well, in a list of their own: of in_proj, x_proj and out_proj
// of each layer, and of lm_head.
constexpr int64_t kLayerScales = 3, kTailScales = 1;

// The weights one after the other, each checked before its address is taken.
class WeightReader {
 public:
  WeightReader(const std::vector<Tensor>& weights, const Tensor& embedding)
      : weights_(weights), like_(embedding) {}

  const Tensor& next() { return weights_[next_++]; }

  const void* take(const char* name, const std::vector<int64_t>& shape, bool optional = false) {
    return take(name, shape, optional, like_.scalar_type());
  }

  const void* take(const char* name, const std::vector<int64_t>& shape, bool optional,
                   ScalarType dtype) {
    const Tensor& t = next();
    if (optional && t.numel() == 0) return nullptr;
    const auto sizes = sizes_of(t);
    STD_TORCH_CHECK(sizes == shape, kOp, ": ", name, " must have shape ", shape_text(shape),
                    ", got ", shape_text(sizes));
    STD_TORCH_CHECK(t.scalar_type() == dtype, kOp, ": ", name, " must be ",
                    torch::headeronly::toString(dtype), ", got ",
                    torch::headeronly::toString(t.scalar_type()));
    check_place(name, t);
    return t.data_ptr();
  }

  void check_place(const char* name, const Tensor& t) const {
    STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == like_.get_device_index(), kOp, ": ",
                    name, " must be on the device of the embedding");
    STD_TORCH_CHECK(t.is_contiguous(), kOp, ": ", name, " must be contiguous");
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0, kOp, ": ", name,
                    " must start at a multiple of 16 bytes");
  }

  // The scales of a weight's outputs; null if there are none.
  const float* take_scales(const char* name, int64_t outputs) {
    if (weights_.empty()) return nullptr;
    return static_cast<const float*>(take(name, {outputs, 1}, false, ScalarType::Float));
  }

  // The dtype of the weight `ahead` places from here.
  ScalarType dtype_at(int64_t ahead) const { return weights_[next_ + ahead].scalar_type(); }

 private:
  const std::vector<Tensor>& weights_;
  const Tensor& like_;
  size_t next_ = 0;
};

void read_sizes(DecodeCudaSizes& s, const Tensor& ids, const Tensor& embedding,
                const std::vector<Tensor>& weights, const Tensor& conv, const Tensor& ssm) {
  const auto as_int = [](const char* name, int64_t v) {
    STD_TORCH_CHECK(v > 0 && v < (int64_t{1} << 28), kOp, ": ", name, " is ", v);
    return static_cast<int>(v);
  };
  check_dim(kOp, "conv_states[0]", conv, 3, "(batch, d_inner, d_conv)");
  check_dim(kOp, "ssm_states[0]", ssm, 3, "(batch, d_inner, d_state)");
  check_dim(kOp, "x_proj", weights[6], 2, "(dt_rank + 2 d_state, d_inner)");
  s.dtype = dtype_of(kOp, "embedding", embedding);
  s.batch = as_int("the batch", ids.size(0));
  s.vocab = as_int("the vocabulary", embedding.size(0));
  s.d_model = as_int("d_model", embedding.size(1));
  s.d_inner = as_int("d_inner", conv.size(1));
  s.d_conv = as_int("d_conv", conv.size(2));
  s.d_state = as_int("d_state", ssm.size(2));
  s.projected = as_int("x_proj's outputs", weights[6].size(0));
  s.dt_rank = as_int("dt_rank", s.projected - 2 * s.d_state);
}

// Shapes, dtypes and addresses of one layer.
void read_layer(WeightReader& in, WeightReader& scales, const DecodeCudaSizes& s, ScalarType large,
                ScalarType A_dtype, ScalarType D_dtype, DecodeLayerArgs& a) {
  a.norm_weight = in.take("norm.weight", {s.d_model});
  a.norm_bias = in.take("norm.bias", {s.d_model}, true);
  a.in_proj = in.take("in_proj.weight", {2 * s.d_inner, s.d_model}, false, large);
  a.in_bias = in.take("in_proj.bias", {2 * s.d_inner}, true);
  a.conv_weight = in.take("conv1d.weight", {s.d_inner, 1, s.d_conv});
  a.conv_bias = in.take("conv1d.bias", {s.d_inner}, true);
  a.x_proj = in.take("x_proj.weight", {s.projected, s.d_inner}, false, large);
  a.dt_proj = in.take("dt_proj.weight", {s.d_inner, s.dt_rank});
  a.dt_bias = in.take("dt_proj.bias", {s.d_inner}, true);
  a.A_log = in.take("A_log", {s.d_inner, s.d_state}, false, A_dtype);
  a.D = in.take("D", {s.d_inner}, false, D_dtype);
  a.out_proj = in.take("out_proj.weight", {s.d_model, s.d_inner}, false, large);
  a.out_bias = in.take("out_proj.bias", {s.d_model}, true);
  a.in_scales = scales.take_scales("in_proj's scales", 2 * s.d_inner);
  a.x_scales = scales.take_scales("x_proj's scales", s.projected);
  a.out_scales = scales.take_scales("out_proj's scales", s.d_model);
}

void* read_state(const WeightReader& in, const char* name, const Tensor& t,
                 const std::vector<int64_t>& shape, ScalarType dtype) {
  const auto sizes = sizes_of(t);
  STD_TORCH_CHECK(sizes == shape, kOp, ": ", name, " must have shape ", shape_text(shape), ", got ",
                  shape_text(sizes));
  STD_TORCH_CHECK(t.scalar_type() == dtype, kOp, ": ", name, " must have one dtype in all layers");
  in.check_place(name, t);
  return t.data_ptr();
}

DecodeCudaParams read_params(const Tensor& ids, const Tensor& embedding,
                             const std::vector<Tensor>& weights, const std::vector<Tensor>& scales,
                             const std::vector<Tensor>& conv, const std::vector<Tensor>& ssm) {
  check_dim(kOp, "ids", ids, 1, "(batch,)");
  check_dim(kOp, "embedding", embedding, 2, "(vocab, d_model)");
  const auto layers = static_cast<int64_t>(conv.size());
  STD_TORCH_CHECK(layers > 0 && ssm.size() == conv.size() &&
                      static_cast<int64_t>(weights.size()) == layers * kLayerWeights + kTailWeights,
                  kOp, ": ", conv.size(), " conv_states need as many ssm_states and ",
                  layers * kLayerWeights + kTailWeights, " weights, got ", ssm.size(), " and ",
                  weights.size());
  STD_TORCH_CHECK(
      scales.empty() || static_cast<int64_t>(scales.size()) == layers * kLayerScales + kTailScales,
      kOp, ": int8 weights of ", layers, " layers have ", layers * kLayerScales + kTailScales,
      " scales, got ", scales.size());
  DecodeCudaParams p;
  DecodeCudaSizes& s = p.size;
  s.layers = static_cast<int>(layers);
  s.int8 = !scales.empty();
  read_sizes(s, ids, embedding, weights, conv[0], ssm[0]);
  const std::string reason = decode_plan(s, embedding.get_device_index(), p.plan);
  STD_TORCH_CHECK(reason.empty(), kOp, ": the fused step does not serve this call: ", reason);
  WeightReader in(weights, embedding), scale_reader(scales, embedding);
  const ScalarType large = s.int8 ? ScalarType::Char : embedding.scalar_type();
  in.check_place("embedding", embedding);
  STD_TORCH_CHECK(ids.scalar_type() == ScalarType::Long, kOp, ": ids must be int64");
  STD_TORCH_CHECK(ids.is_contiguous() && ids.is_cuda() &&
                      ids.get_device_index() == embedding.get_device_index(),
                  kOp, ": ids must be contiguous and on the device of the embedding");
  const ScalarType A_dtype = in.dtype_at(9), D_dtype = in.dtype_at(10);
  p.A_dtype = dtype_of(kOp, "A_log", weights[9]);
  p.D_dtype = dtype_of(kOp, "D", weights[10]);
  p.conv_dtype = dtype_of(kOp, "conv_states", conv[0]);
  p.ssm_dtype = dtype_of(kOp, "ssm_states", ssm[0]);
  for (int64_t i = 0; i < layers; ++i) {
    DecodeLayerArgs& a = p.layer[i];
    read_layer(in, scale_reader, s, large, A_dtype, D_dtype, a);
    const auto at = static_cast<size_t>(i);
    a.conv_state = read_state(in, "conv_states", conv[at], {s.batch, s.d_inner, s.d_conv},
                              conv[0].scalar_type());
    a.ssm_state = read_state(in, "ssm_states", ssm[at], {s.batch, s.d_inner, s.d_state},
                             ssm[0].scalar_type());
  }
  p.norm_weight = in.take("norm_f.weight", {s.d_model});
  p.norm_bias = in.take("norm_f.bias", {s.d_model}, true);
  p.lm_head = in.take("lm_head.weight", {s.vocab, s.d_model}, false, large);
  p.head_scales = scale_reader.take_scales("lm_head's scales", s.vocab);
  p.ids = static_cast<const int64_t*>(ids.data_ptr());
  p.embedding = embedding.data_ptr();
  return p;
}

// Whether all layers, and the last norm, have the same biases or none.
bool layers_alike(const DecodeCudaParams& p) {
  const auto same = [](const void* a, const void* b) { return (a == nullptr) == (b == nullptr); };
  const DecodeLayerArgs& a = p.layer[0];
  for (int i = 0; i < p.size.layers; ++i) {
    const DecodeLayerArgs& b = p.layer[i];
    if (!same(a.norm_bias, b.norm_bias) || !same(a.in_bias, b.in_bias) ||
        !same(a.conv_bias, b.conv_bias) || !same(a.dt_bias, b.dt_bias) ||
        !same(a.out_bias, b.out_bias)) {
      return false;
    }
  }
  return same(a.norm_bias, p.norm_bias);
}

Tensor decode(Tensor ids, Tensor embedding, std::vector<Tensor> weights, std::vector<Tensor> scales,
              double eps, bool is_rms_norm, ScalarType residual_dtype,
              std::vector<Tensor> conv_states, std::vector<Tensor> ssm_states) {
  DecodeCudaParams p = read_params(ids, embedding, weights, scales, conv_states, ssm_states);
  const DecodeCudaSizes& s = p.size;
  p.eps = static_cast<float>(eps);
  p.is_rms_norm = is_rms_norm;
  STD_TORCH_CHECK(residual_dtype == ScalarType::Float || residual_dtype == embedding.scalar_type(),
                  kOp, ": residual_dtype must be float32 or the weights' dtype");
  p.residual_dtype = residual_dtype == ScalarType::Float ? DType::kFloat32 : s.dtype;
  const torch::stable::accelerator::DeviceGuard guard(embedding.get_device_index());
  // One block of scratch: rows of 64 floats, so that every part is aligned.
  int64_t used = 0;
  const auto place = [&](int64_t floats) {
    const int64_t at = used;
    used += (floats + 63) / 64 * 64;
    return at;
  };
  p.plan.one_row = p.plan.one_row && layers_alike(p);
  STD_TORCH_CHECK(p.plan.one_row || !s.int8, kOp,
                  ": int8 weights need layers that all have the same biases");
  if (p.plan.one_row) {
    Tensor words = new_floats(embedding, {2 * p.plan.words});
    Tensor logits = fresh(embedding, {1, s.vocab});
    p.words = reinterpret_cast<uint64_t*>(floats_of(words));
    p.logits = logits.data_ptr();
    check_launch(kOp, decode_step_cuda(p, current_stream(embedding)));
    return logits;
  }
  const int64_t b = s.batch, inner = b * s.d_inner;
  const int64_t arrived = place(p.plan.blocks), residual = place(b * s.d_model), u = place(inner),
                y = place(inner), gate = place(inner),
                projected = place(p.plan.x_slices * b * s.projected);
  Tensor scratch = new_floats(embedding, {used});
  Tensor logits = fresh(embedding, {b, s.vocab});
  float* base = floats_of(scratch);
  p.arrived = reinterpret_cast<unsigned*>(base + arrived);
  p.residual = base + residual;
  p.u = base + u;
  p.y = base + y;
  p.gate = base + gate;
  p.projected = base + projected;
  p.logits = logits.data_ptr();
  check_launch(kOp, decode_step_cuda(p, current_stream(embedding)));
  return logits;
}

}  // namespace
}  // namespace mamba

// Null if the fused step serves these sizes on the device, else why it does not. `dtype` is 0 for
// fp32, 1 for fp16, 2 for bf16; `int8` is 1 for int8 weights. The text lives until the thread's
// next call.
extern "C" __attribute__((visibility("default"))) const char* mamba_ssm_decode_refusal(
    int device, int dtype, int int8, int batch, int layers, int d_model, int d_inner, int d_state,
    int d_conv, int dt_rank) {
  mamba::DecodeCudaSizes s;
  s.dtype = static_cast<mamba::DType>(dtype);
  s.int8 = int8 != 0;
  s.batch = batch, s.layers = layers, s.d_model = d_model, s.d_inner = d_inner;
  s.d_state = d_state, s.d_conv = d_conv, s.dt_rank = dt_rank, s.vocab = 1;
  s.projected = dt_rank + 2 * d_state;
  mamba::DecodePlan plan;
  static thread_local std::string reason;
  reason = mamba::decode_plan(s, device, plan);
  return reason.empty() ? nullptr : reason.c_str();
}

STABLE_TORCH_LIBRARY_IMPL(mamba_ssm, CUDA, m) {
  m.impl("_decode_step_weights", TORCH_BOX(&mamba::decode));
}
