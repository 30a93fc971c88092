// The convolution's backward. With the gradient g of the sums before the activation,
//   dx_t = sum_j weight[w-1-j] g_{t+j},  dweight[k] = sum_t g_t x_{t-(w-1-k)},  dbias = sum_t g_t.
#include "../../common/cuda_reduce.h"
#include "channels_backward.cuh"
#include "steps.cuh"

namespace mamba {
namespace {

__device__ __forceinline__ float gradient_of(const ConvParams& p, float dout, float sum) {
  return p.silu ? dout * conv_dsilu(sum) : dout;
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
  if (fits_channels(p, {p.x, p.dout, p.dx})) return Path::kChannels;
  const bool steps = conv_time_vectors(p.x) && conv_time_vectors(p.dout) && conv_time_vectors(p.dx);
  return steps ? Path::kSteps : Path::kGeneral;
}

void backward_fast(const CudaConvParams& c, Path path, cudaStream_t stream) {
  const ConvParams& p = c.p;
  conv_dispatch(p, [&](auto width, auto type, auto silu) {
    using T = typename decltype(type)::Element;
    if (path == Path::kChannels) {
      const int64_t steps = backward_steps(p);
      backward_channels_kernel<width.value, T, silu.value>
          <<<channels_blocks(p, kBackwardChannels, steps), kChannelsThreads, 0, stream>>>(c, steps);
    } else {
      const dim3 grid(conv_blocks(p.batch * p.channels * 32),
                      static_cast<unsigned>(segments_of(p)));
      backward_steps_kernel<width.value, T, silu.value><<<grid, kConvThreads, 0, stream>>>(c);
    }
  });
}

}  // namespace

bool conv_needs_gradient_cuda(const CudaConvParams& c) { return path_of(c) == Path::kGeneral; }

int64_t conv_groups_cuda(const CudaConvParams& c) {
  const ConvParams& p = c.p;
  const Path path = path_of(c);
  if (path == Path::kSteps) return p.batch * segments_of(p);
  if (path == Path::kGeneral) return p.batch * ((p.length + kGeneralSteps - 1) / kGeneralSteps);
  return p.batch * channels_groups(p, backward_steps(p));
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
    backward_fast(c, path, stream);
  }
  if (p.dinitial && p.width > 1) {
    const int64_t threads = c.links.previous ? p.channels : p.channels * p.batch;
    if (threads > 0) dinitial_kernel<<<conv_blocks(threads), kConvThreads, 0, stream>>>(c);
  }
  if (const char* error = conv_launched()) return error;
  const int64_t taps = p.channels * p.width;
  return sum_rows_cuda(c.partial, groups, taps + p.channels, taps, c.dweight,
                       c.dbias ? p.channels : 0, c.dbias, stream);
}

}  // namespace mamba
