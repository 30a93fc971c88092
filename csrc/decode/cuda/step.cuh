// One token of a whole model for up to eight rows, in one launch: a block on each multiprocessor,
// four barriers a layer. Between two barriers every block computes its share of one product:
//
//   in_proj   norm in front; convolution, SiLU and the gate's SiLU behind it
//   x_proj    partial sums over slices of its input
//   (states)  dt_proj, softplus, state update, skip and gate: each block its channels
//   out_proj  added to the residual stream
//
// and after the last layer the norm and lm_head. Sums are taken in an order that depends on sizes
// and the number of multiprocessors only.
#pragma once

#include "states.cuh"

namespace mamba {
namespace decode {

constexpr int kOutputs = 256;                      // summed at once, each by one thread
constexpr int kSumFloats = kOutputs * kTeamWarps;  // of one of two buffers for the warps' sums
constexpr int kTeamFloats = 2 * kWarps;

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + __expf(-x)); }

// Shared memory: what does not depend on sizes, then the inputs of the phase at hand.
template <int kStages>
constexpr int kFixedBytes = kWarps * WeightStream<kStages>::kBytes +
                            (2 * kSumFloats + kTeamFloats) * static_cast<int>(sizeof(float)) + 256;

template <typename T, int kRows, int kStages>
class Step {
  static constexpr int kElement = sizeof(T);
  static constexpr int kRingBytes = kWarps * WeightStream<kStages>::kBytes;
  static_assert(sizeof(Work) * kPhases <= 256, "the table of weights has its place");

 public:
  __device__ Step(const DecodeCudaParams& p, char* shared)
      : p_(p),
        sums_(reinterpret_cast<float*>(shared + kRingBytes)),
        team_(sums_ + 2 * kSumFloats),
        work_(reinterpret_cast<Work*>(team_ + kTeamFloats)),
        inputs_(shared + kFixedBytes<kStages>),
        stream_(p, work_, shared),
        barrier_(p.arrived),
        thread_(static_cast<int>(threadIdx.x)) {}

  __device__ void run() {
    describe_work<kElement>(p_, work_);
    __syncthreads();
    stream_.start();
    fetch_small(0);
    embed();
    barrier_.arrive();
    barrier_.wait();
    int layer = 0, phase = kInProj;
    while (phase != kPhases) {
      const DecodeLayerArgs& a = p_.layer[phase == kHead ? 0 : layer];
      load_inputs(a, phase);
      product(a, phase);
      const bool last = last_part(p_, phase);
      if (last) turn_.pass(work_[phase], phase);
      if (phase == kHead) break;
      if (last) {
        barrier_.arrive();
        if (phase == kInProj) fetch_small(layer + 1);
        if (phase == kXProj) {
          StatePhase<T, kRows>(p_, a, inputs_).run(barrier_);
          barrier_.arrive();
        }
        barrier_.wait();
      } else {
        __syncthreads();  // the next part's inputs take this one's place
      }
      phase = next_phase(p_, layer, phase);
    }
  }

 private:
  // This block's share of an array on its way into the L2 cache.
  __device__ void fetch(const void* data, int64_t bytes) {
    constexpr int kLine = 128;
    const int64_t first = int64_t{kLine} * (blockIdx.x * kThreads + thread_);
    const int64_t step = int64_t{kLine} * kThreads * gridDim.x;
#pragma unroll 1
    for (int64_t i = first; i < bytes; i += step) {
      asm volatile("prefetch.global.L2 [%0];" ::"l"(static_cast<const char*>(data) + i));
    }
  }

  // A layer's small arrays and states: each is read by few threads, late, one after the other.
  __device__ void fetch_small(int layer) {
    const int64_t model = int64_t{kElement} * p_.size.d_model;
    if (layer >= p_.size.layers) return fetch(p_.norm_weight, model);
    const DecodeLayerArgs& a = p_.layer[layer];
    const int64_t inner = p_.size.d_inner, rows = p_.size.batch * inner;
    const auto size_of = [](DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; };
    fetch(a.norm_weight, model);
    fetch(a.conv_weight, kElement * inner * p_.size.d_conv);
    fetch(a.conv_state, size_of(p_.conv_dtype) * rows * p_.size.d_conv);
    fetch(a.dt_proj, kElement * inner * p_.size.dt_rank);
    fetch(a.A_log, size_of(p_.A_dtype) * inner * p_.size.d_state);
    fetch(a.ssm_state, size_of(p_.ssm_dtype) * rows * p_.size.d_state);
  }

  // The residual stream begins as the embedding. An id outside the vocabulary gives NaN.
  __device__ void embed() {
    const int size = p_.size.d_model;
    for (int b = 0; b < p_.size.batch; ++b) {
      const int64_t id = p_.ids[b];
      const bool exists = id >= 0 && id < p_.size.vocab;
      for (int i = blockIdx.x * kThreads + thread_; i < size; i += gridDim.x * kThreads) {
        const float v = exists ? element(p_.embedding, id * size + i) : NAN;
        p_.residual[int64_t{b} * size + i] = v;
      }
    }
  }

  __device__ void load_inputs(const DecodeLayerArgs& a, int phase) {
    const Work w = work_[phase];
    pitch_ = pitch_of(w.units);
    if (phase == kInProj || phase == kHead) {
      const bool head = phase == kHead;
      RowNorm<T>(p_, head ? p_.norm_weight : a.norm_weight, head ? p_.norm_bias : a.norm_bias,
                 team_)
          .run(inputs_, pitch_);
    } else {
      load_rows(phase == kXProj ? p_.u : p_.y, w);
    }
  }

  // The block's units of every row of `from` (batch, d_inner) into shared memory.
  __device__ void load_rows(const void* from, const Work& w) {
    const int pieces = w.units * (kUnitBytes / 16), begin = w.unit_begin * kUnitBytes;
#pragma unroll 4
    for (int i = thread_; i < p_.size.batch * pieces; i += kThreads) {
      const int b = i / pieces, at = (i - b * pieces) * 16;
      uint4 v = make_uint4(0, 0, 0, 0);
      if (begin + at < w.row_bytes) {
        const char* row = static_cast<const char*>(from) + int64_t{b} * w.row_bytes;
        v = __ldcg(reinterpret_cast<const uint4*>(row + begin + at));
      }
      *reinterpret_cast<uint4*>(inputs_ + b * pitch_ + at) = arranged<T>(v);
    }
    __syncthreads();
  }

  // What an output needs besides its sum, fetched before the products. Of in_proj, as bits: the
  // convolution's weights and its window without the newest input.
  struct Extra {
    unsigned window[kMaxDecodeConv], weight[kMaxDecodeConv], bias, in_bias;
    float residual;
  };

  // This block's outputs of a weight. A thread finishes at most one output of those that are summed
  // at once.
  __device__ void product(const DecodeLayerArgs& a, int phase) {
    const Work w = work_[phase];
    int tile;
    int jobs = turn_.jobs(w, phase, tile);
    const int batch = p_.size.batch, blocks = static_cast<int>(gridDim.x);
    const int team = thread_ / (32 * kTeamWarps), part = thread_ / 32 % kTeamWarps;
    const int tile_floats = batch * kTileRows, job_floats = kTeamWarps * tile_floats;
    const int at_once = kOutputs / tile_floats;
    const int slot = thread_ / tile_floats, cell = thread_ - slot * tile_floats;
    const int b = cell / kTileRows;
    const Span span = team_span(w);
    float* buffer = sums_;
    for (; jobs > 0; jobs -= at_once, tile += at_once * blocks) {
      const int count = jobs < at_once ? jobs : at_once;
      const int row = (tile + slot * blocks) * kTileRows + cell % kTileRows;
      const bool owns = slot < count && row < w.rows;
      Extra extra;
      if (owns) prepare(a, phase, b, row, extra);
#pragma unroll 1
      for (int job = team; job < count; job += kTeams) {
        TileSums<T, kRows> sums;
        multiply(sums, inputs_ + span.begin * kUnitBytes, span.end - span.begin);
        sums.store(buffer + job * job_floats + part * tile_floats, batch);
      }
      __syncthreads();
      if (owns) {
        const float* from = buffer + slot * job_floats + cell;
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < kTeamWarps; ++i) sum += from[i * tile_floats];
        finish(a, phase, b, row, sum, extra);
      }
      buffer = sums_ + (buffer == sums_ ? kSumFloats : 0);
    }
  }

  __device__ __forceinline__ void multiply(TileSums<T, kRows>& sums, const char* inputs,
                                           int units) {
    inputs = TileSums<T, kRows>::lane_inputs(inputs, pitch_, p_.size.batch);
#pragma unroll 1
    for (; units > 0; units -= kGroup, inputs += kGroup * kUnitBytes) {
      add_units(sums, stream_.next(), kSlotBytes, inputs, pitch_, p_.size.batch, units);
    }
  }

  __device__ static float element(const void* data, int64_t i) {
    return to_float(static_cast<const T*>(data)[i]);
  }

  __device__ static unsigned bits(const void* data, int64_t i) {
    return load_bits(data, dtype_code<T>(), i);
  }

  __device__ static float value(unsigned v) { return from_bits(v, dtype_code<T>()); }

  __device__ void prepare(const DecodeLayerArgs& a, int phase, int b, int row, Extra& e) const {
    if (phase == kInProj) {
      const int channels = p_.size.d_inner, width = p_.size.d_conv;
      e.in_bias = a.in_bias != nullptr ? bits(a.in_bias, row) : 0;
      if (row >= channels) return;
      e.bias = a.conv_bias != nullptr ? bits(a.conv_bias, row) : 0;
      const int64_t state = (int64_t{b} * channels + row) * width;
#pragma unroll
      for (int i = 0; i < kMaxDecodeConv; ++i) {
        if (i >= width) break;
        e.weight[i] = bits(a.conv_weight, int64_t{row} * width + i);
        if (i + 1 < width) e.window[i] = load_bits(a.conv_state, p_.conv_dtype, state + i + 1);
      }
    } else if (phase >= kOutProj && phase != kHead) {
      e.residual = __ldcg(p_.residual + int64_t{b} * p_.size.d_model + row);
      if (phase == kOutProj && a.out_bias != nullptr) e.residual += element(a.out_bias, row);
    }
  }

  __device__ void finish(const DecodeLayerArgs& a, int phase, int b, int row, float v,
                         const Extra& e) const {
    if (phase == kInProj) {
      put_in(a, b, row, v, e);
    } else if (phase == kXProj) {
      const int slice = static_cast<int>(blockIdx.x) % p_.plan.x_slices;
      p_.projected[(int64_t{slice} * p_.size.batch + b) * p_.size.projected + row] = v;
    } else if (phase == kHead) {
      static_cast<T*>(p_.logits)[int64_t{b} * p_.size.vocab + row] = from_float<T>(v);
    } else {
      v += e.residual;
      if (last_part(p_, phase)) v = rounded(v, p_.residual_dtype);
      p_.residual[int64_t{b} * p_.size.d_model + row] = v;
    }
  }

  // The residual stream's dtype rounds once, when the sum is complete.
  __device__ static float rounded(float v, DType dtype) {
    if (dtype == DType::kFloat16) return to_float(from_float<__half>(v));
    if (dtype == DType::kBFloat16) return to_float(from_float<__nv_bfloat16>(v));
    return v;
  }

  // One output of in_proj: a channel's new input, or its gate.
  __device__ void put_in(const DecodeLayerArgs& a, int b, int row, float v, const Extra& e) const {
    const int channels = p_.size.d_inner, width = p_.size.d_conv;
    v = to_float(from_float<T>(v + value(e.in_bias)));
    if (row >= channels) {
      p_.gate[int64_t{b} * channels + row - channels] = v * sigmoid(v);
      return;
    }
    const int64_t state = (int64_t{b} * channels + row) * width;
    float out = value(e.bias);
#pragma unroll
    for (int i = 0; i < kMaxDecodeConv; ++i) {
      if (i >= width) break;
      const float x = i + 1 == width ? v : from_bits(e.window[i], p_.conv_dtype);
      out = fmaf(x, value(e.weight[i]), out);
      store_float(a.conv_state, p_.conv_dtype, state + i, x);
    }
    static_cast<T*>(p_.u)[int64_t{b} * channels + row] = from_float<T>(out * sigmoid(out));
  }

  const DecodeCudaParams& p_;
  float *sums_, *team_;
  Work* work_;
  char* inputs_;
  WeightStream<kStages> stream_;
  GridBarrier barrier_;
  Turn turn_;
  const int thread_;
  int pitch_ = 0;
};

}  // namespace decode
}  // namespace mamba
