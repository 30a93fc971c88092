// Add and norm: a block walks over rows, each thread keeping its columns' weights in registers.
#include "rows.cuh"

namespace mamba {
namespace {

// kCount vectors a thread; 0: any number, read again for every pass.
template <int kCount>
__global__ void __launch_bounds__(kMaxThreads)
    add_norm_fwd_kernel(const __grid_constant__ NormArgs a, int count) {
  __shared__ BlockSums sums;
  constexpr int kHeld = kCount ? kCount : 1;
  const int vectors = kCount ? kCount : count;
  const int64_t size = a.p.size;
  // The next row's loads are out while this one is worked on.
  RawSum<false> next;
  if constexpr (kCount == 1) next.load(a, blockIdx.x, column_of(0));
  float weight[kHeld][kVector], bias[kHeld][kVector];
  if constexpr (kCount > 0) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      load_columns(weight[i], a.p.weight, column_of(i), size, 0.0f);
      load_columns(bias[i], a.p.bias, column_of(i), size, 0.0f);
    }
  }
  int turn = 0;
  for (int64_t row = blockIdx.x; row < a.p.rows; row += gridDim.x) {
    float s[kHeld][kVector];
    float total = 0.0f, squares = 0.0f;
#pragma unroll
    for (int i = 0; i < vectors; ++i) {
      float (&v)[kVector] = s[kCount ? i : 0];
      if constexpr (kCount == 1) {
        next.unpack(v, a, column_of(0));
        if (row + gridDim.x < a.p.rows) next.load(a, row + gridDim.x, column_of(0));
      } else {
        load_sum(v, a, row, column_of(i));
      }
#pragma unroll
      for (int k = 0; k < kVector; ++k) total += v[k], squares = fmaf(v[k], v[k], squares);
      if (a.residual_out.t.data) store_row(v, a.residual_out, row, column_of(i), size);
    }
    float mean = 0.0f, variance;
    const float3 first = sums.sum(total, squares, 0.0f, false, turn);
    turn ^= 1;
    if (a.p.is_rms) {
      variance = first.y / static_cast<float>(size);
    } else {
      // The second pass keeps the digits that a difference of squares would lose.
      mean = first.x / static_cast<float>(size);
      squares = total = 0.0f;
#pragma unroll
      for (int i = 0; i < vectors; ++i) {
        float (&v)[kVector] = s[kCount ? i : 0];
        if constexpr (kCount == 0) load_sum(v, a, row, column_of(i));
#pragma unroll
        for (int k = 0; k < kVector; ++k) {
          const float centred = column_of(i) + k < size ? v[k] - mean : 0.0f;
          total += centred, squares = fmaf(centred, centred, squares);
        }
      }
      // What the centred values still sum to is the rounding error of the mean.
      const float3 second = sums.sum(total, squares, 0.0f, false, turn);
      const float error = second.x / static_cast<float>(size);
      mean += error;
      variance = fmaxf(second.y / static_cast<float>(size) - error * error, 0.0f);
      turn ^= 1;
    }
    const float rstd = rsqrtf(variance + a.p.eps);
    if (threadIdx.x == 0) {
      if (a.p.rstd) a.p.rstd[row] = rstd;
      if (a.p.mean) a.p.mean[row] = mean;
    }
#pragma unroll
    for (int i = 0; i < vectors; ++i) {
      float (&v)[kVector] = s[kCount ? i : 0];
      const int h = kCount ? i : 0;
      if constexpr (kCount == 0) {
        load_sum(v, a, row, column_of(i));
        load_columns(weight[0], a.p.weight, column_of(i), size, 0.0f);
        load_columns(bias[0], a.p.bias, column_of(i), size, 0.0f);
      }
#pragma unroll
      for (int k = 0; k < kVector; ++k) v[k] = fmaf((v[k] - mean) * rstd, weight[h][k], bias[h][k]);
      store_row(v, a.y, row, column_of(i), size);
    }
  }
}

template <int kCount>
void launch(const NormArgs& a, cudaStream_t stream) {
  const NormLaunch l = norm_launch(a.p);
  const auto kernel = add_norm_fwd_kernel<kCount>;
  const auto blocks = static_cast<unsigned>(norm_blocks(a.p, kernel));
  kernel<<<blocks, l.threads, 0, stream>>>(a, l.count);
}

}  // namespace

const char* add_norm_fwd_cuda(const NormParams& p, void* stream_handle) {
  if (p.rows * p.size == 0) return nullptr;
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  const NormArgs a = norm_args(p);
  const int count = norm_launch(p).count;
  count == 1 ? launch<1>(a, stream) : count == 2 ? launch<2>(a, stream) : launch<0>(a, stream);
  return norm_launched();
}

}  // namespace mamba
