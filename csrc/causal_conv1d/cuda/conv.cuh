// What the convolution's kernels share.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "../../common/cuda_math.cuh"
#include "../../common/cuda_vector.cuh"
#include "conv.h"

namespace mamba {

constexpr int kConvThreads = 128;
constexpr int kMaxFastWidth = 4;
constexpr int kGeneralSteps = 64;  // whose share of dweight one thread adds up

__device__ __forceinline__ float conv_silu(float v) { return v * fast_sigmoid(v); }
__device__ __forceinline__ float conv_dsilu(float v) {
  const float s = fast_sigmoid(v);
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

// V elements of type T as they lie in memory.
template <typename T, int V>
struct alignas(V * sizeof(T) < 16 ? V * sizeof(T) : 16) Packed {
  T v[V];
};

template <typename T, int V>
__device__ __forceinline__ Packed<T, V> load_packed(const T* from) {
  constexpr int kBytes = V * sizeof(T);
  Packed<T, V> packed;
  if constexpr (kBytes == 4) {
    *reinterpret_cast<uint32_t*>(&packed) = __ldg(reinterpret_cast<const uint32_t*>(from));
  } else if constexpr (kBytes == 8) {
    *reinterpret_cast<uint2*>(&packed) = __ldg(reinterpret_cast<const uint2*>(from));
  } else {
    static_assert(kBytes % 16 == 0, "a vector has 4 or 8 bytes, or whole 16");
#pragma unroll
    for (int i = 0; i < kBytes / 16; ++i) {
      reinterpret_cast<uint4*>(&packed)[i] = __ldg(reinterpret_cast<const uint4*>(from) + i);
    }
  }
  return packed;
}

template <typename T, int V>
__device__ __forceinline__ void store_packed(const float (&v)[V], T* to) {
  constexpr int kBytes = V * sizeof(T);
  Packed<T, V> packed;
#pragma unroll
  for (int i = 0; i < V; ++i) packed.v[i] = from_float<T>(v[i]);
  // As words: the compiler would store the elements one by one.
  if constexpr (kBytes == 4) {
    *reinterpret_cast<uint32_t*>(to) = *reinterpret_cast<const uint32_t*>(&packed);
  } else if constexpr (kBytes == 8) {
    *reinterpret_cast<uint2*>(to) = *reinterpret_cast<const uint2*>(&packed);
  } else {
#pragma unroll
    for (int i = 0; i < kBytes / 16; ++i) {
      reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(&packed)[i];
    }
  }
}

// BYTES (8 or 16) from global to shared memory without a register between; zeros after `count`
// bytes.
template <int BYTES>
__device__ __forceinline__ void copy_ahead(void* to, const void* from, int count) {
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address), "l"(from),
               "n"(BYTES), "r"(count)
               : "memory");
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

template <typename T>
struct ConvType {
  using Element = T;
};

// fn(width, element type, SiLU or not), each known to the compiler.
template <typename F>
void conv_dispatch(const ConvParams& p, F&& fn) {
  const auto of_type = [&](auto width, auto type) {
    p.silu ? fn(width, type, std::true_type{}) : fn(width, type, std::false_type{});
  };
  const auto of_width = [&](auto width) {
    p.x.dtype == DType::kFloat32    ? of_type(width, ConvType<float>{})
    : p.x.dtype == DType::kBFloat16 ? of_type(width, ConvType<__nv_bfloat16>{})
                                    : of_type(width, ConvType<__half>{});
  };
  p.width == 2   ? of_width(std::integral_constant<int, 2>{})
  : p.width == 3 ? of_width(std::integral_constant<int, 3>{})
                 : of_width(std::integral_constant<int, 4>{});
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
