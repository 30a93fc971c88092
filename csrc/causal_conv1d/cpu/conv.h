// Entry points of the compiled convolution; the plan (conv_plan.h) divides the work.
#pragma once

#include "../params.h"

namespace mamba {

// Two ways over the data: "time" vectorises over the steps of one channel and takes any strides and
// widths; "channels" vectorises over channels, needs x (and dout in the same dtype, dx, out) with
// stride 1 over the channels, and a width of 2, 3 or 4.
constexpr int64_t kTimePiece = 1024, kTimeBlock = 64;
constexpr int64_t kChannelPiece = 128, kChannelBlock = 256;

// Floats of scratch that one call of the functions below needs.
int64_t conv_scratch_size(const ConvParams& p);

// Channels [begin, end) (at most the block) of one group of steps: out; or dx and the group's share
// of dweight and dbias.
void conv_fwd_time(const ConvParams& p, int64_t group, int64_t begin, int64_t end, float* scratch);
void conv_bwd_time(const ConvParams& p, int64_t group, int64_t begin, int64_t end, float* scratch);
void conv_fwd_channels(const ConvParams& p, int64_t group, int64_t begin, int64_t end,
                       float* scratch);
void conv_bwd_channels(const ConvParams& p, int64_t group, int64_t begin, int64_t end,
                       float* scratch);

// Channels [begin, end) of the final states, and of the gradient of the initial states.
void conv_final_states(const ConvParams& p, int64_t begin, int64_t end);
void conv_initial_grad(const ConvParams& p, int64_t begin, int64_t end);

// Channels [begin, end) of one batch entry.
constexpr int64_t kUpdateBlock = 64;
int64_t conv_update_scratch_size(const ConvUpdateParams& p);
void conv_update(const ConvUpdateParams& p, int64_t row, int64_t begin, int64_t end,
                 float* scratch);

}  // namespace mamba
