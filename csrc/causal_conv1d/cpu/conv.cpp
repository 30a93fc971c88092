// Choice of the instruction set, and what is too little work to be worth vectors.
#include "conv.h"

#include <algorithm>

#include "../../common/cpu_convert.h"
#include "../../common/cpu_isa.h"
#include "../../common/cpu_math.h"

namespace mamba {

#define MAMBA_CONV_ARGUMENTS \
  (const ConvParams& p, int64_t group, int64_t begin, int64_t end, float* scratch)
MAMBA_DECLARE_ISA(void conv_fwd_time MAMBA_CONV_ARGUMENTS)
MAMBA_DECLARE_ISA(void conv_bwd_time MAMBA_CONV_ARGUMENTS)
MAMBA_DECLARE_ISA(void conv_fwd_channels MAMBA_CONV_ARGUMENTS)
MAMBA_DECLARE_ISA(void conv_bwd_channels MAMBA_CONV_ARGUMENTS)
MAMBA_DECLARE_ISA(void conv_update(const ConvUpdateParams& p, int64_t row, int64_t begin,
                                   int64_t end, float* scratch))

void conv_fwd_time MAMBA_CONV_ARGUMENTS {
  MAMBA_FOR_ISA(conv_fwd_time, p, group, begin, end, scratch)
}
void conv_bwd_time MAMBA_CONV_ARGUMENTS {
  MAMBA_FOR_ISA(conv_bwd_time, p, group, begin, end, scratch)
}
void conv_fwd_channels MAMBA_CONV_ARGUMENTS {
  MAMBA_FOR_ISA(conv_fwd_channels, p, group, begin, end, scratch)
}
void conv_bwd_channels MAMBA_CONV_ARGUMENTS {
  MAMBA_FOR_ISA(conv_bwd_channels, p, group, begin, end, scratch)
}
void conv_update(const ConvUpdateParams& p, int64_t row, int64_t begin, int64_t end,
                 float* scratch){MAMBA_FOR_ISA(conv_update, p, row, begin, end, scratch)}

int64_t conv_scratch_size(const ConvParams& p) {
  constexpr int64_t kMaxLanes = 16;
  // "time": three rows of a piece with what lies before and after it; "channels": rows of the
  // block.
  const int64_t time = 3 * (kTimePiece + 2 * p.width + 2 * kMaxLanes) + p.width;
  const int64_t channels = (4 * p.width + 1) * (kChannelBlock + kMaxLanes);
  return std::max(time, channels);
}

int64_t conv_update_scratch_size(const ConvUpdateParams& p) {
  return std::max<int64_t>(10, p.width + p.length + 1) * kUpdateBlock;
}

namespace {

int64_t at(const TensorArg& t, int64_t i, int64_t j, int64_t k) {
  return i * t.stride[0] + j * t.stride[1] + k * t.stride[2];
}

float value_at(const TensorArg& t, int64_t offset) { return load_float(t.data, t.dtype, offset); }

// The input that a source of this run names.
float input_at(const ConvParams& p, const ConvRun& run, int64_t channel, int64_t source) {
  if (source == kNoSource) return 0.0f;
  if (is_state_source(source)) {
    return value_at(p.initial, at(p.initial, run.state, channel, state_column(source)));
  }
  return value_at(p.x, at(p.x, run.batch, channel, source));
}

// Adds what the first steps of a run give to the gradient of its initial state.
void add_initial_grad(const ConvParams& p, const ConvRun& run, int64_t channel, float* grad) {
  const int64_t last = p.width - 1, steps = std::min(run.length, last);
  const auto weight = [&](int64_t k) {
    return value_at(p.weight, channel * p.weight.stride[0] + k * p.weight.stride[1]);
  };
  const auto input = [&](int64_t index) {
    const int64_t source = index < 0 ? (p.initial.data ? state_source(last + index) : kNoSource)
                                     : p.sources[run.first + index];
    return input_at(p, run, channel, source);
  };
  for (int64_t i = 0; i < steps; ++i) {
    float g = value_at(p.dout, at(p.dout, run.batch, channel, p.sources[run.first + i]));
    if (p.silu) {
      float pre = p.bias.data ? value_at(p.bias, channel * p.bias.stride[0]) : 0.0f;
      for (int64_t k = 0; k <= last; ++k) pre += weight(k) * input(i - last + k);
      const float sigmoid = 1.0f / (1.0f + exp_approx(-pre));
      g *= sigmoid * (1.0f + pre * (1.0f - sigmoid));
    }
    // Tap k of step i reads input i - last + k, which is column i + k of the state while i + k <
    // last.
    for (int64_t k = 0; i + k < last; ++k) grad[i + k] += weight(k) * g;
  }
}

}  // namespace

void conv_final_states(const ConvParams& p, int64_t begin, int64_t end) {
  const int64_t last = p.width - 1;
  for (int64_t id = 0; id < p.states; ++id) {
    ConvRun run;
    if (p.last_run[id] >= 0) run = p.runs[p.last_run[id]];
    run.state = id;
    for (int64_t k = 0; k < last; ++k) {
      const int64_t source = p.final_sources[id * last + k];
      for (int64_t c = begin; c < end; ++c) {
        const float value = input_at(p, run, c, source);
        store_float(p.final.data, p.final.dtype, at(p.final, id, c, k), value);
      }
    }
  }
}

void conv_initial_grad(const ConvParams& p, int64_t begin, int64_t end) {
  const int64_t last = p.width - 1;
  for (int64_t id = 0; id < p.states; ++id) {
    // What the last run was too short to push out of the state is in the final state as well.
    const int64_t length = p.last_run[id] < 0 ? 0 : p.runs[p.last_run[id]].length;
    for (int64_t c = begin; c < end; ++c) {
      for (int64_t k = 0; k < last; ++k) {
        const bool kept = p.dfinal.data && k >= length;
        p.dinitial[(id * p.channels + c) * last + k] =
            kept ? value_at(p.dfinal, at(p.dfinal, id, c, k - length)) : 0.0f;
      }
    }
  }
  for (int64_t r = 0; r < p.num_runs; ++r) {
    const ConvRun& run = p.runs[r];
    if (run.state < 0) continue;
    for (int64_t c = begin; c < end; ++c) {
      add_initial_grad(p, run, c, p.dinitial + (run.state * p.channels + c) * last);
    }
  }
}

}  // namespace mamba
