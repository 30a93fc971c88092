// One row at a time, as fp32 in scratch that stays in the cache.
#include "norm.h"

#include "../../common/rows.h"

namespace mamba {
namespace MAMBA_ISA {
namespace {

// A sum over a row in four independent chains, in an order that its length alone decides.
struct Sum {
  Vec chains[4] = {Vec{}, Vec{}, Vec{}, Vec{}};
  MAMBA_INLINE float total() const {
    return sum((chains[0] + chains[1]) + (chains[2] + chains[3]));
  }
};

// Adds up f(i) over the vectors of a row whose lanes past the end must contribute nothing.
template <class F>
MAMBA_INLINE float sum_of(int64_t n, F&& f) {
  Sum s;
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    for (int k = 0; k < 4; ++k) s.chains[k] += f(i + k * kLanes);
  }
  for (int k = 0; i < n; i += kLanes, ++k) s.chains[k] += f(i);
  return s.total();
}

// x + residual of one row; zeros past its end.
void read_sum(const NormParams& p, int64_t row, float* to) {
  read_row(p.x, row * p.x.stride[0], p.x.stride[1], p.size, to);
  if (!p.residual.data) return;
  for_lanes(p.residual, row * p.residual.stride[0], p.residual.stride[1], p.size,
            [&](int64_t i, Vec v) { store(to + i, load(to + i) + v); });
}

// Subtracts from a row of n, whose lanes past the end stay 0.
MAMBA_INLINE void subtract(float* row, float value, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) store(row + i, load(row + i) - value);
  for (int64_t i = n; i < whole_lanes(n); ++i) row[i] = 0.0f;
}

template <class E>
MAMBA_INLINE void write_norm(const NormParams& p, int64_t row, const float* s, float rstd,
                             const float* weight, const float* bias) {
  auto* y = static_cast<typename E::T*>(p.y.data) + row * p.size;
  const auto norm = [&](int64_t i) {
    return load(s + i) * rstd * load(weight + i) + load(bias + i);
  };
  int64_t i = 0;
  for (; i + kLanes <= p.size; i += kLanes) E::write(y + i, norm(i));
  if (i < p.size) write_lanes<E>(y + i, 1, p.size - i, norm(i));
}

}  // namespace

void add_norm_fwd(const NormParams& p, int64_t begin, int64_t end, float* scratch) {
  const int64_t n = p.size;
  float* const weight = scratch;
  float* const bias = weight + whole_lanes(n);
  float* const s = bias + whole_lanes(n);
  read_row(p.weight, 0, p.weight.stride[0], n, weight);
  fill(bias, 0.0f, whole_lanes(n));
  if (p.bias.data) read_row(p.bias, 0, p.bias.stride[0], n, bias);
  const float size = static_cast<float>(n);
  for (int64_t row = begin; row < end; ++row) {
    read_sum(p, row, s);
    if (p.residual_out.data) write_row(p.residual_out, row * n, 1, n, s);
    if (!p.is_rms) {
      const float mean = sum_of(n, [&](int64_t i) { return load(s + i); }) / size;
      p.mean[row] = mean;
      subtract(s, mean, n);
    }
    const float square = sum_of(n, [&](int64_t i) { return load(s + i) * load(s + i); }) / size;
    const float rstd = 1.0f / __builtin_sqrtf(square + p.eps);
    p.rstd[row] = rstd;
    with_dtype(p.y.dtype, [&](auto e) { write_norm<decltype(e)>(p, row, s, rstd, weight, bias); });
  }
}

namespace {

// dx of one row, given the sum in s and dy in d; adds to the shares of dweight and dbias.
void backward_row(const NormParams& p, int64_t row, const float* weight, float* s, float* d,
                  float* dweight, float* dbias) {
  const int64_t n = p.size;
  const float size = static_cast<float>(n), rstd = p.rstd[row * p.rstd_stride];
  if (!p.is_rms) subtract(s, p.mean[row * p.mean_stride], n);
  const float along =
      sum_of(n,
             [&](int64_t i) {
               const Vec dy = load(d + i), normed = load(s + i) * rstd,
                         dnormed = dy * load(weight + i);
               const int64_t count = n - i;
               if (count >= kLanes) {
                 store(dweight + i, load(dweight + i) + dy * normed);
                 store(dbias + i, load(dbias + i) + dy);
               } else {
                 write_some<F32>(dweight + i, read_some<F32>(dweight + i, count) + dy * normed,
                                 count);
                 write_some<F32>(dbias + i, read_some<F32>(dbias + i, count) + dy, count);
               }
               store(s + i, normed);
               store(d + i, dnormed);
               return dnormed * normed;
             }) /
      size;
  for (int64_t i = 0; i < n; i += kLanes) {
    store(d + i, (load(d + i) - load(s + i) * along) * rstd);
  }
  if (!p.is_rms) {
    // Last, so that dx has mean zero even where the mean of the forward pass was inexact.
    subtract(d, sum_of(n, [&](int64_t i) { return load(d + i); }) / size, n);
  }
  if (p.dresidual_out.data) {
    for_lanes(p.dresidual_out, row * p.dresidual_out.stride[0], p.dresidual_out.stride[1], n,
              [&](int64_t i, Vec v) { store(d + i, load(d + i) + v); });
  }
  write_row(p.dx, row * n, 1, n, d);
  if (p.other.data) write_row(p.other, row * n, 1, n, d);
}

}  // namespace

void add_norm_bwd(const NormParams& p, int64_t begin, int64_t end, float* scratch) {
  const int64_t n = p.size;
  float* const weight = scratch;
  float* const s = weight + whole_lanes(n);
  float* const d = s + whole_lanes(n);
  read_row(p.weight, 0, p.weight.stride[0], n, weight);
  for (int64_t group = begin; group < end; ++group) {
    float* const dweight = p.partial + group * 2 * n;
    float* const dbias = dweight + n;
    fill(dweight, 0.0f, 2 * n);
    const int64_t first = group * kNormGroup, last = first + kNormGroup;
    for (int64_t row = first; row < last && row < p.rows; ++row) {
      read_sum(p, row, s);
      read_row(p.dy, row * p.dy.stride[0], p.dy.stride[1], n, d);
      backward_row(p, row, weight, s, d, dweight, dbias);
    }
  }
}

}  // namespace MAMBA_ISA
}  // namespace mamba
