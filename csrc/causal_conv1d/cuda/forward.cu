// The convolution's forward, its final states, and the update for a few new inputs.
#include <cassert>

#include "channels.cuh"
#include "steps.cuh"

namespace mamba {
namespace {

__global__ void __launch_bounds__(kConvThreads)
    forward_general_kernel(const __grid_constant__ CudaConvParams c) {
  const ConvParams& p = c.p;
  const int64_t size = p.batch * p.channels * p.length, step = int64_t{gridDim.x} * kConvThreads;
  for (int64_t i = int64_t{blockIdx.x} * kConvThreads + threadIdx.x; i < size; i += step) {
    const ConvElement e(p, i);
    float out = 0.0f;
    if (conv_state_of(c.links, p, e.row, e.step) >= 0) {
      out = conv_window(c, e.row, e.channel, e.step);
      if (p.silu) out = conv_silu(out);
    }
    store_float(p.out.data, p.out.dtype,
                e.row * p.out.stride[0] + e.channel * p.out.stride[1] + e.step * p.out.stride[2],
                out);
  }
}

// The last w - 1 inputs of every state: a thread a channel of a state.
__global__ void __launch_bounds__(kConvThreads)
    final_states_kernel(const __grid_constant__ CudaConvParams c) {
  const ConvParams& p = c.p;
  const int64_t step = int64_t{gridDim.x} * kConvThreads;
  for (int64_t i = int64_t{blockIdx.x} * kConvThreads + threadIdx.x; i < p.states * p.channels;
       i += step) {
    const int64_t state = i / p.channels, channel = i % p.channels;
    int64_t row = state, t = p.length - 1;
    if (c.links.last) {
      const int64_t last = c.links.last[state];
      row = last < 0 ? 0 : last / p.length, t = last < 0 ? -1 : last % p.length;
    }
    ConvCursor at{conv_row(c.links.previous, row, p.length), t};
    if (t < 0) at.outside = 1;
    for (int64_t k = p.width - 2; k >= 0; --k) {
      const float v = at.outside ? conv_initial(p, state, channel, at.outside)
                                 : load_at(p.x, row, channel, at.t);
      store_float(p.final.data, p.final.dtype,
                  state * p.final.stride[0] + channel * p.final.stride[1] + k * p.final.stride[2],
                  v);
      at.back();
    }
  }
}

__device__ __forceinline__ int64_t integer_at(const void* data, int bytes, int64_t i) {
  switch (bytes) {
    case 8:
      return static_cast<const int64_t*>(data)[i];
    case 4:
      return static_cast<const int32_t*>(data)[i];
    case 2:
      return static_cast<const int16_t*>(data)[i];
    case 1:
      return static_cast<const int8_t*>(data)[i];
    default:
      return static_cast<const uint8_t*>(data)[i];
  }
}

// Four elements that this kernel may also write, so not through the read-only cache.
template <typename T>
__device__ __forceinline__ void load_own(float (&v)[4], const T* from) {
  if constexpr (sizeof(T) == 4) {
    const float4 four = *reinterpret_cast<const float4*>(from);
    v[0] = four.x, v[1] = four.y, v[2] = four.z, v[3] = four.w;
  } else {
    const uint2 words = *reinterpret_cast<const uint2*>(from);
    const float2 low = halves_to_floats(words.x, std::is_same_v<T, __nv_bfloat16>);
    const float2 high = halves_to_floats(words.y, std::is_same_v<T, __nv_bfloat16>);
    v[0] = low.x, v[1] = low.y, v[2] = high.x, v[3] = high.y;
  }
}

// A thread: one channel of one row.
__global__ void __launch_bounds__(kConvThreads)
    update_kernel(const __grid_constant__ CudaConvUpdateParams c) {
  const ConvUpdateParams& p = c.p;
  const int64_t i = int64_t{blockIdx.x} * kConvThreads + threadIdx.x;
  if (i >= p.batch * p.channels) return;
  const int64_t row = i / p.channels, channel = i % p.channels;
  const int64_t state = c.rows ? integer_at(c.rows, c.rows_bytes, row * c.rows_stride) : row;
  assert(state < c.state_rows && "conv_state_indices names a row that conv_state does not have");
  const int64_t base = state * p.state.stride[0] + channel * p.state.stride[1];
  const auto column = [&](int64_t k) { return base + k * p.state.stride[2]; };
  int64_t start = 0;
  if (c.start && p.columns > 0) {
    start = integer_at(c.start, c.start_bytes, row * c.start_stride) % p.columns;
    if (start < 0) start += p.columns;
  }
  const float bias =
      p.bias.data ? load_float(p.bias.data, p.bias.dtype, channel * p.bias.stride[0]) : 0.0f;
  for (int64_t t = 0; t < p.length; ++t) {
    float sum = bias;
    for (int64_t j = 0; j < p.width && state >= 0; ++j) {
      // `lag` columns before the first new input.
      const int64_t lag = j - t;
      float v;
      if (lag <= 0) {
        v = load_at(p.x, row, channel, t - j);
      } else if (c.start) {
        v = load_float(p.state.data, p.state.dtype,
                       column((start - lag % p.columns + p.columns) % p.columns));
      } else {
        v = load_float(p.state.data, p.state.dtype, column(p.columns - lag));
      }
      sum = fmaf(load_at(p.weight, channel, p.width - 1 - j), v, sum);
    }
    if (p.silu) sum = conv_silu(sum);
    store_float(p.out.data, p.out.dtype, i * p.length + t, state >= 0 ? sum : 0.0f);
  }
  if (state < 0) return;
  if (c.start) {
    for (int64_t t = p.length > p.columns ? p.length - p.columns : 0; t < p.length; ++t) {
      store_float(p.state.data, p.state.dtype, column((start + t) % p.columns),
                  load_at(p.x, row, channel, t));
    }
    return;
  }
  for (int64_t k = 0; k < p.columns; ++k) {
    const int64_t from = k + p.length;
    const float v = from < p.columns ? load_float(p.state.data, p.state.dtype, column(from))
                                     : load_at(p.x, row, channel, from - p.columns);
    store_float(p.state.data, p.state.dtype, column(k), v);
  }
}

constexpr int kStepWidth = 4;

// The usual decode step: one input, a window of four, everything of one dtype. A thread: one
// channel of one row, whose window is one load and one store.
template <typename T>
__global__ void __launch_bounds__(kConvThreads)
    update_one_kernel(const __grid_constant__ CudaConvUpdateParams c) {
  const ConvUpdateParams& p = c.p;
  const int64_t i = int64_t{blockIdx.x} * kConvThreads + threadIdx.x;
  if (i >= p.batch * p.channels) return;
  const int64_t row = i / p.channels, channel = i - row * p.channels;
  T* state = static_cast<T*>(p.state.data) + row * p.state.stride[0] + channel * kStepWidth;
  float window[kStepWidth], weight[kStepWidth];
  load_own<T>(window, state);
  load_own<T>(weight, static_cast<const T*>(p.weight.data) + channel * kStepWidth);
  const T x = static_cast<const T*>(p.x.data)[row * p.x.stride[0] + channel * p.x.stride[1]];
  float sum =
      p.bias.data ? to_float(static_cast<const T*>(p.bias.data)[channel * p.bias.stride[0]]) : 0.0f;
#pragma unroll
  for (int k = 0; k + 1 < kStepWidth; ++k) window[k] = window[k + 1];
  window[kStepWidth - 1] = to_float(x);
#pragma unroll
  for (int k = 0; k < kStepWidth; ++k) sum = fmaf(weight[k], window[k], sum);
  if (p.silu) sum = conv_silu(sum);
  store_aligned<kStepWidth>(window, state, p.state.dtype, 0);
  static_cast<T*>(p.out.data)[i] = from_float<T>(sum);
}

bool updates_one(const CudaConvUpdateParams& c) {
  const ConvUpdateParams& p = c.p;
  const DType dtype = p.x.dtype;
  const int64_t size = element_size(dtype), bytes = kStepWidth * size;
  const auto fits = [bytes](const TensorArg& t) {
    return reinterpret_cast<uintptr_t>(t.data) % bytes == 0;
  };
  return p.length == 1 && p.width == kStepWidth && p.columns == kStepWidth && !c.rows && !c.start &&
         p.state.dtype == dtype && p.weight.dtype == dtype &&
         (!p.bias.data || p.bias.dtype == dtype) && p.state.stride[2] == 1 &&
         p.state.stride[1] == kStepWidth && p.state.stride[0] * size % bytes == 0 &&
         p.weight.stride[1] == 1 && p.weight.stride[0] == kStepWidth && fits(p.state) &&
         fits(p.weight);
}

template <typename T>
void update_one(const CudaConvUpdateParams& c, cudaStream_t stream) {
  const int64_t threads = c.p.batch * c.p.channels;
  update_one_kernel<T><<<conv_blocks(threads), kConvThreads, 0, stream>>>(c);
}

}  // namespace

const char* conv_fwd_cuda(const CudaConvParams& c, void* stream_handle) {
  const ConvParams& p = c.p;
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  const int64_t size = p.batch * p.channels * p.length;
  const bool channels = size > 0 && conv_fast_width(c) && fits_channels(p, {p.x, p.out});
  if (channels) {
    conv_dispatch(p, [&](auto width, auto type, auto silu) {
      using T = typename decltype(type)::Element;
      using Tile = ForwardTile<T>;
      forward_channels_kernel<width.value, T, silu.value, Tile::kChannels, Tile::kSteps,
                              Tile::kAtOnce>
          <<<channels_blocks(p, Tile::kChannels, Tile::kSteps), kChannelsThreads, 0, stream>>>(p);
    });
  } else if (size > 0 && conv_fast_width(c) && conv_time_vectors(p.x) && conv_time_vectors(p.out)) {
    const int64_t vectors = (p.length + kVector - 1) / kVector;
    conv_dispatch(p, [&](auto width, auto type, auto silu) {
      using T = typename decltype(type)::Element;
      forward_steps_kernel<width.value, T, silu.value>
          <<<conv_blocks(vectors * p.channels * p.batch), kConvThreads, 0, stream>>>(p);
    });
  } else if (size > 0) {
    forward_general_kernel<<<conv_blocks(size), kConvThreads, 0, stream>>>(c);
  }
  if (!channels && p.final.data) {
    final_states_kernel<<<conv_blocks(p.states * p.channels), kConvThreads, 0, stream>>>(c);
  }
  return conv_launched();
}

const char* conv_update_cuda(const CudaConvUpdateParams& c, void* stream_handle) {
  const int64_t threads = c.p.batch * c.p.channels;
  if (threads == 0) return nullptr;
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  if (!updates_one(c)) {
    update_kernel<<<conv_blocks(threads), kConvThreads, 0, stream>>>(c);
  } else if (c.p.x.dtype == DType::kFloat16) {
    update_one<__half>(c, stream);
  } else if (c.p.x.dtype == DType::kBFloat16) {
    update_one<__nv_bfloat16>(c, stream);
  } else {
    update_one<float>(c, stream);
  }
  return conv_launched();
}

}  // namespace mamba
