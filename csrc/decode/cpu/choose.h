// How a row's next token is chosen from its logits: the largest one, or one drawn.
#pragma once

#include <cstdint>

#include "../../common/cpu_isa.h"
#include "../../common/tensor_arg.h"

namespace mamba {

// Penalty, temperature, top-k, top-p and min-p, in this order, as mamba_ssm/utils/sampling.py
// defines them.
struct ChoiceParams {
  DType dtype = DType::kFloat32;
  const void* logits = nullptr;  // (batch, stride)
  int64_t stride = 0;
  int64_t vocab = 0;  // the first ones of a row, which alone count
  int64_t top_k = 0;  // 0 keeps all
  float top_p = 0, min_p = 0, temperature = 1, repetition_penalty = 1;
  const uint8_t* seen = nullptr;  // (batch, seen_stride): tokens to be penalised, or null
  int64_t seen_stride = 0;
  const double* uniform = nullptr;  // (batch,) in [0, 1), or null: the largest logit
  int64_t* tokens = nullptr;        // (batch,): the result; -1 where infinities or NaN leave none
};

struct ChooseKernels {
  // Bytes of memory, aligned to 64 and not initialised, that a call needs.
  int64_t (*scratch_bytes)(const ChoiceParams& p);
  // Chooses one row's token; what it does depends on nothing but that row.
  void (*row)(const ChoiceParams& p, int64_t row, void* scratch);
};

MAMBA_DECLARE_ISA(ChooseKernels choose_kernels())

}  // namespace mamba
