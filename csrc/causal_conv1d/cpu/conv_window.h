// What both ways of the convolution share. Only *.isa.cpp files include this.
#pragma once

#include "../../common/rows.h"
#include "../params.h"

namespace mamba {
namespace MAMBA_ISA {

MAMBA_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// The gradient of silu at x, given its sigmoid.
MAMBA_INLINE Vec silu_grad(Vec x, Vec s) { return s * (1.0f + x * (1.0f - s)); }

// The input that a source names, of one channel and of the piece's run.
MAMBA_NOINLINE float input_at(const ConvParams& p, const ConvPiece& piece, int64_t channel,
                              int64_t source) {
  if (source == kNoSource) return 0.0f;
  const bool in_state = is_state_source(source);
  const TensorArg& t = in_state ? p.initial : p.x;
  const int64_t row = in_state ? p.runs[piece.run].state : piece.batch;
  const int64_t column = in_state ? state_column(source) : source;
  return read_one(t, row * t.stride[0] + channel * t.stride[1] + column * t.stride[2]);
}

// The column of the final states that holds step i of the piece, or a negative number.
MAMBA_NOINLINE int64_t final_column(const ConvParams& p, const ConvPiece& piece, int64_t i) {
  if (!p.dfinal.data || !p.runs[piece.run].is_last) return -1;
  return p.width - 2 - (piece.num_later + piece.length - 1 - i);
}

}  // namespace MAMBA_ISA
}  // namespace mamba
