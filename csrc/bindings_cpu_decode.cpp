// The fused decode step as torch operators: one token of a whole model for a batch of rows.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "bindings_common.h"
#include "bindings_threads.h"
#include "decode/cpu/decode.h"
#include "linear/cpu/pack.h"

namespace mamba {
namespace {

constexpr const char* kOp = "_decode_step";
constexpr int64_t kLayoutVersion = 1;
constexpr int64_t kLayerEntries = 37;
constexpr int64_t kTailEntries = 9;

DecodeKernels kernels(){MAMBA_FOR_ISA_BF16(decode_kernels)} ChooseKernels choosers() {
  MAMBA_FOR_ISA(choose_kernels)
}

// Reads the pack's table of contents, entry by entry, in the order in which
// mamba_ssm/inference/pack.py writes it, and checks every place against the pack's size.
class LayoutReader {
 public:
  LayoutReader(const Tensor& pack, const Tensor& layout)
      : base_(static_cast<const char*>(pack.data_ptr())),
        bytes_(pack.numel()),
        next_(static_cast<const int64_t*>(layout.data_ptr())),
        end_(next_ + layout.numel()) {}

  int64_t number() {
    STD_TORCH_CHECK(next_ < end_, kOp, ": layout is too short");
    return *next_++;
  }
  int64_t number(const char* name, int64_t low, int64_t high) {
    const int64_t value = number();
    STD_TORCH_CHECK(value >= low && value <= high, kOp, ": layout says ", name, " = ", value);
    return value;
  }
  int64_t left() const { return end_ - next_; }

  const void* place(int64_t size, bool optional = false) {
    const int64_t offset = number();
    if (optional && offset == -1) return nullptr;
    STD_TORCH_CHECK(
        offset >= 0 && offset % 64 == 0 && size >= 0 && offset <= bytes_ && size <= bytes_ - offset,
        kOp, ": layout points outside the pack (", size, " bytes at ", offset, " of ", bytes_, ")");
    return base_ + offset;
  }
  const float* floats(int64_t count, bool optional = false) {
    return static_cast<const float*>(place(4 * count, optional));
  }

  NormWeights norm(int64_t width) {
    NormWeights n;
    n.weight = floats(width);
    n.bias = floats(width, true);
    n.eps = *floats(1);
    return n;
  }

  PackedWeight weight(const char* name, int64_t out, int64_t in) {
    PackedWeight w;
    w.kind = static_cast<WeightKind>(number("a weight's kind", 0, kWeightKinds - 1));
    w.out = number(name, out, out);
    w.in = w.kind == WeightKind::kBFloat16 ? (in + 1) / 2 * 2 : in;
    w.group = number("a group of inputs", 1, w.in);
    STD_TORCH_CHECK(w.in % w.group == 0, kOp, ": layout says groups of ", w.group, " of ", w.in);
    const int64_t rows = w.blocks() * kBlock;
    w.data = place(rows * w.in * weight_bytes(w.kind));
    w.scales = floats(rows * (w.in / w.group), w.kind != WeightKind::kInt8);
    w.bias = floats(rows, true);
    return w;
  }

 private:
  const char* base_;
  int64_t bytes_;
  const int64_t* next_;
  const int64_t* end_;
};

void read_header(LayoutReader& in, DecodeParams& p) {
  constexpr int64_t kMax = int64_t{1} << 31;
  in.number("version", kLayoutVersion, kLayoutVersion);
  p.layers = in.number("layers", 1, kMax);
  p.d_model = in.number("d_model", 1, kMax);
  p.d_inner = in.number("d_inner", 1, kMax);
  p.d_state = in.number("d_state", 1, kMax);
  p.d_conv = in.number("d_conv", 1, kMax);
  p.dt_rank = in.number("dt_rank", 1, kMax);
  p.vocab = in.number("vocab", 1, kMax);
  p.is_rms_norm = in.number("is_rms_norm", 0, 1) != 0;
  p.residual_dtype = static_cast<DType>(in.number("residual dtype", 0, 2));
  STD_TORCH_CHECK(in.left() == p.layers * kLayerEntries + kTailEntries, kOp, ": layout has ",
                  in.left(), " entries after its header, and ", p.layers, " layers take ",
                  p.layers * kLayerEntries + kTailEntries);
}

void read_layer(LayoutReader& in, const DecodeParams& p, DecodeLayer& layer) {
  const int64_t channels = p.channels();
  layer.norm = in.norm((p.d_model + kBlock - 1) / kBlock * kBlock);
  layer.in_x = in.weight("in_proj", p.d_inner, p.d_model);
  layer.in_z = in.weight("in_proj", p.d_inner, p.d_model);
  layer.conv_weight = in.floats(p.d_conv * channels);
  layer.conv_bias = in.floats(channels, true);
  layer.x_proj = in.weight("x_proj", p.dt_rank + 2 * p.d_state, p.d_inner);
  layer.dt_proj = in.weight("dt_proj", p.d_inner, p.dt_rank);
  layer.A = in.floats(channels * p.padded_state());
  layer.D = in.floats(channels);
  layer.out_proj = in.weight("out_proj", p.d_model, p.d_inner);
}

// Inputs are laid out once for the products of all layers.
void check_alike(const DecodeLayer& layer, const DecodeLayer& first) {
  const auto alike = [](const PackedWeight& a, const PackedWeight& b) {
    return a.kind == b.kind && a.group == b.group;
  };
  STD_TORCH_CHECK(alike(layer.in_x, first.in_x) && alike(layer.in_z, first.in_x) &&
                      alike(layer.x_proj, first.x_proj) && alike(layer.dt_proj, first.dt_proj) &&
                      alike(layer.out_proj, first.out_proj),
                  kOp,
                  ": layout says that layers differ in a weight's kind or in its group of inputs");
}

TensorArg state_arg(const char* name, const Tensor& t, const std::vector<int64_t>& shape,
                    const Tensor& like) {
  TensorArg arg = tensor_arg(kOp, name, t, shape, like);
  STD_TORCH_CHECK((shape[2] == 1 || arg.stride[2] == 1) &&
                      (shape[1] == 1 || arg.stride[1] == shape[2]) &&
                      (shape[0] < 2 || arg.stride[0] != 0),
                  kOp, ": the rows of ", name,
                  " must be contiguous and its own; pass a contiguous "
                  "tensor");
  return arg;
}

int64_t count_of(const DecodeParams& p) {
  const int64_t layer = p.d_inner * (3 * p.d_model + p.dt_rank * 2 + p.d_state * 3);
  return (p.layers * layer + p.vocab * p.d_model) * std::max<int64_t>(1, p.batch);
}

int64_t usable_threads(const DecodeParams& p) {
  constexpr int64_t kWorkPerThread = 1 << 19;  // multiply-adds: some 30 microseconds
  if (in_forked_child()) return 1;
  const int64_t threads = torch::stable::get_num_threads();
  return std::max<int64_t>(1, std::min(threads, count_of(p) / kWorkPerThread));
}

// Memory that a thread keeps between its calls.
void* scratch_memory(int64_t bytes) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  static thread_local std::unique_ptr<void, Free> memory;
  static thread_local int64_t size = 0;
  if (size < bytes) {
    memory.reset();
    size = (bytes + 4095) / 4096 * 4096;
    memory.reset(std::aligned_alloc(64, static_cast<size_t>(size)));
    if (!memory) size = 0;
    STD_TORCH_CHECK(memory != nullptr, kOp, ": out of memory for ", bytes, " bytes of scratch");
  }
  return memory.get();
}

void check_tables(const Tensor& ids, const Tensor& embedding, const Tensor& pack,
                  const Tensor& layout) {
  check_dim(kOp, "ids", ids, 1, "(batch,)");
  STD_TORCH_CHECK(ids.scalar_type() == ScalarType::Long && ids.is_contiguous(), kOp,
                  ": ids must be contiguous int64");
  check_dim(kOp, "embedding", embedding, 2, "(vocabulary, d_model)");
  STD_TORCH_CHECK(pack.scalar_type() == ScalarType::Byte && pack.dim() == 1 && pack.is_contiguous(),
                  kOp, ": pack must be a contiguous uint8 vector");
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(pack.data_ptr()) % 64 == 0, kOp,
                  ": pack must be aligned to 64 bytes");
  STD_TORCH_CHECK(
      layout.scalar_type() == ScalarType::Long && layout.dim() == 1 && layout.is_contiguous(), kOp,
      ": layout must be a contiguous int64 vector");
}

// Describes the whole call but for what is done with the logits.
DecodeParams decode_params(const Tensor& ids, const Tensor& embedding, const Tensor& pack,
                           const Tensor& layout, const std::vector<Tensor>& conv_states,
                           const std::vector<Tensor>& ssm_states,
                           std::vector<DecodeLayer>& layers) {
  check_tables(ids, embedding, pack, layout);
  DecodeParams p;
  LayoutReader in(pack, layout);
  read_header(in, p);
  p.batch = ids.size(0);
  const auto states = static_cast<int64_t>(conv_states.size());
  STD_TORCH_CHECK(states == p.layers && static_cast<int64_t>(ssm_states.size()) == p.layers, kOp,
                  ": ", p.layers, " layers need as many conv_states and ssm_states, got ", states,
                  " and ", ssm_states.size());
  layers.resize(static_cast<size_t>(p.layers));
  for (size_t i = 0; i < layers.size(); ++i) {
    read_layer(in, p, layers[i]);
    check_alike(layers[i], layers[0]);
    layers[i].conv_state =
        state_arg("conv_states", conv_states[i], {p.batch, p.d_inner, p.d_conv}, ids);
    layers[i].ssm_state =
        state_arg("ssm_states", ssm_states[i], {p.batch, p.d_inner, p.d_state}, ids);
  }
  p.layer = layers.data();
  p.norm_f = in.norm((p.d_model + kBlock - 1) / kBlock * kBlock);
  p.lm_head = in.weight("vocabulary", p.vocab, p.d_model);
  const int64_t rows = embedding.size(0);
  p.embedding = tensor_arg(kOp, "embedding", embedding, {rows, p.d_model}, ids);
  p.ids = static_cast<const int64_t*>(ids.data_ptr());
  for (int64_t i = 0; i < p.batch; ++i) {
    STD_TORCH_CHECK(p.ids[i] >= 0 && p.ids[i] < rows, kOp, ": ids[", i, "] is ", p.ids[i],
                    ", outside the vocabulary of ", rows);
  }
  return p;
}

void run_step(DecodeParams& p) {
  if (p.batch == 0) return;
  const int64_t threads = usable_threads(p);
  const DecodeKernels run = kernels();
  const int64_t bytes = (run.scratch_bytes(p, threads) + 63) / 64 * 64;
  char* scratch = static_cast<char*>(scratch_memory(bytes + threads * p.choice_scratch_bytes));
  std::memset(scratch, 0, static_cast<size_t>(bytes));
  p.choice_scratch = scratch + bytes;
  Team team(threads);
  parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    const int64_t member = team.join(end - begin);
    if (member >= 0) run.step(p, team, member, team.size(), scratch);
  });
}

Tensor decode(Tensor ids, Tensor embedding, Tensor pack, Tensor layout,
              std::vector<Tensor> conv_states, std::vector<Tensor> ssm_states) {
  std::vector<DecodeLayer> layers;
  DecodeParams p = decode_params(ids, embedding, pack, layout, conv_states, ssm_states, layers);
  const std::vector<int64_t> shape{p.batch, p.vocab};
  Tensor logits = torch::stable::new_empty(embedding, shape);
  p.logits = tensor_arg(kOp, "logits", logits, shape, ids);
  run_step(p);
  return logits;
}

// A contiguous tensor that choosing reads or writes.
void* choice_data(const char* name, const Tensor& t, ScalarType type,
                  const std::vector<int64_t>& shape) {
  STD_TORCH_CHECK(t.scalar_type() == type && t.is_contiguous() && sizes_of(t) == shape, kOp, ": ",
                  name, " must be contiguous ", torch::headeronly::toString(type), " of shape ",
                  shape_text(shape), ", got ", torch::headeronly::toString(t.scalar_type()),
                  " of shape ", shape_text(sizes_of(t)));
  return t.data_ptr();
}

void decode_and_choose(Tensor ids, Tensor embedding, Tensor pack, Tensor layout,
                       std::vector<Tensor> conv_states, std::vector<Tensor> ssm_states,
                       Tensor logits, Tensor tokens, OptionalTensor seen, OptionalTensor uniform,
                       int64_t vocab_size, int64_t top_k, double top_p, double min_p,
                       double temperature, double repetition_penalty) {
  std::vector<DecodeLayer> layers;
  DecodeParams p = decode_params(ids, embedding, pack, layout, conv_states, ssm_states, layers);
  const std::vector<int64_t> shape{p.batch, p.vocab};
  choice_data("logits", logits, embedding.scalar_type(), shape);
  p.logits = tensor_arg(kOp, "logits", logits, shape, ids);
  ChoiceParams& c = p.choice;
  c.dtype = p.logits.dtype;
  c.logits = p.logits.data;
  c.stride = c.seen_stride = p.vocab;
  c.vocab = vocab_size;
  STD_TORCH_CHECK(vocab_size > 0 && vocab_size <= p.vocab, kOp, ": vocab_size must be in [1, ",
                  p.vocab, "], got ", vocab_size);
  STD_TORCH_CHECK(!uniform.has_value() || temperature > 0, kOp,
                  ": temperature must be positive, got ", temperature);
  c.top_k = top_k;
  c.top_p = static_cast<float>(top_p);
  c.min_p = static_cast<float>(min_p);
  c.temperature = static_cast<float>(temperature);
  c.repetition_penalty = static_cast<float>(repetition_penalty);
  c.tokens = static_cast<int64_t*>(choice_data("tokens", tokens, ScalarType::Long, {p.batch}));
  if (seen.has_value()) {
    c.seen = static_cast<uint8_t*>(choice_data("seen", *seen, ScalarType::Bool, shape));
  }
  if (uniform.has_value()) {
    c.uniform =
        static_cast<double*>(choice_data("uniform", *uniform, ScalarType::Double, {p.batch}));
  }
  const ChooseKernels chooser = choosers();
  p.chooser = &chooser;
  p.choice_scratch_bytes = chooser.scratch_bytes(c);
  run_step(p);
}

WeightKind weight_kind(const Tensor& weight) {
  if (weight.scalar_type() == ScalarType::Char) return WeightKind::kInt8;
  return static_cast<WeightKind>(dtype_of("_pack_weight", "weight", weight));
}

void pack(Tensor weight, Tensor into) {
  check_dim("_pack_weight", "weight", weight, 2, "(out, in)");
  PackedWeight w;
  w.kind = weight_kind(weight);
  w.out = weight.size(0);
  const int64_t in = weight.size(1);
  w.in = w.kind == WeightKind::kBFloat16 ? (in + 1) / 2 * 2 : in;
  const int64_t size = w.blocks() * kBlock * w.in;
  STD_TORCH_CHECK(
      into.scalar_type() == weight.scalar_type() && into.is_contiguous() && into.numel() == size,
      "_pack_weight: into must be contiguous, of weight's dtype, with ", size, " elements");
  STD_TORCH_CHECK(in < 2 || weight.stride(1) == 1,
                  "_pack_weight: weight's rows must be contiguous");
  STD_TORCH_CHECK(w.out < 2 || weight.stride(0) == in,
                  "_pack_weight: weight's rows must follow one another");
  if (size == 0) return;
  w.data = into.data_ptr();
  const void* from = weight.data_ptr();
  const int64_t grain = std::max<int64_t>(1, 32768 / (kBlock * w.in));
  parallel_for(0, w.blocks(), grain,
               [&](int64_t begin, int64_t end) { pack_weight(w, from, in, begin, end); });
}

}  // namespace
}  // namespace mamba

STABLE_TORCH_LIBRARY_IMPL(mamba_ssm, CPU, m) {
  m.impl("_decode_step", TORCH_BOX(&mamba::decode));
  m.impl("_decode_and_choose", TORCH_BOX(&mamba::decode_and_choose));
  m.impl("_pack_weight", TORCH_BOX(&mamba::pack));
}
