// The depthwise causal convolution (Mamba, arXiv 2312.00752, figure 3):
//   out_t = act(bias + sum_j weight[w-1-j] x_{t-j}),  j = 0 .. w-1
// where inputs before a sequence's first come from its initial state, its last w-1 inputs so far.
#pragma once

#include "../common/tensor_arg.h"

namespace mamba {

// Where one input of a window lies: at a step >= 0 of the same batch row, nowhere (0), or in a
// column of the run's initial state.
constexpr int64_t kNoSource = -1;
inline constexpr int64_t state_source(int64_t column) { return -2 - column; }
inline constexpr bool is_state_source(int64_t source) { return source <= -2; }
inline constexpr int64_t state_column(int64_t source) { return -2 - source; }

// A run: a maximal stretch of one sequence number in a batch row, padding ignored.
struct ConvRun {
  int64_t batch = 0;
  int64_t state = -1;   // the row of its initial and final state; -1: it has none
  int64_t length = 0;   // steps, without padding
  int64_t first = 0;    // sources[first ...]: its first min(length, w-1) steps
  bool is_last = true;  // it makes the final state
};

// Neighbouring steps of one run, or of padding.
struct ConvPiece {
  int64_t batch = 0, start = 0, length = 0;
  int64_t run = -1;                  // -1: padding
  int64_t before = 0;                // sources[before ...]: the w-1 inputs before it, oldest first
  int64_t after = 0, num_after = 0;  // sources[after ...]: the run's next steps, at most w-1
  int64_t num_later = 0;             // all steps of the run after this piece
};

struct ConvParams {
  int64_t batch = 0, channels = 0, length = 0, width = 0, states = 0;
  bool silu = false;

  TensorArg x, out;           // (batch, channels, length)
  TensorArg weight, bias;     // (channels, width), (channels,); bias optional
  TensorArg initial, final;   // (states, channels, width - 1); initial optional
  TensorArg dout, dx;         // as x
  TensorArg dfinal;           // as final, optional
  float* partial = nullptr;   // (groups, width + 1, channels): shares of dweight, then of dbias
  float* dinitial = nullptr;  // (states, channels, width - 1), contiguous

  // The pieces of group g are [group_bounds[g], group_bounds[g + 1]).
  int64_t num_groups = 0, num_runs = 0;
  const int64_t* group_bounds = nullptr;
  const ConvPiece* pieces = nullptr;
  const ConvRun* runs = nullptr;
  const int64_t* sources = nullptr;
  const int64_t* last_run = nullptr;       // (states,): the run that makes the final state, or -1
  const int64_t* final_sources = nullptr;  // (states, width - 1)
};

struct ConvUpdateParams {
  int64_t batch = 0, channels = 0, length = 0, width = 0, columns = 0;
  bool silu = false;
  TensorArg x, out;                // (batch, channels, length); out is contiguous
  TensorArg state;                 // (rows, channels, columns), read and written
  TensorArg weight, bias;          // (channels, width), (channels,); bias optional
  const int64_t* rows = nullptr;   // (batch,): the state's row; negative: skip
  const int64_t* start = nullptr;  // (batch,): the column of the first input, in [0, columns), if
                                   // the state is a ring buffer; else null
};

}  // namespace mamba
