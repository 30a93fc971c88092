// What the fused decode step on the GPU is given. No framework headers here.
#pragma once

#include "../../common/tensor_arg.h"

namespace mamba {

constexpr int kMaxDecodeLayers = 128;  // their pointers travel as kernel parameters: 16 kB
// With more rows the modules' matrix products are faster.
constexpr int kMaxDecodeBatch = 8;
constexpr int kMaxDecodeConv = 4;

// One layer. Linear weights are (out, in), rows contiguous, in the weights' dtype like every other
// tensor except A_log, D and the states. in_proj, x_proj, out_proj and lm_head may be int8 instead,
// with an fp32 scale for each output.
struct DecodeLayerArgs {
  const void *norm_weight, *norm_bias;  // biases may be null
  const void *in_proj, *in_bias;
  const void *conv_weight, *conv_bias;
  const void* x_proj;
  const void *dt_proj, *dt_bias;
  const void *A_log, *D;
  const void *out_proj, *out_bias;
  void *conv_state, *ssm_state;  // (batch, d_inner, d_conv) and (batch, d_inner, d_state)
  const float *in_scales, *x_scales, *out_scales;  // null unless weights are int8
};

struct DecodeCudaSizes {
  int layers = 0, d_model = 0, d_inner = 0, d_state = 0, d_conv = 0, dt_rank = 0, vocab = 0;
  int projected = 0;  // outputs of x_proj: dt_rank + 2 d_state
  int batch = 0;
  DType dtype = DType::kFloat32;
  bool int8 = false;  // the large linear weights

  int element() const { return dtype == DType::kFloat32 ? 4 : 2; }
  int weight_element() const { return int8 ? 1 : element(); }  // of the large linear weights
};

// How the work is cut; decode_plan chooses it by the sizes and the device.
struct DecodePlan {
  int blocks = 0;     // one for each multiprocessor
  int x_slices = 1;   // pieces of x_proj's input, each with partial sums of its own
  int out_parts = 1;  // out_proj's input is held in shared memory one part after the other
  int stages = 0;     // groups of weights in flight for each warp
  int64_t shared_bytes = 0;
  // A single row has a kernel of its own, unless its shared memory is too small. Of the fields
  // above it takes the blocks.
  bool one_row = false;
  int64_t words = 0;  // that the blocks exchange results through
};

struct DecodeCudaParams {
  DecodeCudaSizes size;
  DecodePlan plan;
  bool is_rms_norm = true;
  float eps = 0.0f;
  DType residual_dtype = DType::kFloat32, A_dtype = DType::kFloat32, D_dtype = DType::kFloat32;
  DType conv_dtype = DType::kFloat32, ssm_dtype = DType::kFloat32;
  const int64_t* ids = nullptr;                             // (batch,)
  const void* embedding = nullptr;                          // (vocab, d_model)
  const void *norm_weight = nullptr, *norm_bias = nullptr;  // of the last norm
  const void* lm_head = nullptr;                            // (vocab, d_model)
  const float* head_scales = nullptr;                       // of an int8 lm_head
  void* logits = nullptr;                                   // (batch, vocab)
  // Scratch: arrivals at the grid's barriers (zeroed), the residual stream, what the layers pass
  // on.
  unsigned* arrived = nullptr;      // (blocks,)
  float* residual = nullptr;        // (batch, d_model)
  void *u = nullptr, *y = nullptr;  // (batch, d_inner)
  float* gate = nullptr;            // (batch, d_inner)
  float* projected = nullptr;       // (x_slices, batch, dt_rank + 2 d_state)
  uint64_t* words = nullptr;        // of a single row, instead of all these
  DecodeLayerArgs layer[kMaxDecodeLayers];
};

}  // namespace mamba
