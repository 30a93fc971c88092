// dt_proj, softplus, the state update, skip and gate: a block does its own channels, for all rows.
#pragma once

#include "barrier.cuh"
#include "norm.cuh"

namespace mamba {
namespace decode {

// Bits of a number whose dtype is known at run time: loading does not wait for converting.
__device__ __forceinline__ unsigned load_bits(const void* data, DType dtype, int64_t i) {
  if (dtype == DType::kFloat32) return static_cast<const unsigned*>(data)[i];
  return static_cast<const unsigned short*>(data)[i];
}

__device__ __forceinline__ float from_bits(unsigned bits, DType dtype) {
  if (dtype == DType::kFloat32) return __uint_as_float(bits);
  if (dtype == DType::kBFloat16) return __uint_as_float(bits << 16);
  return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}

template <typename T>
__host__ __device__ constexpr DType dtype_code() {
  return std::is_same_v<T, float>    ? DType::kFloat32
         : std::is_same_v<T, __half> ? DType::kFloat16
                                     : DType::kBFloat16;
}

// Odd multiples of a unit keep the rows that a warp reads together in different banks.
__host__ __device__ inline int pitch_of(int units) { return (units | 1) * kUnitBytes; }

// What the phase keeps in shared memory. All but the weights has a part for every row.
struct StateSpace {
  int channels;      // of this block, at most
  int weight_pitch;  // bytes of a channel's row of dt_proj, and of a row of its inputs
  int64_t inputs, rest, sums, end;  // offsets in bytes: inputs of dt_proj, B and C, dt_proj's sums

  __host__ __device__ StateSpace(const DecodeCudaSizes& s, int blocks, int element) {
    channels = (s.d_inner + blocks - 1) / blocks;
    const int tiles = (channels + kTileRows - 1) / kTileRows;
    weight_pitch = pitch_of(units_of(s.dt_rank * element));
    inputs = int64_t{tiles} * kTileRows * weight_pitch;
    rest = inputs + int64_t{s.batch} * weight_pitch;
    sums = rest + int64_t{8} * s.batch * s.d_state;
    end = sums + int64_t{4} * tiles * kTileRows * s.batch;
  }
};

template <typename T, int kRows>
class StatePhase {
  static constexpr int kElement = sizeof(T);
  static constexpr int kLanes = 4, kAtOnce = kThreads / kLanes;  // lanes of a channel of a row
  static constexpr int kEach = 4;                                // states of a lane at a time

 public:
  __device__ StatePhase(const DecodeCudaParams& p, const DecodeLayerArgs& a, char* shared)
      : p_(p),
        a_(a),
        space_(p.size, static_cast<int>(gridDim.x), kElement),
        shared_(shared),
        thread_(static_cast<int>(threadIdx.x)),
        batch_(p.size.batch) {
    const int64_t inner = p.size.d_inner, block = blockIdx.x;
    first_ = static_cast<int>(inner * block / gridDim.x);
    count_ = static_cast<int>(inner * (block + 1) / gridDim.x) - first_;
  }

  __device__ void run(GridBarrier& barrier) {
    load_weights();
    int item = thread_ / kLanes;
    Channel next = load_channel(item);
    barrier.wait();
    load_projected();
    __syncthreads();
    project();
    __syncthreads();
    // Every lane takes the same number of turns: the sums need whole warps.
#pragma unroll 1
    for (int base = 0; base < count_ * batch_; base += kAtOnce) {
      const Channel channel = next;
      item += kAtOnce;
      next = load_channel(item);
      update(channel);
    }
  }

 private:
  // What a channel of a row needs besides the results of x_proj, as bits; of A and the state, this
  // lane's first values.
  struct Channel {
    int index, b;
    unsigned u, dt_bias, D, A_log[kEach], h[kEach];
    float gate;
  };

  // The rows of dt_proj that belong to this block's channels, with zeros up to a whole unit.
  __device__ void load_weights() {
    const int rank = p_.size.dt_rank, lane = thread_ % 16;
    const T* from = static_cast<const T*>(a_.dt_proj) + int64_t{first_} * rank;
    const int units = units_of(rank * kElement);
#pragma unroll 2
    for (int row = thread_ / 16; row < count_; row += kThreads / 16) {
      char* to = shared_ + row * space_.weight_pitch;
      if (rank * kElement % 16 == 0) {
        const uint4* pieces = reinterpret_cast<const uint4*>(from + int64_t{row} * rank);
        for (int i = lane; i < 4 * units; i += 16) {
          uint4 v = make_uint4(0, 0, 0, 0);
          if (i < rank * kElement / 16) v = __ldg(pieces + i);
          reinterpret_cast<uint4*>(to)[i] = v;
        }
      } else {
        for (int i = lane; i < units * kUnitBytes / kElement; i += 16) {
          reinterpret_cast<T*>(to)[i] =
              i < rank ? from[int64_t{row} * rank + i] : from_float<T>(0.0f);
        }
      }
    }
  }

  __device__ Channel load_channel(int item) const {
    Channel c;
    c.b = count_ > 0 ? item / count_ : batch_;
    c.index = item - c.b * count_;
    if (c.b >= batch_) return c;
    const int channel = first_ + c.index, n = p_.size.d_state;
    const int64_t at = int64_t{c.b} * p_.size.d_inner + channel;
    c.u = load_shared_bits(p_.u, at);
    c.gate = __ldcg(p_.gate + at);
    c.dt_bias = a_.dt_bias == nullptr ? 0 : load_bits(a_.dt_bias, dtype_code<T>(), channel);
    c.D = load_bits(a_.D, p_.D_dtype, channel);
    load_states(channel, at, thread_ % kLanes * kEach, n, c.A_log, c.h);
    return c;
  }

  __device__ void load_states(int channel, int64_t at, int begin, int n, unsigned (&A_log)[kEach],
                              unsigned (&h)[kEach]) const {
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      if (begin + j >= n) break;
      A_log[j] = load_bits(a_.A_log, p_.A_dtype, int64_t{channel} * n + begin + j);
      h[j] = load_bits(a_.ssm_state, p_.ssm_dtype, at * n + begin + j);
    }
  }

  // Another block's results: past the first-level cache.
  __device__ static unsigned load_shared_bits(const void* data, int64_t i) {
    if constexpr (sizeof(T) == 4) return __ldcg(static_cast<const unsigned*>(data) + i);
    return __ldcg(static_cast<const unsigned short*>(data) + i);
  }

  // The sums over x_proj's slices: dt's part in the weights' dtype, B and C as fp32.
  __device__ void load_projected() {
    const int rank = p_.size.dt_rank, outputs = p_.size.projected;
    const int padded = units_of(rank * kElement) * kUnitBytes / kElement;
    const int width = padded + outputs - rank;
#pragma unroll 2
    for (int i = thread_; i < batch_ * width; i += kThreads) {
      const int b = i / width, column = i - b * width;
      const int output = column < padded ? column : column - padded + rank;
      float sum = 0.0f;
      if (column < rank || column >= padded) {
        const float* from = p_.projected + b * outputs + output;
#pragma unroll 4
        for (int s = 0; s < p_.plan.x_slices; ++s) sum += __ldcg(from + s * batch_ * outputs);
      }
      if (column < padded) {
        T* row = reinterpret_cast<T*>(shared_ + space_.inputs + b * space_.weight_pitch);
        row[arranged_index<T>(column)] = from_float<T>(sum);
      } else {
        float* rest = reinterpret_cast<float*>(shared_ + space_.rest);
        rest[b * (outputs - rank) + output - rank] = sum;
      }
    }
  }

  // dt before its bias: (tiles, batch, 8) sums.
  __device__ void project() {
    const int lane = thread_ % 32, units = units_of(p_.size.dt_rank * kElement);
    float* sums = reinterpret_cast<float*>(shared_ + space_.sums);
#pragma unroll 1
    for (int tile = thread_ / 32; tile * kTileRows < count_; tile += kWarps) {
      TileSums<T, kRows> products;
      const char* weights =
          shared_ + (tile * kTileRows + lane / 4) * space_.weight_pitch + lane % 4 * 16;
      const char* inputs =
          TileSums<T, kRows>::lane_inputs(shared_ + space_.inputs, space_.weight_pitch, batch_);
#pragma unroll 1
      for (int left = units; left > 0; left -= kGroup) {
        add_units(products, weights, kUnitBytes, inputs, space_.weight_pitch, batch_, left);
        weights += kGroup * kUnitBytes, inputs += kGroup * kUnitBytes;
      }
      products.store(sums + tile * kTileRows * batch_, batch_);
    }
  }

  __device__ void update(const Channel& c) {
    const bool exists = c.b < batch_;
    const int lane = thread_ % kLanes, n = p_.size.d_state, channel = first_ + c.index;
    const int64_t at = int64_t{c.b} * p_.size.d_inner + channel;
    const float* sums = reinterpret_cast<const float*>(shared_ + space_.sums);
    const float* B = reinterpret_cast<const float*>(shared_ + space_.rest) + c.b * 2 * n;
    const float *C = B + n, u = from_bits(c.u, dtype_code<T>());
    float y = 0.0f;
    if (exists) {
      float dt = sums[(c.index / kTileRows * batch_ + c.b) * kTileRows + c.index % kTileRows];
      dt += from_bits(c.dt_bias, dtype_code<T>());
      if (dt <= 20.0f) dt = log1pf(__expf(dt));
#pragma unroll 1
      for (int begin = lane * kEach; begin < n; begin += kLanes * kEach) {
        unsigned A_log[kEach], h[kEach];
#pragma unroll
        for (int j = 0; j < kEach; ++j) A_log[j] = c.A_log[j], h[j] = c.h[j];
        if (begin >= kLanes * kEach) load_states(channel, at, begin, n, A_log, h);
#pragma unroll
        for (int j = 0; j < kEach; ++j) {
          if (begin + j >= n) break;
          const float decay = __expf(-dt * __expf(from_bits(A_log[j], p_.A_dtype)));
          const float next = from_bits(h[j], p_.ssm_dtype) * decay + dt * u * B[begin + j];
          store_float(a_.ssm_state, p_.ssm_dtype, at * n + begin + j, next);
          y = fmaf(next, C[begin + j], y);
        }
      }
    }
    y += __shfl_xor_sync(0xffffffffu, y, 1);
    y += __shfl_xor_sync(0xffffffffu, y, 2);
    if (exists && lane == 0) {
      y = fmaf(u, from_bits(c.D, p_.D_dtype), y) * c.gate;
      static_cast<T*>(p_.y)[at] = from_float<T>(y);
    }
  }

  const DecodeCudaParams& p_;
  const DecodeLayerArgs& a_;
  const StateSpace space_;
  char* shared_;
  const int thread_, batch_;
  int first_, count_;
};

}  // namespace decode
}  // namespace mamba
