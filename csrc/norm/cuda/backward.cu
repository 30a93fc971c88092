// The backward of add and norm: a block walks over rows, each thread keeping its columns' weights
// and their gradients in registers.
#include "../../common/cuda_reduce.h"
#include "rows.cuh"

namespace mamba {
namespace {

// What one row's gradient is made of, as one thread loads it. kSummed: without a residual.
template <bool kSummed>
struct RawRow {
  RawSum<kSummed> sum;
  RawVector dy, more;
  float mean, rstd;

  __device__ __forceinline__ void load(const NormArgs& a, int64_t row, int64_t column) {
    sum.load(a, row, column);
    dy.load(a.dy, row, column, a.p.size);
    more.load(a.dresidual_out, row, column, a.p.size);
    mean = a.p.is_rms ? 0.0f : __ldg(a.p.mean + row * a.p.mean_stride);
    rstd = __ldg(a.p.rstd + row * a.p.rstd_stride);
  }

  // Normed values and their gradients.
  __device__ __forceinline__ void unpack(float (&xhat)[kVector], float (&gradient)[kVector],
                                         const NormArgs& a, int64_t column) const {
    sum.unpack(xhat, a, column);
    dy.unpack(gradient, a.dy, column, a.p.size);
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      xhat[k] = column + k < a.p.size ? (xhat[k] - mean) * rstd : 0.0f;
    }
  }
};

__device__ __forceinline__ void store_dx(const float (&xhat)[kVector], const float (&dy)[kVector],
                                         const float (&weight)[kVector], const RawVector& more,
                                         const NormArgs& a, int64_t row, int64_t column,
                                         float2 means, float rstd) {
  float dx[kVector] = {};
  if (a.dresidual_out.t.data) more.unpack(dx, a.dresidual_out, column, a.p.size);
#pragma unroll
  for (int k = 0; k < kVector; ++k) {
    dx[k] += (dy[k] * weight[k] - means.x - xhat[k] * means.y) * rstd;
  }
  store_row(dx, a.dx, row, column, a.p.size);
  if (a.other.t.data) store_row(dx, a.other, row, column, a.p.size);
}

// kCount vectors a thread; 0: any number, read again for every pass. kPlain: no mean, bias or
// residual. kThreads: at most; registers for 640 threads a multiprocessor.
template <int kCount, bool kPlain, int kThreads>
__global__ void __launch_bounds__(kThreads, kThreads > 320 ? 1 : 640 / kThreads)
    add_norm_bwd_kernel(const __grid_constant__ NormArgs a, int count) {
  __shared__ BlockSums sums;
  constexpr int kHeld = kCount ? kCount : 1;
  constexpr bool kAhead = kCount == 1 && kPlain;  // the next row's loads are out during this one
  const int vectors = kCount ? kCount : count;
  const int64_t size = a.p.size;
  const bool is_rms = kPlain || a.p.is_rms, has_bias = !kPlain && a.p.bias.data;
  float weight[kHeld][kVector], dweight[kHeld][kVector] = {}, dbias[kHeld][kVector] = {};
  float* const share = a.p.partial + int64_t{blockIdx.x} * (has_bias ? 2 : 1) * size;
  if constexpr (kCount > 0) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) load_columns(weight[i], a.p.weight, column_of(i), size, 0.0f);
  } else {
    for (int64_t i = threadIdx.x; i < (has_bias ? 2 : 1) * size; i += blockDim.x) share[i] = 0.0f;
    __syncthreads();
  }
  RawRow<kPlain> raw[kHeld];
  if constexpr (kAhead) raw[0].load(a, blockIdx.x, column_of(0));
  int turn = 0;
  for (int64_t row = blockIdx.x; row < a.p.rows; row += gridDim.x) {
    float xhat[kHeld][kVector], dy[kHeld][kVector], rstd = 0.0f;
    RawVector more[kHeld];
    float plain = 0.0f, along = 0.0f, centred = 0.0f;
    if constexpr (kCount > 0 && !kAhead) {
#pragma unroll
      for (int i = 0; i < kHeld; ++i) raw[i].load(a, row, column_of(i));
    }
#pragma unroll
    for (int i = 0; i < vectors; ++i) {
      const int h = kCount ? i : 0;
      if constexpr (kCount == 0) raw[0].load(a, row, column_of(i));
      raw[h].unpack(xhat[h], dy[h], a, column_of(i));
      more[h] = raw[h].more, rstd = raw[h].rstd;
      if constexpr (kCount == 0) load_columns(weight[0], a.p.weight, column_of(i), size, 0.0f);
#pragma unroll
      for (int k = 0; k < kVector; ++k) {
        const float weighted = dy[h][k] * weight[h][k];
        along = fmaf(weighted, xhat[h][k], along);
        if (!is_rms) plain += weighted, centred += xhat[h][k];
        if constexpr (kCount > 0) {
          dweight[h][k] = fmaf(dy[h][k], xhat[h][k], dweight[h][k]);
          if (has_bias) dbias[h][k] += dy[h][k];
        }
      }
    }
    if constexpr (kAhead) {
      if (row + gridDim.x < a.p.rows) raw[0].load(a, row + gridDim.x, column_of(0));
    }
    const float3 total = sums.sum(plain, along, centred, !is_rms, turn);
    turn ^= 1;
    // What the normed values of a layer norm still sum to is the rounding error of the mean.
    const float error = is_rms ? 0.0f : total.z / static_cast<float>(size);
    const float2 means = {is_rms ? 0.0f : total.x / static_cast<float>(size),
                          (total.y - error * total.x) / static_cast<float>(size)};
#pragma unroll
    for (int i = 0; i < vectors; ++i) {
      const int h = kCount ? i : 0;
      if constexpr (kCount == 0) {
        raw[0].load(a, row, column_of(i));
        raw[0].unpack(xhat[0], dy[0], a, column_of(i));
        more[0] = raw[0].more;
        load_columns(weight[0], a.p.weight, column_of(i), size, 0.0f);
      }
#pragma unroll
      for (int k = 0; k < kVector; ++k) {
        if (!is_rms) xhat[h][k] -= error;
        if constexpr (kCount > 0) {
          if (!is_rms) dweight[h][k] = fmaf(dy[h][k], -error, dweight[h][k]);
        } else if (column_of(i) + k < size) {
          share[column_of(i) + k] += dy[h][k] * xhat[h][k];
          if (has_bias) share[size + column_of(i) + k] += dy[h][k];
        }
      }
      store_dx(xhat[h], dy[h], weight[h], more[h], a, row, column_of(i), means, rstd);
    }
  }
  if constexpr (kCount > 0) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
#pragma unroll
      for (int k = 0; k < kVector; ++k) {
        if (column_of(i) + k >= size) continue;
        share[column_of(i) + k] = dweight[i][k];
        if (has_bias) share[size + column_of(i) + k] = dbias[i][k];
      }
    }
  }
}

using Kernel = void (*)(NormArgs, int);

template <bool kPlain>
Kernel kernel_for(const NormLaunch& l) {
  if (l.count == 1 && l.threads <= 128) return add_norm_bwd_kernel<1, kPlain, 128>;
  if (l.count == 1 && l.threads <= 320) return add_norm_bwd_kernel<1, kPlain, 320>;
  if (l.count == 1) return add_norm_bwd_kernel<1, kPlain, kMaxThreads>;
  return l.count == 2 ? add_norm_bwd_kernel<2, kPlain, kMaxThreads>
                      : add_norm_bwd_kernel<0, kPlain, kMaxThreads>;
}

Kernel kernel_of(const NormParams& p) {
  const bool plain = p.is_rms && !p.bias.data && !p.residual.data;
  return plain ? kernel_for<true>(norm_launch(p)) : kernel_for<false>(norm_launch(p));
}

}  // namespace

int64_t norm_groups_cuda(const NormParams& p) { return norm_blocks(p, kernel_of(p)); }

const char* add_norm_bwd_cuda(const NormParams& p, int64_t groups, float* dweight, float* dbias,
                              void* stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  if (p.size == 0) return nullptr;
  if (p.rows > 0) {
    const NormLaunch l = norm_launch(p);
    kernel_of(p)<<<static_cast<unsigned>(groups), l.threads, 0, stream>>>(norm_args(p), l.count);
    if (const char* error = norm_launched()) return error;
  }
  const int64_t more = dbias ? p.size : 0;
  return sum_rows_cuda(p.partial, groups, p.size + more, p.size, dweight, more, dbias, stream);
}

}  // namespace mamba
