// The memory layout rule of the sequence ops, as mamba_ssm/ops/layout.py states it.
#pragma once

#include "bindings_common.h"

namespace mamba {

// Whether the results of an op on x (b, d, l) are views of (b, l, d) memory.
inline bool is_channel_last(const Tensor& x) {
  return x.stride(2) != 1 && x.stride(1) == 1 && x.size(1) > 1;
}

// Fresh memory of the shape, layout and dtype of x (b, d, l).
inline Tensor empty_like_layout(const Tensor& x) {
  const int64_t b = x.size(0), d = x.size(1), l = x.size(2);
  if (!is_channel_last(x)) return fresh(x, {b, d, l});
  return fresh_strided(x, {b, d, l}, {d * std::max<int64_t>(l, 1), 1, d});
}

}  // namespace mamba
