#include "conv_plan.h"

#include <algorithm>

namespace mamba {

ConvPlan::ConvPlan(ConvParams& p, const int32_t* seq_idx, int64_t stride_b, int64_t stride_l,
                   int64_t max_piece)
    : last_(p.width - 1),
      states_(p.states),
      max_piece_(max_piece),
      initial_(p.initial.data != nullptr) {
  group_bounds_.push_back(0);
  last_run_.assign(static_cast<size_t>(states_), -1);
  for (int64_t id = 0; id < states_; ++id) {  // a sequence without steps ends as it began
    for (int64_t k = 0; k < last_; ++k) {
      final_sources_.push_back(initial_ ? state_source(k) : kNoSource);
    }
  }
  for (int64_t row = 0; row < p.batch && p.length > 0; ++row) {
    if (seq_idx) {
      add_row(row, p.length, seq_idx + row * stride_b, stride_l);
    } else {
      for (int64_t t = 0; t < p.length; ++t) steps_.push_back(t);
      add_run(row, row);
    }
  }
  const auto num_pieces = static_cast<int64_t>(pieces_.size());
  if (group_bounds_.back() != num_pieces) group_bounds_.push_back(num_pieces);
  for (size_t r = 0; r < runs_.size(); ++r) {
    const int64_t state = runs_[r].state;
    runs_[r].is_last =
        state >= 0 && last_run_[static_cast<size_t>(state)] == static_cast<int64_t>(r);
  }
  p.num_groups = static_cast<int64_t>(group_bounds_.size()) - 1;
  p.num_runs = static_cast<int64_t>(runs_.size());
  p.group_bounds = group_bounds_.data();
  p.pieces = pieces_.data();
  p.runs = runs_.data();
  p.sources = sources_.data();
  p.last_run = last_run_.data();
  p.final_sources = final_sources_.data();
}

void ConvPlan::add_row(int64_t row, int64_t length, const int32_t* ids, int64_t stride) {
  int64_t padding = 0, run_id = -1;
  for (int64_t t = 0; t < length; ++t) {
    const int64_t id = ids[t * stride];
    if (id < 0) continue;
    add_padding(row, padding, t);
    padding = t + 1;
    if (id != run_id) add_run(row, run_id);
    run_id = id;
    steps_.push_back(t);
  }
  add_padding(row, padding, length);
  add_run(row, run_id);
}

void ConvPlan::add_padding(int64_t row, int64_t start, int64_t end) {
  for (; start < end; start += max_piece_) {
    ConvPiece piece;
    piece.batch = row;
    piece.start = start;
    piece.length = std::min(max_piece_, end - start);
    add_piece(piece);
  }
}

// The steps collected so far are one run.
void ConvPlan::add_run(int64_t row, int64_t id) {
  const auto length = static_cast<int64_t>(steps_.size());
  if (length == 0) return;
  ConvRun run;
  run.batch = row;
  run.state = id < states_ ? id : -1;
  run.length = length;
  run.first = static_cast<int64_t>(sources_.size());
  sources_.insert(sources_.end(), steps_.begin(), steps_.begin() + std::min(length, last_));
  const auto number = static_cast<int64_t>(runs_.size());
  runs_.push_back(run);

  for (int64_t begin = 0, end; begin < length; begin = end) {
    end = begin + 1;
    while (end < length && end - begin < max_piece_ && steps_[end] == steps_[end - 1] + 1) ++end;
    ConvPiece piece;
    piece.batch = row;
    piece.start = steps_[begin];
    piece.length = end - begin;
    piece.run = number;
    piece.before = static_cast<int64_t>(sources_.size());
    for (int64_t k = 0; k < last_; ++k) add_source(run.state, begin - last_ + k);
    piece.after = static_cast<int64_t>(sources_.size());
    piece.num_after = std::min(last_, length - end);
    sources_.insert(sources_.end(), steps_.begin() + end, steps_.begin() + end + piece.num_after);
    piece.num_later = length - end;
    add_piece(piece);
  }
  if (run.state >= 0) {
    last_run_[static_cast<size_t>(run.state)] = number;
    const size_t before = sources_.size();
    for (int64_t k = 0; k < last_; ++k) add_source(run.state, length - last_ + k);
    std::copy(sources_.begin() + before, sources_.end(),
              final_sources_.begin() + run.state * last_);
    sources_.resize(before);
  }
  steps_.clear();
}

// The run's input number `index`; negative numbers lie in its initial state.
void ConvPlan::add_source(int64_t state, int64_t index) {
  int64_t source = kNoSource;
  if (index >= 0) {
    source = steps_[static_cast<size_t>(index)];
  } else if (initial_ && state >= 0) {
    source = state_source(last_ + index);
  }
  sources_.push_back(source);
}

void ConvPlan::add_piece(const ConvPiece& piece) {
  pieces_.push_back(piece);
  steps_in_group_ += piece.length;
  if (steps_in_group_ >= max_piece_) {
    group_bounds_.push_back(static_cast<int64_t>(pieces_.size()));
    steps_in_group_ = 0;
  }
}

}  // namespace mamba
