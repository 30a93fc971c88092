// Small things between the products of the Mamba mixer, each a launch less.
#pragma once

#include "../common/tensor_arg.h"

namespace mamba {

// Contiguous elements in another dtype.
struct Conversion {
  const void* from = nullptr;
  void* to = nullptr;
  int64_t count = 0;
  DType from_dtype = DType::kFloat32, to_dtype = DType::kFloat32;
  bool negative_exp = false;  // -exp of them
};

constexpr int kMostConversions = 8;
struct Conversions {
  Conversion all[kMostConversions];
  int count = 0;
};

// What a prompt leaves in a layer's caches: the convolution's last `width` inputs, of rows
// (batch length, pitch), as (batch, channels, width), and the scan's final states, contiguous.
struct BlockStates {
  int64_t batch = 0, length = 0, channels = 0, pitch = 0, width = 0;
  int64_t states = 0;             // of the whole batch
  DType dtype = DType::kFloat32;  // of the rows
  DType conv_dtype = DType::kFloat32, ssm_dtype = DType::kFloat32;
  const void* rows = nullptr;
  const float* final_states = nullptr;
  void *conv = nullptr, *ssm = nullptr;
};

}  // namespace mamba
