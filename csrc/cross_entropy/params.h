// Cross-entropy of rows of logits against their targets, the logits replaced by its gradient:
//   loss = log(sum_j exp(logits_j)) - logits_target,  dlogits_j = softmax(logits)_j - [j == target]
#pragma once

#include "../common/tensor_arg.h"

namespace mamba {

struct CrossEntropyParams {
  int64_t rows = 0, size = 0;
  int64_t ignored = -100;            // the target of rows that do not count: both results are 0
  TensorArg logits;                  // (rows, size), read and written, columns contiguous
  const int64_t* targets = nullptr;  // (rows,), contiguous, in [0, size) or ignored
  float* losses = nullptr;           // (rows,)
};

}  // namespace mamba
