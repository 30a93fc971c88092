// The convolution's backward. With the gradient g of the sums before the activation,
//   dx_t = sum_j weight[w-1-j] g_{t+j},  dweight[k] = sum_t g_t x_{t-(w-1-k)},  dbias = sum_t g_t.
#include "../../common/cuda_reduce.h"
#include "conv.cuh"

namespace mamba {
namespace {

__device__ __forceinline__ float gradient_of(const ConvParams& p, float dout, float sum) {
  return p.silu ? dout * conv_dsilu(sum) : dout;
}

__device__ __forceinline__ void store_share(float* share, int64_t channels, int width,
                                            int64_t channel, const float* dweight, float dbias) {
  for (int k = 0; k < width; ++k) share[channel * width + k] = dweight[k];
  share[channels * width + channel] = dbias;
}

// A thread: kBackwardSteps steps of four neighbouring channels. It runs w - 1 steps further, for
// the gradients that its last inputs need.
template <int W, bool kWide>
__global__ void __launch_bounds__(kConvThreads, 5)
    backward_channels_kernel(const __grid_constant__ CudaConvParams c) {
  constexpr int V = kBackwardChannels;
  const ConvParams& p = c.p;
  const int64_t vectors = p.channels / V, chunks = (p.length + kBackwardSteps - 1) / kBackwardSteps;
  const int64_t i = int64_t{blockIdx.x} * kConvThreads + threadIdx.x;
  if (i >= vectors * chunks * p.batch) return;
  const int64_t channel = i % vectors * V, row = i / vectors / chunks;
  const int64_t start = i / vectors % chunks * kBackwardSteps;
  const int64_t end = min(start + kBackwardSteps, p.length);
  const int64_t x_row = row * p.x.stride[0] + channel, dx_row = row * p.dx.stride[0] + channel;
  const int64_t dout_row = row * p.dout.stride[0] + channel;
  float weight[W][V], bias[V], window[W][V], g[W][V] = {}, dweight[V][W] = {}, dbias[V] = {};
  load_weights<W, V>(p, channel, weight, bias);
  load_window<W, V, kWide>(p, row, channel, start, window);
  const auto load = [&](float (&x)[V], float (&dout)[V], int64_t t) {
    load_aligned<V>(x, p.x.data, conv_dtype<kWide>(p.x), x_row + t * p.x.stride[2]);
    load_aligned<V>(dout, p.dout.data, conv_dtype<kWide>(p.dout), dout_row + t * p.dout.stride[2]);
  };
  const auto step = [&](const float (&x)[V], const float (&dout)[V], int64_t t, bool exists,
                        bool own) {
    float dx[V];
#pragma unroll
    for (int v = 0; v < V; ++v) {
#pragma unroll
      for (int k = 0; k + 1 < W; ++k) window[k][v] = window[k + 1][v], g[k][v] = g[k + 1][v];
      window[W - 1][v] = x[v];
      float sum = bias[v];
#pragma unroll
      for (int k = W - 1; k >= 0; --k) sum = fmaf(weight[k][v], window[k][v], sum);
      const float fresh = exists ? gradient_of(p, dout[v], sum) : 0.0f;
      g[W - 1][v] = fresh;
      const float counted = own ? fresh : 0.0f;
      dbias[v] += counted;
      dx[v] = 0.0f;
#pragma unroll
      for (int k = 0; k < W; ++k) {
        dweight[v][k] = fmaf(counted, window[k][v], dweight[v][k]);
        dx[v] = fmaf(weight[W - 1 - k][v], g[k][v], dx[v]);
      }
    }
    const int64_t at = t - (W - 1);
    if (at < start) return;
    const int64_t column = at - (p.length - (W - 1));
    if (p.dfinal.data && column >= 0) {
#pragma unroll
      for (int v = 0; v < V; ++v) dx[v] += load_at(p.dfinal, row, channel + v, column);
    }
    store_aligned<V>(dx, p.dx.data, conv_dtype<kWide>(p.dx), dx_row + at * p.dx.stride[2]);
  };
  int64_t t = start;
  for (; t + kBackwardBatch <= end; t += kBackwardBatch) {
    float x[kBackwardBatch][V], dout[kBackwardBatch][V];
#pragma unroll
    for (int k = 0; k < kBackwardBatch; ++k) load(x[k], dout[k], t + k);
#pragma unroll
    for (int k = 0; k < kBackwardBatch; ++k) step(x[k], dout[k], t + k, true, true);
  }
  for (; t < end; ++t) {
    float x[V], dout[V];
    load(x, dout, t);
    step(x, dout, t, true, true);
  }
#pragma unroll
  for (int k = 0; k + 1 < W; ++k) {
    float x[V] = {}, dout[V] = {};
    const bool exists = end + k < p.length;
    if (exists) load(x, dout, end + k);
    step(x, dout, end + k, exists, false);
  }
  float* const share = c.partial + (row * chunks + start / kBackwardSteps) * p.channels * (W + 1);
#pragma unroll
  for (int v = 0; v < V; ++v) {
    store_share(share, p.channels, W, channel + v, dweight[v], dbias[v]);
  }
}

template <bool kWide>
__device__ __forceinline__ void load_steps(float (&v)[kVector], const TensorArg& t, int64_t row,
                                           int64_t start, int64_t length) {
  if (start + kVector <= length) {
    load_aligned<kVector>(v, t.data, conv_dtype<kWide>(t), row + start);
    return;
  }
#pragma unroll
  for (int k = 0; k < kVector; ++k) {
    v[k] = start + k < length ? load_float(t.data, t.dtype, row + start + k) : 0.0f;
  }
}

// A warp: one channel of one row, 256 steps at a time from the last to the first; each lane has
// eight.
template <int W, bool kWide>
__global__ void __launch_bounds__(kConvThreads, 5)
    backward_steps_kernel(const __grid_constant__ CudaConvParams c) {
  constexpr unsigned kAll = 0xffffffffu;
  constexpr int kStretch = 32 * kVector;
  const ConvParams& p = c.p;
  const int64_t i = int64_t{blockIdx.x} * (kConvThreads / 32) + threadIdx.x / 32;
  if (i >= p.batch * p.channels) return;
  const int lane = threadIdx.x % 32;
  const int64_t row = i / p.channels, channel = i % p.channels;
  const int64_t x_row = row * p.x.stride[0] + channel * p.x.stride[1];
  const int64_t dout_row = row * p.dout.stride[0] + channel * p.dout.stride[1];
  const int64_t dx_row = row * p.dx.stride[0] + channel * p.dx.stride[1];
  float weight[W], dweight[W] = {}, dbias = 0.0f, later[W - 1] = {};
  load_strided<W>(weight, p.weight.data, p.weight.dtype, channel * p.weight.stride[0],
                  p.weight.stride[1]);
  const float bias = conv_bias(p, channel);
  for (int64_t base = (p.length - 1) / kStretch * kStretch; base >= 0; base -= kStretch) {
    const int64_t start = base + lane * kVector;
    float x[W - 1 + kVector], fresh[kVector], dout[kVector], g[kVector + W - 1];
    load_steps<kWide>(fresh, p.x, x_row, start, p.length);
    load_steps<kWide>(dout, p.dout, dout_row, start, p.length);
#pragma unroll
    for (int k = 0; k < kVector; ++k) x[W - 1 + k] = fresh[k];
#pragma unroll
    for (int k = 0; k + 1 < W; ++k) {
      x[k] = __shfl_up_sync(kAll, fresh[kVector - (W - 1) + k], 1);
      if (lane == 0) {
        const int64_t t = start - W + 1 + k;
        x[k] =
            t >= 0 ? load_float(p.x.data, p.x.dtype, x_row + t) : conv_initial(p, row, channel, -t);
      }
    }
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      float sum = bias;
#pragma unroll
      for (int j = W - 1; j >= 0; --j) sum = fmaf(weight[j], x[k + j], sum);
      g[k] = start + k < p.length ? gradient_of(p, dout[k], sum) : 0.0f;
      dbias += g[k];
#pragma unroll
      for (int j = 0; j < W; ++j) dweight[j] = fmaf(g[k], x[k + j], dweight[j]);
    }
#pragma unroll
    for (int k = 0; k + 1 < W; ++k) {
      const float right = __shfl_down_sync(kAll, g[k], 1);
      g[kVector + k] = lane == 31 ? later[k] : right;
      later[k] = __shfl_sync(kAll, g[k], 0);
    }
    float dx[kVector];
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      dx[k] = 0.0f;
#pragma unroll
      for (int j = 0; j < W; ++j) dx[k] = fmaf(weight[W - 1 - j], g[k + j], dx[k]);
      const int64_t column = start + k - (p.length - (W - 1));
      if (p.dfinal.data && column >= 0 && column < W - 1) {
        dx[k] += load_at(p.dfinal, row, channel, column);
      }
    }
    if (start + kVector <= p.length) {
      store_aligned<kVector>(dx, p.dx.data, conv_dtype<kWide>(p.dx), dx_row + start);
    } else {
      for (int k = 0; k < kVector; ++k) {
        if (start + k < p.length) store_float(p.dx.data, p.dx.dtype, dx_row + start + k, dx[k]);
      }
    }
  }
#pragma unroll
  for (int o = 16; o > 0; o /= 2) {
#pragma unroll
    for (int k = 0; k < W; ++k) dweight[k] += __shfl_xor_sync(kAll, dweight[k], o);
    dbias += __shfl_xor_sync(kAll, dbias, o);
  }
  if (lane == 0) {
    store_share(c.partial + row * p.channels * (W + 1), p.channels, W, channel, dweight, dbias);
  }
}

__device__ __forceinline__ int64_t gradient_index(const ConvParams& p, int64_t row, int64_t channel,
                                                  int64_t t) {
  const bool channel_last = p.x.stride[1] == 1 && p.x.stride[2] != 1;
  return channel_last ? (row * p.length + t) * p.channels + channel
                      : (row * p.channels + channel) * p.length + t;
}

__device__ __forceinline__ float gradient_at(const CudaConvParams& c, int64_t row, int64_t channel,
                                             int64_t t) {
  if (conv_state_of(c.links, c.p, row, t) < 0) return 0.0f;
  const float sum = c.p.silu ? conv_window(c, row, channel, t) : 0.0f;
  return gradient_of(c.p, load_at(c.p.dout, row, channel, t), sum);
}

__global__ void __launch_bounds__(kConvThreads)
    gradient_kernel(const __grid_constant__ CudaConvParams c) {
  const ConvParams& p = c.p;
  const int64_t size = p.batch * p.channels * p.length, step = int64_t{gridDim.x} * kConvThreads;
  for (int64_t i = int64_t{blockIdx.x} * kConvThreads + threadIdx.x; i < size; i += step) {
    const ConvElement e(p, i);
    c.gradient[gradient_index(p, e.row, e.channel, e.step)] =
        gradient_at(c, e.row, e.channel, e.step);
  }
}

__global__ void __launch_bounds__(kConvThreads)
    dx_kernel(const __grid_constant__ CudaConvParams c) {
  const ConvParams& p = c.p;
  const int64_t size = p.batch * p.channels * p.length, step = int64_t{gridDim.x} * kConvThreads;
  for (int64_t i = int64_t{blockIdx.x} * kConvThreads + threadIdx.x; i < size; i += step) {
    const ConvElement e(p, i);
    const int64_t id = conv_state_of(c.links, p, e.row, e.step);
    const int* following = conv_row(c.links.following, e.row, p.length);
    float dx = 0.0f;
    int64_t t = e.step;
    for (int64_t j = 0; id >= 0 && j < p.width; ++j) {
      dx = fmaf(conv_weight(p, e.channel, p.width - 1 - j),
                c.gradient[gradient_index(p, e.row, e.channel, t)], dx);
      const int64_t next = following ? following[t] : t + 1 < p.length ? t + 1 : -1;
      if (next >= 0) {
        t = next;
        continue;
      }
      // The run ends j steps after this one; its last inputs are the final state.
      const bool is_final = c.links.last ? c.links.last[id] == e.row * p.length + t : true;
      if (p.dfinal.data && j + 2 <= p.width && is_final && id < p.states) {
        dx += load_at(p.dfinal, id, e.channel, p.width - 2 - j);
      }
      break;
    }
    store_float(p.dx.data, p.dx.dtype,
                e.row * p.dx.stride[0] + e.channel * p.dx.stride[1] + e.step * p.dx.stride[2], dx);
  }
}

// A thread: the share of kGeneralSteps steps of one channel in dweight and dbias, tap by tap.
__global__ void __launch_bounds__(kConvThreads)
    dweight_kernel(const __grid_constant__ CudaConvParams c) {
  const ConvParams& p = c.p;
  const int64_t chunks = (p.length + kGeneralSteps - 1) / kGeneralSteps;
  const int64_t size = p.batch * chunks * p.channels, step = int64_t{gridDim.x} * kConvThreads;
  for (int64_t i = int64_t{blockIdx.x} * kConvThreads + threadIdx.x; i < size; i += step) {
    const int64_t channel = i % p.channels, chunk = i / p.channels % chunks;
    const int64_t row = i / p.channels / chunks, group = i / p.channels;
    const int64_t start = chunk * kGeneralSteps, end = min(start + kGeneralSteps, p.length);
    float* const share = c.partial + group * p.channels * (p.width + 1);
    for (int64_t k = 0; k <= p.width; ++k) {
      float sum = 0.0f;
      for (int64_t t = start; t < end; ++t) {
        const int64_t id = conv_state_of(c.links, p, row, t);
        if (id < 0) continue;
        const float g = c.gradient[gradient_index(p, row, channel, t)];
        if (k == p.width) {
          sum += g;
          continue;
        }
        ConvCursor at{conv_row(c.links.previous, row, p.length), t};
        for (int64_t j = 0; j < p.width - 1 - k; ++j) at.back();
        const float x = at.outside ? conv_initial(p, id, channel, at.outside)
                                   : load_at(p.x, row, channel, at.t);
        sum = fmaf(g, x, sum);
      }
      share[k < p.width ? channel * p.width + k : p.channels * p.width + channel] = sum;
    }
  }
}

// What a run that starts at step t of the row adds to its state's gradient: its first w - 1 sums,
// and the final state where the run is too short to fill it.
__device__ void add_run(const CudaConvParams& c, int64_t row, int64_t channel, int64_t id,
                        int64_t t) {
  const ConvParams& p = c.p;
  const int64_t last = p.width - 1;
  float* const to = p.dinitial + (id * p.channels + channel) * last;
  const int* following = conv_row(c.links.following, row, p.length);
  int64_t count = 0;  // steps of the run so far
  while (count < last) {
    const float g = gradient_at(c, row, channel, t);
    for (int64_t column = count; column < last; ++column) {
      to[column] = fmaf(g, conv_weight(p, channel, column - count), to[column]);
    }
    ++count;
    const int64_t next = following ? following[t] : t + 1 < p.length ? t + 1 : -1;
    if (next < 0) break;
    t = next;
  }
  const bool ends = following ? following[t] < 0 : t + 1 >= p.length;
  const bool is_final = c.links.last ? c.links.last[id] == row * p.length + t : true;
  if (!p.dfinal.data || !ends || !is_final) return;
  for (int64_t column = count; column < last; ++column) {
    to[column] += load_at(p.dfinal, id, channel, column - count);
  }
}

// A thread: a channel. Runs that share a state add to it in order.
__global__ void __launch_bounds__(kConvThreads)
    dinitial_kernel(const __grid_constant__ CudaConvParams c) {
  const ConvParams& p = c.p;
  const int64_t last = p.width - 1;
  const bool packed = c.links.previous != nullptr;
  const int64_t size = packed ? p.channels : p.channels * p.batch;
  const int64_t i = int64_t{blockIdx.x} * kConvThreads + threadIdx.x;
  if (i >= size) return;
  const int64_t channel = i % p.channels;
  if (!packed) {
    const int64_t row = i / p.channels;
    float* const to = p.dinitial + (row * p.channels + channel) * last;
    for (int64_t k = 0; k < last; ++k) {
      to[k] = p.length == 0 && p.dfinal.data ? load_at(p.dfinal, row, channel, k) : 0.0f;
    }
    if (p.length > 0) add_run(c, row, channel, row, 0);
    return;
  }
  for (int64_t id = 0; id < p.states; ++id) {
    float* const to = p.dinitial + (id * p.channels + channel) * last;
    const bool unused = c.links.last[id] < 0 && p.dfinal.data;
    for (int64_t k = 0; k < last; ++k) to[k] = unused ? load_at(p.dfinal, id, channel, k) : 0.0f;
  }
  for (int64_t step = 0; step < p.batch * p.length; ++step) {
    if (c.links.previous[step] != ConvLinks::kNone) continue;
    add_run(c, step / p.length, channel, c.links.ids[step], step % p.length);
  }
}

enum class Path { kChannels, kSteps, kGeneral };

Path path_of(const CudaConvParams& c) {
  const ConvParams& p = c.p;
  if (!conv_fast_width(c) || p.dout.dtype != p.x.dtype) return Path::kGeneral;
  const auto channels = [&](const TensorArg& t) {
    return conv_channel_vectors(t, kBackwardChannels);
  };
  if (p.channels % kBackwardChannels == 0 && channels(p.x) && channels(p.dout) && channels(p.dx)) {
    return Path::kChannels;
  }
  const bool steps = conv_time_vectors(p.x) && conv_time_vectors(p.dout) && conv_time_vectors(p.dx);
  return steps ? Path::kSteps : Path::kGeneral;
}

template <int W, bool kWide>
void backward_fast(const CudaConvParams& c, Path path, cudaStream_t stream) {
  const ConvParams& p = c.p;
  if (path == Path::kChannels) {
    const int64_t chunks = (p.length + kBackwardSteps - 1) / kBackwardSteps;
    const int64_t threads = p.channels / kBackwardChannels * chunks * p.batch;
    backward_channels_kernel<W, kWide><<<conv_blocks(threads), kConvThreads, 0, stream>>>(c);
  } else {
    backward_steps_kernel<W, kWide>
        <<<conv_blocks(p.batch * p.channels * 32), kConvThreads, 0, stream>>>(c);
  }
}

}  // namespace

bool conv_needs_gradient_cuda(const CudaConvParams& c) { return path_of(c) == Path::kGeneral; }

int64_t conv_groups_cuda(const CudaConvParams& c) {
  const ConvParams& p = c.p;
  const Path path = path_of(c);
  if (path == Path::kSteps) return p.batch;
  const int64_t steps = path == Path::kChannels ? kBackwardSteps : kGeneralSteps;
  return p.batch * ((p.length + steps - 1) / steps);
}

const char* conv_bwd_cuda(const CudaConvParams& c, void* stream_handle) {
  const ConvParams& p = c.p;
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  const int64_t size = p.batch * p.channels * p.length, groups = size > 0 ? conv_groups_cuda(c) : 0;
  const Path path = path_of(c);
  if (size > 0 && path == Path::kGeneral) {
    gradient_kernel<<<conv_blocks(size), kConvThreads, 0, stream>>>(c);
    dx_kernel<<<conv_blocks(size), kConvThreads, 0, stream>>>(c);
    dweight_kernel<<<conv_blocks(groups * p.channels), kConvThreads, 0, stream>>>(c);
  } else if (size > 0) {
    MAMBA_CONV_FAST(backward_fast, c, path, stream)
  }
  if (p.dinitial && p.width > 1) {
    const int64_t threads = c.links.previous ? p.channels : p.channels * p.batch;
    if (threads > 0) dinitial_kernel<<<conv_blocks(threads), kConvThreads, 0, stream>>>(c);
  }
  if (const char* error = conv_launched()) return error;
  const int64_t taps = p.channels * p.width;
  if (const char* error = sum_rows_cuda(c.partial, groups, taps + p.channels, taps, c.dweight, 0,
                                        nullptr, stream)) {
    return error;
  }
  if (!c.dbias) return nullptr;
  return sum_rows_cuda(c.partial + taps, groups, taps + p.channels, p.channels, c.dbias, 0, nullptr,
                       stream);
}

}  // namespace mamba
