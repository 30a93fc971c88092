// The update of many rows of one head: the usual decode step of a batch. Two lanes share a channel
// and keep its A in registers over several rows, whose loads are under way together.
#pragma once

#include <type_traits>

#include "../../common/cuda_math.cuh"
#include "../../common/cuda_vector.cuh"
#include "../params.h"

namespace mamba {

constexpr int kRowLanes = 2, kRowThreads = 128, kRowChannels = kRowThreads / kRowLanes;
constexpr int kRowsAtOnce = 4;  // rows loaded together

template <typename T>
__host__ __device__ constexpr DType static_dtype() {
  return sizeof(T) == 4              ? DType::kFloat32
         : std::is_same_v<T, __half> ? DType::kFloat16
                                     : DType::kBFloat16;
}

// kEach neighbouring elements as bits, converted only when they are used.
template <typename T, int kEach>
struct Bits {
  static constexpr int kWords = kEach * static_cast<int>(sizeof(T)) / 4;
  uint32_t word[kWords];

  __device__ __forceinline__ void load(const T* from) {
    if constexpr (kWords % 4 == 0) {
#pragma unroll
      for (int i = 0; i < kWords / 4; ++i) {
        const uint4 v = reinterpret_cast<const uint4*>(from)[i];
        word[4 * i] = v.x, word[4 * i + 1] = v.y, word[4 * i + 2] = v.z, word[4 * i + 3] = v.w;
      }
    } else {
      static_assert(kWords == 2, "at least four values of two bytes");
      const uint2 v = *reinterpret_cast<const uint2*>(from);
      word[0] = v.x, word[1] = v.y;
    }
  }
  __device__ __forceinline__ void store(T* to) const {
    if constexpr (kWords % 4 == 0) {
#pragma unroll
      for (int i = 0; i < kWords / 4; ++i) {
        reinterpret_cast<uint4*>(to)[i] =
            make_uint4(word[4 * i], word[4 * i + 1], word[4 * i + 2], word[4 * i + 3]);
      }
    } else {
      static_assert(kWords == 2, "at least four values of two bytes");
      *reinterpret_cast<uint2*>(to) = make_uint2(word[0], word[1]);
    }
  }
  __device__ __forceinline__ void take(const float (&v)[kEach]) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      if constexpr (sizeof(T) == 4) {
        word[i] = __float_as_uint(v[i]);
      } else {
        word[i] = floats_to_halves(v[2 * i], v[2 * i + 1], std::is_same_v<T, __nv_bfloat16>);
      }
    }
  }
  __device__ __forceinline__ void floats(float (&v)[kEach]) const {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      if constexpr (sizeof(T) == 4) {
        v[i] = __uint_as_float(word[i]);
      } else {
        const float2 two = halves_to_floats(word[i], std::is_same_v<T, __nv_bfloat16>);
        v[2 * i] = two.x, v[2 * i + 1] = two.y;
      }
    }
  }
};

template <int N>
__device__ __forceinline__ void load_floats(float (&v)[N], const float* from) {
#pragma unroll
  for (int i = 0; i < N / 4; ++i) {
    const float4 four = __ldg(reinterpret_cast<const float4*>(from) + i);
    v[4 * i] = four.x, v[4 * i + 1] = four.y, v[4 * i + 2] = four.z, v[4 * i + 3] = four.w;
  }
}

template <typename TState, typename TInput, int kEach>
__global__ void __launch_bounds__(kRowThreads)
    state_rows_kernel(const __grid_constant__ StateUpdateParams p, int rows_each) {
  constexpr int kStates = kEach * kRowLanes;
  const int lane = threadIdx.x % kRowLanes;
  const int64_t wanted = int64_t{blockIdx.x} * kRowChannels + threadIdx.x / kRowLanes;
  const bool exists = wanted < p.head_dim;
  const int64_t channel = exists ? wanted : p.head_dim - 1;
  float A[kEach];
  load_floats(A, static_cast<const float*>(p.A.data) + channel * kStates + lane * kEach);
#pragma unroll
  for (int j = 0; j < kEach; ++j) A[j] *= 1.44269504088896341f;
  const float D = p.D.data ? load_at(p.D, 0, channel) : 0.0f;
  const float bias = p.dt_bias.data ? load_at(p.dt_bias, 0, channel) : 0.0f;
  const auto input = [&](const TensorArg& t, int64_t row) {
    return static_cast<const TInput*>(t.data)[row * t.stride[0] + channel * t.stride[2]];
  };
  const int64_t first = int64_t{blockIdx.y} * rows_each, end = min(p.batch, first + rows_each);
  for (int64_t base = first; base < end; base += kRowsAtOnce) {
    Bits<TState, kEach> state[kRowsAtOnce];
    Bits<TInput, kEach> B[kRowsAtOnce], C[kRowsAtOnce];
    TInput x[kRowsAtOnce], dt[kRowsAtOnce], z[kRowsAtOnce];
    TState* place[kRowsAtOnce];
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) {
      const int64_t row = min(base + r, end - 1);
      place[r] = static_cast<TState*>(p.state.data) + row * p.state.stride[0] + channel * kStates +
                 lane * kEach;
      state[r].load(place[r]);
      B[r].load(static_cast<const TInput*>(p.B.data) + row * p.B.stride[0] + lane * kEach);
      C[r].load(static_cast<const TInput*>(p.C.data) + row * p.C.stride[0] + lane * kEach);
      x[r] = input(p.x, row), dt[r] = input(p.dt, row);
      if (p.z.data) z[r] = input(p.z, row);
    }
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) {
      const float u = to_float(x[r]);
      float delta = to_float(dt[r]) + bias;
      if (p.dt_softplus && delta <= 20.0f) delta = log1pf(__expf(delta));
      float h[kEach], b[kEach], c[kEach];
      state[r].floats(h), B[r].floats(b), C[r].floats(c);
      float y = 0.0f;
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        h[j] = fmaf(h[j], fast_exp2(delta * A[j]), delta * u * b[j]);
        y = fmaf(h[j], c[j], y);
      }
      y += __shfl_xor_sync(0xffffffffu, y, 1);
      if (!exists || base + r >= end) continue;
      state[r].take(h);
      state[r].store(place[r]);
      if (lane != 0) continue;
      y = fmaf(u, D, y);
      if (p.z.data) {
        const float gate = to_float(z[r]);
        y *= gate * fast_sigmoid(gate);
      }
      static_cast<TInput*>(p.out.data)[(base + r) * p.head_dim + channel] = from_float<TInput>(y);
    }
  }
}

// Whether the kernel above serves the call.
inline bool state_rows_fit(const StateUpdateParams& p) {
  const int64_t n = p.state_dim;
  const DType input = p.x.dtype;
  const bool one_dtype = p.dt.dtype == input && p.B.dtype == input && p.C.dtype == input &&
                         (!p.z.data || p.z.dtype == input);
  const auto aligned = [n](const TensorArg& t) {
    const int64_t size = element_size(t.dtype), bytes = n / kRowLanes * size;
    return reinterpret_cast<uintptr_t>(t.data) % 16 == 0 &&
           t.stride[0] * size % (bytes < 16 ? bytes : 16) == 0;
  };
  return p.heads == 1 && p.groups == 1 && p.indices == nullptr && one_dtype &&
         (n == 8 || n == 16 || n == 32) && p.A.dtype == DType::kFloat32 && p.A.stride[2] == 1 &&
         p.A.stride[1] == n && p.state.stride[3] == 1 && p.state.stride[2] == n &&
         p.B.stride[2] == 1 && p.C.stride[2] == 1 && aligned(p.A) && aligned(p.state) &&
         aligned(p.B) && aligned(p.C) &&
         (p.state.dtype == DType::kFloat32 || p.state.dtype == input);
}

template <typename TState, typename TInput>
void launch_state_rows(const StateUpdateParams& p, cudaStream_t stream) {
  // More rows of a block read A less often, where there are blocks enough.
  constexpr int kManyBlocks = 1024;
  const int64_t columns = (p.head_dim + kRowChannels - 1) / kRowChannels;
  const int rows_each =
      columns * p.batch >= kManyBlocks * 2 * kRowsAtOnce ? 2 * kRowsAtOnce : kRowsAtOnce;
  const dim3 grid(static_cast<unsigned>(columns),
                  static_cast<unsigned>((p.batch + rows_each - 1) / rows_each));
  switch (p.state_dim) {
    case 8:
      return state_rows_kernel<TState, TInput, 4><<<grid, kRowThreads, 0, stream>>>(p, rows_each);
    case 16:
      return state_rows_kernel<TState, TInput, 8><<<grid, kRowThreads, 0, stream>>>(p, rows_each);
    default:
      return state_rows_kernel<TState, TInput, 16><<<grid, kRowThreads, 0, stream>>>(p, rows_each);
  }
}

template <typename TInput>
void launch_state_rows(const StateUpdateParams& p, cudaStream_t stream) {
  if (p.state.dtype == DType::kFloat32) return launch_state_rows<float, TInput>(p, stream);
  launch_state_rows<TInput, TInput>(p, stream);
}

}  // namespace mamba
