// One token of a whole language model for a batch of rows: embedding, layers, final norm, logits,
// and the choice of the next token.
#pragma once

#include <cstdint>

#include "../../common/cpu_isa.h"
#include "../../common/team.h"
#include "../../common/tensor_arg.h"
#include "../../linear/packed_weight.h"
#include "choose.h"

namespace mamba {

struct NormWeights {
  const float* weight = nullptr;
  const float* bias = nullptr;
  float eps = 0;
};

// Channels are padded to whole blocks, the state to `DecodeParams::padded_state`.
struct DecodeLayer {
  NormWeights norm;
  PackedWeight in_x, in_z, x_proj, dt_proj, out_proj;
  const float* conv_weight = nullptr;  // [d_conv][channels]
  const float* conv_bias = nullptr;    // [channels], or null
  const float* A = nullptr;            // [channels][padded_state], times log2(e)
  const float* D = nullptr;            // [channels]
  TensorArg conv_state;                // (batch, d_inner, d_conv), rows contiguous
  TensorArg ssm_state;                 // (batch, d_inner, d_state), rows contiguous
};

struct DecodeParams {
  int64_t batch = 0, d_model = 0, d_inner = 0, d_state = 0, d_conv = 0, dt_rank = 0, vocab = 0;
  int64_t layers = 0;
  bool is_rms_norm = true;
  DType residual_dtype = DType::kFloat32;
  const int64_t* ids = nullptr;
  TensorArg embedding;  // (vocab, d_model)
  const DecodeLayer* layer = nullptr;
  NormWeights norm_f;
  PackedWeight lm_head;
  TensorArg logits;  // (batch, vocab), contiguous
  // What chooses from the logits, or null, and each member's memory for it.
  const ChooseKernels* chooser = nullptr;
  ChoiceParams choice;
  char* choice_scratch = nullptr;
  int64_t choice_scratch_bytes = 0;

  int64_t channels() const { return (d_inner + kBlock - 1) / kBlock * kBlock; }
  int64_t padded_state() const { return (d_state + kBlock - 1) / kBlock * kBlock; }
};

// The kernels of one instruction set; take them once per token, so that both agree on the scratch.
struct DecodeKernels {
  // Bytes of memory that a step needs for a team of that many threads.
  int64_t (*scratch_bytes)(const DecodeParams& p, int64_t members);
  // The share of team member `member` (of `members`); every member must call it with the same
  // arguments. `scratch` is aligned to 64 bytes and zero.
  void (*step)(const DecodeParams& p, Team& team, int64_t member, int64_t members, void* scratch);
};

MAMBA_DECLARE_ISA_BF16(DecodeKernels decode_kernels())

}  // namespace mamba
