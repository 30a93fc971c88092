#include "state_update.h"

#include <algorithm>
#include <vector>

#include "../../common/cpu_convert.h"
#include "../../common/cpu_math.h"
#include "state_row.h"

namespace mamba {
namespace {

constexpr int64_t kTile = 64;  // rows whose scalars (dt, x, z, D) are loaded and computed together

// Rows [ip, ip + count), count <= kTile, of one head of one batch entry.
struct Tile {
  const StateUpdateParams& p;
  int64_t ib, ih, ip, count;

  const float* per_batch(const TensorArg& t, float* scratch) const {
    const int64_t start = ib * t.stride[0] + ih * t.stride[1] + ip * t.stride[2];
    return row_as_float(t, start, t.stride[2], count, scratch);
  }
  const float* per_head(const TensorArg& t, float* scratch) const {
    return row_as_float(t, ih * t.stride[0] + ip * t.stride[1], t.stride[1], count, scratch);
  }
  int64_t output_offset() const { return (ib * p.heads + ih) * p.head_dim + ip; }
};

void update_tile(const Tile& tile, int64_t slot, const float* B, const float* C, float* scratch,
                 AdvanceStateRow advance) {
  const StateUpdateParams& p = tile.p;
  const int64_t n = p.state_dim, count = tile.count;
  float dt[kTile], y[kTile], x_scratch[kTile], other[kTile];
  const float* raw = tile.per_batch(p.dt, other);
  std::copy(raw, raw + count, dt);
  if (p.dt_bias.data) {
    const float* bias = tile.per_head(p.dt_bias, other);
    for (int64_t i = 0; i < count; ++i) dt[i] += bias[i];
  }
  if (p.dt_softplus) {
    for (int64_t i = 0; i < count; ++i) dt[i] = softplus(dt[i]);
  }
  const float* x = tile.per_batch(p.x, x_scratch);

  const bool shared_A = p.A.stride[2] == 0 && n > 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = tile.ip + i;
    const int64_t start_A = tile.ih * p.A.stride[0] + row * p.A.stride[1];
    const int64_t start_s =
        slot * p.state.stride[0] + tile.ih * p.state.stride[1] + row * p.state.stride[2];
    // row_as_float hands out the state's own memory where it can: then the update is in place.
    float* s = const_cast<float*>(row_as_float(p.state, start_s, p.state.stride[3], n, scratch));
    // A is one number for the whole row in Mamba-2 style calls, which expand it.
    const float one = shared_A ? load_float(p.A.data, p.A.dtype, start_A) : 0.0f;
    const float* A = shared_A ? nullptr : row_as_float(p.A, start_A, p.A.stride[2], n, scratch + n);
    y[i] = advance(s, A, one, B, C, dt[i], dt[i] * x[i], n);
    store_row(p.state, start_s, p.state.stride[3], n, s);
  }

  if (p.D.data) {
    const float* D = tile.per_head(p.D, other);
    for (int64_t i = 0; i < count; ++i) y[i] += x[i] * D[i];
  }
  if (p.z.data) {
    const float* z = tile.per_batch(p.z, other);
    for (int64_t i = 0; i < count; ++i) y[i] *= silu(z[i]);
  }
  store_row(p.out, tile.output_offset(), 1, count, y);
}

}  // namespace

void state_update_cpu(const StateUpdateParams& p, int64_t begin, int64_t end) {
  const int64_t n = p.state_dim;
  std::vector<float> scratch(static_cast<size_t>(4 * n));
  float* const row_scratch = scratch.data() + 2 * n;
  const AdvanceStateRow advance = advance_state_row_function();
  const float* B = nullptr;
  const float* C = nullptr;
  int64_t loaded_batch = -1, loaded_group = -1;

  for (int64_t row = begin; row < end;) {
    Tile tile{p, row / p.head_dim / p.heads, row / p.head_dim % p.heads, row % p.head_dim, 0};
    tile.count = std::min({end - row, p.head_dim - tile.ip, kTile});
    row += tile.count;
    const int64_t slot = p.indices ? p.indices[tile.ib * p.indices_stride] : tile.ib;
    if (slot < 0) {
      const float zeros[kTile] = {};
      store_row(p.out, tile.output_offset(), 1, tile.count, zeros);
      continue;
    }
    const int64_t group = tile.ih / (p.heads / p.groups);
    if (tile.ib != loaded_batch || group != loaded_group) {
      B = row_as_float(p.B, tile.ib * p.B.stride[0] + group * p.B.stride[1], p.B.stride[2], n,
                       scratch.data());
      C = row_as_float(p.C, tile.ib * p.C.stride[0] + group * p.C.stride[1], p.C.stride[2], n,
                       scratch.data() + n);
      loaded_batch = tile.ib;
      loaded_group = group;
    }
    update_tile(tile, slot, B, C, row_scratch, advance);
  }
}

}  // namespace mamba
