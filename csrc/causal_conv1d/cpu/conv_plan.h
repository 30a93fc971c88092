// How the steps of a call divide into runs, pieces and groups of pieces. A group is one unit of
// work of the kernels. The division depends on the shape and on seq_idx alone, so results do not
// depend on the number of threads.
#pragma once

#include <cstdint>
#include <vector>

#include "../params.h"

namespace mamba {

class ConvPlan {
 public:
  // seq_idx is null, or (batch, length) with these strides; pieces have at most max_piece steps.
  // Reads the sizes and `initial` of p, and points p at the plan, which must outlive it.
  ConvPlan(ConvParams& p, const int32_t* seq_idx, int64_t stride_b, int64_t stride_l,
           int64_t max_piece);
  ConvPlan(const ConvPlan&) = delete;
  ConvPlan& operator=(const ConvPlan&) = delete;

 private:
  void add_row(int64_t row, int64_t length, const int32_t* ids, int64_t stride);
  void add_padding(int64_t row, int64_t start, int64_t end);
  void add_run(int64_t row, int64_t id);
  void add_piece(const ConvPiece& piece);
  void add_source(int64_t state, int64_t index);

  const int64_t last_, states_, max_piece_;
  const bool initial_;
  std::vector<int64_t> steps_;  // of the run being collected
  int64_t steps_in_group_ = 0;
  std::vector<ConvPiece> pieces_;
  std::vector<ConvRun> runs_;
  std::vector<int64_t> group_bounds_, sources_, last_run_, final_sources_;
};

}  // namespace mamba
