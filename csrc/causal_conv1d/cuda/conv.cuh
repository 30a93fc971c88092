// What the convolution's kernels share.
#pragma once

#include <cuda_runtime.h>

#include "../../common/cuda_vector.cuh"
#include "conv.h"

namespace mamba {

constexpr int kConvThreads = 128;
constexpr int kMaxFastWidth = 4;
// A thread with channels innermost: two channels, whose weights it loads at once, and so many
// steps.
constexpr int kForwardSteps = 64, kBackwardSteps = 64;
constexpr int kForwardChannels = 2, kBackwardChannels = 2;
constexpr int kBackwardBatch = 8;  // steps whose loads go out together
constexpr int kGeneralSteps = 64;  // whose share of dweight one thread adds up

__device__ __forceinline__ float conv_sigmoid(float v) {
  return __fdividef(1.0f, 1.0f + __expf(-v));
}
__device__ __forceinline__ float conv_silu(float v) { return v * conv_sigmoid(v); }
__device__ __forceinline__ float conv_dsilu(float v) {
  const float s = conv_sigmoid(v);
  return s * fmaf(v, 1.0f - s, 1.0f);
}

__device__ __forceinline__ float conv_weight(const ConvParams& p, int64_t c, int64_t k) {
  return load_at(p.weight, c, k);
}
__device__ __forceinline__ float conv_bias(const ConvParams& p, int64_t c) {
  return p.bias.data ? load_float(p.bias.data, p.bias.dtype, c * p.bias.stride[0]) : 0.0f;
}

// n elements at data[i * stride]; the dtype is looked at once, so that the loads go out together.
template <int N>
__device__ __forceinline__ void load_strided(float (&v)[N], const void* data, DType dtype,
                                             int64_t offset, int64_t stride) {
  const auto all = [&](DType known) {
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = load_float(data, known, offset + i * stride);
  };
  if (dtype == DType::kFloat32) {
    all(DType::kFloat32);
  } else if (dtype == DType::kBFloat16) {
    all(DType::kBFloat16);
  } else {
    all(DType::kFloat16);
  }
}

// Weights and biases of V neighbouring channels.
template <int W, int V>
__device__ __forceinline__ void load_weights(const ConvParams& p, int64_t channel,
                                             float (&weight)[W][V], float (&bias)[V]) {
  float flat[W * V];
  const auto all = [&](DType known) {
#pragma unroll
    for (int i = 0; i < W * V; ++i) {
      const int64_t at = (channel + i / W) * p.weight.stride[0] + i % W * p.weight.stride[1];
      flat[i] = load_float(p.weight.data, known, at);
    }
  };
#pragma unroll
  for (int v = 0; v < V; ++v) bias[v] = 0.0f;
  if (p.bias.data) {
    load_strided<V>(bias, p.bias.data, p.bias.dtype, channel * p.bias.stride[0], p.bias.stride[0]);
  }
  if (p.weight.dtype == DType::kFloat32) {
    all(DType::kFloat32);
  } else if (p.weight.dtype == DType::kBFloat16) {
    all(DType::kBFloat16);
  } else {
    all(DType::kFloat16);
  }
#pragma unroll
  for (int i = 0; i < W * V; ++i) weight[i % W][i / W] = flat[i];
}

// The input `lag` steps before the start of a run of state `id`; 1 is the newest.
__device__ __forceinline__ float conv_initial(const ConvParams& p, int64_t id, int64_t c,
                                              int64_t lag) {
  if (!p.initial.data || id < 0 || id >= p.states || lag >= p.width) return 0.0f;
  return load_at(p.initial, id, c, p.width - 1 - lag);
}

// Steps of one run, walked backwards.
struct ConvCursor {
  const int* previous;  // of the row, or null
  int64_t t;
  int64_t outside = 0;  // how many steps before the run's start

  __device__ __forceinline__ void back() {
    if (outside > 0) {
      ++outside;
      return;
    }
    const int64_t before = previous ? previous[t] : t - 1;
    if (before < 0) {
      outside = 1;
    } else {
      t = before;
    }
  }
};

__device__ __forceinline__ int64_t conv_state_of(const ConvLinks& links, const ConvParams& p,
                                                 int64_t row, int64_t t) {
  return links.ids ? links.ids[row * p.length + t] : row;
}
__device__ __forceinline__ const int* conv_row(const int* links, int64_t row, int64_t length) {
  return links ? links + row * length : nullptr;
}

// bias + sum of the window that ends at step t.
__device__ __forceinline__ float conv_window(const CudaConvParams& c, int64_t row, int64_t channel,
                                             int64_t t) {
  const ConvParams& p = c.p;
  float sum = conv_bias(p, channel);
  ConvCursor at{conv_row(c.links.previous, row, p.length), t};
  const int64_t id = conv_state_of(c.links, p, row, t);
  for (int64_t j = 0; j < p.width; ++j) {
    const float v =
        at.outside ? conv_initial(p, id, channel, at.outside) : load_at(p.x, row, channel, at.t);
    sum = fmaf(conv_weight(p, channel, p.width - 1 - j), v, sum);
    if (j + 1 < p.width) at.back();
  }
  return sum;
}

// The dtype of x and of its like, known to be fp32 or to be one of 16 bits: without a branch
// between them, loads go out together.
template <bool kWide>
__device__ __forceinline__ DType conv_dtype(const TensorArg& t) {
  if (kWide) return DType::kFloat32;
  return t.dtype == DType::kBFloat16 ? DType::kBFloat16 : DType::kFloat16;
}

// The W - 1 inputs before step `start` of V neighbouring channels, as window[1 ... W - 1].
template <int W, int V, bool kWide>
__device__ __forceinline__ void load_window(const ConvParams& p, int64_t row, int64_t channel,
                                            int64_t start, float (&window)[W][V]) {
  const int64_t x_row = row * p.x.stride[0] + channel;
  if (start >= W - 1) {
#pragma unroll
    for (int k = 1; k < W; ++k) {
      load_aligned<V>(window[k], p.x.data, conv_dtype<kWide>(p.x),
                      x_row + (start - W + k) * p.x.stride[2]);
    }
    return;
  }
#pragma unroll
  for (int k = 1; k < W; ++k) {
    const int64_t t = start - W + k;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      window[k][v] =
          t >= 0 ? load_at(p.x, row, channel + v, t) : conv_initial(p, row, channel + v, -t);
    }
  }
}

// Elements (row, channel, step) of a tensor laid out like x, neighbouring threads on neighbouring
// memory.
struct ConvElement {
  int64_t row, channel, step;
  __device__ __forceinline__ ConvElement(const ConvParams& p, int64_t i) {
    const bool channel_last = p.x.stride[1] == 1 && p.x.stride[2] != 1;
    const int64_t inner = channel_last ? p.channels : p.length;
    const int64_t outer = channel_last ? p.length : p.channels;
    const int64_t a = i % inner, b = i / inner % outer;
    row = i / inner / outer;
    channel = channel_last ? a : b, step = channel_last ? b : a;
  }
};

// Whether the kernels for widths 2 to 4 with channels innermost (first) or steps innermost (second)
// serve these tensors.
inline bool conv_fast_width(const CudaConvParams& c) {
  return !c.links.previous && c.p.width >= 2 && c.p.width <= kMaxFastWidth;
}
inline bool conv_channel_vectors(const TensorArg& t, int n) {
  const int64_t strides[2] = {t.stride[0], t.stride[2]};
  return t.stride[1] == 1 && vectors_fit(t.data, t.dtype, n, strides, 2);
}
inline bool conv_time_vectors(const TensorArg& t) {
  return t.stride[2] == 1 && vectors_fit(t.data, t.dtype, kVector, t.stride, 2);
}

// fn<width, fp32>(args), for the width and dtype of the convolution c.
#define MAMBA_CONV_FAST(fn, c, ...)                                      \
  {                                                                      \
    const bool wide = (c).p.x.dtype == DType::kFloat32;                  \
    if ((c).p.width == 2) {                                              \
      wide ? fn<2, true>(c, __VA_ARGS__) : fn<2, false>(c, __VA_ARGS__); \
    } else if ((c).p.width == 3) {                                       \
      wide ? fn<3, true>(c, __VA_ARGS__) : fn<3, false>(c, __VA_ARGS__); \
    } else {                                                             \
      wide ? fn<4, true>(c, __VA_ARGS__) : fn<4, false>(c, __VA_ARGS__); \
    }                                                                    \
  }

inline const char* conv_launched() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

inline unsigned conv_blocks(int64_t threads) {
  const int64_t blocks = (threads + kConvThreads - 1) / kConvThreads, most = int64_t{1} << 30;
  return static_cast<unsigned>(blocks < most ? blocks : most);
}

}  // namespace mamba
