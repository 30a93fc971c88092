// What a single row's step does with a block's channels between in_proj and
// out_proj: convolution and gate, x_proj together with the other blocks,
// dt_proj, softplus, state update, skip, gate.
#pragma once

#include "row_exchange.cuh"
#include "row_layout.h"
#include "row_units.cuh"
#include "states.cuh"

namespace mamba {
namespace decode {

// The exchanged arrays. All begin at 16 bytes. Of what every block reads there
// are replicas, so that not all poll the same places: a block reads its own
// replica.
struct RowWords {
  uint64_t *model, *inner, *projected, *partial;
  int replica, replica_words;
  int partial_stride;  // words of an output of x_proj, one for each block

  __device__ RowWords(const DecodeCudaParams& p, int element)
      : model(p.words),
        inner(model + even(p.size.d_model)),
        projected(inner + even(p.size.d_inner * element / 4)),
        replica_words(static_cast<int>(projected - model) + even(p.size.projected)) {
    partial = model + int64_t{kReplicas} * replica_words;
    partial_stride = even(static_cast<int>(gridDim.x));
    replica = static_cast<int>(blockIdx.x) % kReplicas * replica_words;
  }

  __device__ static int even(int words) { return (words + 1) / 2 * 2; }
};

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int width = 16; width > 0; width /= 2) v += __shfl_xor_sync(0xffffffffu, v, width);
  return v;
}

// The sum over the pieces of a row of weights.
__device__ __forceinline__ float row_sum(const float* sums, int row, int pieces) {
  const float* from = sums + row * pieces;
  float sum = from[0];
#pragma unroll 1
  for (int i = 1; i < pieces; ++i) sum += from[i];
  return sum;
}

// This block's part of a layer's small array in shared memory; null if there is
// none.
__device__ __forceinline__ const char* small_part(const RowLayout& r, const char* shared, int layer,
                                                  int part) {
  const int place = reinterpret_cast<const int*>(shared + r.places)[part];
  return place < 0 ? nullptr : shared + r.buffers + (layer & 1) * r.buffer_bytes + place;
}

// Its element i; 0 if there is none.
template <typename T>
__device__ __forceinline__ float small_value(const RowLayout& r, const char* shared, int layer,
                                             int part, int i) {
  const int place = reinterpret_cast<const int*>(shared + r.places)[part];
  if (place < 0) return 0.0f;
  const char* buffer = shared + r.buffers + (layer & 1) * r.buffer_bytes;
  return to_float(reinterpret_cast<const T*>(buffer + place)[i]);
}

// from_bits() without branches.
__device__ __forceinline__ float bits_to_float(unsigned bits, DType dtype) {
  const float half = __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
  const float wide = __uint_as_float(dtype == DType::kFloat32 ? bits : bits << 16);
  return dtype == DType::kFloat16 ? half : wide;
}

template <typename T>
class RowStates {
  static constexpr int kLanes = 8;  // of a channel in the state update
  static constexpr int kTaps = kMaxDecodeConv;

 public:
  __device__ RowStates(const DecodeCudaParams& p, const RowLayout& r, char* shared, Range channels,
                       const RowWords& words)
      : p_(p),
        r_(r),
        shared_(shared),
        channels_(channels),
        words_(words),
        thread_(static_cast<int>(threadIdx.x)) {}

  // in_proj's sums lie in shared memory and lack `factor`.
  __device__ __forceinline__ void run(int layer, float factor) const {
    const DecodeLayerArgs& a = p_.layer[layer];
    convolve(a, layer, factor);
    __syncthreads();
    hand_on_partials(layer);
    sum_partials(layer + 1);
    read_projected(layer + 1);
    update(a, layer);
  }

 private:
  __device__ __forceinline__ float* floats(int offset) const {
    return reinterpret_cast<float*>(shared_ + offset);
  }

  __device__ __forceinline__ const void* part(int layer, int i) const {
    return small_part(r_, shared_, layer, i);
  }

  __device__ __forceinline__ float small(int layer, int i, int at) const {
    return small_value<T>(r_, shared_, layer, i, at);
  }

  __device__ __forceinline__ static float sigmoid(float x) {
    return __fdividef(1.0f, 1.0f + __expf(-x));
  }
  __device__ __forceinline__ static float rounded(float v) { return to_float(from_float<T>(v)); }

  template <int kWidth>
  __device__ __forceinline__ static float sum_of_lanes(float v) {
#pragma unroll
    for (int width = kWidth / 2; width > 0; width /= 2) {
      v += __shfl_xor_sync(0xffffffffu, v, width);
    }
    return v;
  }

  // One half of the threads takes the convolution, a lane for each tap, the
  // other the gates.
  __device__ __forceinline__ void convolve(const DecodeLayerArgs& a, int layer,
                                           float factor) const {
    constexpr int kHalf = kRowThreads / 2;
    const bool gates = thread_ >= kHalf;
    const int tap = thread_ % kTaps, width = p_.size.d_conv;
    const void *window = part(layer, kConvState), *weights = part(layer, kConvWeight);
#pragma unroll 1
    for (int base = 0; base < channels_.count; base += kHalf / kTaps) {
      if (base + thread_ % kHalf / 32 * (32 / kTaps) >= channels_.count) break;  // a whole warp
      const int c = base + thread_ % kHalf / kTaps;
      const bool exists = c < channels_.count;
      float v = 0.0f, product = 0.0f;
      if (exists) {
        v = row_sum(floats(r_.sums), gates ? channels_.count + c : c, p_.plan.model_pieces);
        v = rounded(v * factor + small(layer, gates ? kGateBias : kInBias, c));
        if (!gates && tap < width) {
          const int at = c * width + tap;
          const float x = tap + 1 == width ? v
                                           : bits_to_float(load_bits(window, p_.conv_dtype, at + 1),
                                                           p_.conv_dtype);
          product = x * to_float(static_cast<const T*>(weights)[at]);
          store_float(a.conv_state, p_.conv_dtype, int64_t{channels_.first} * width + at, x);
        }
      }
      product = sum_of_lanes<kTaps>(product);
      if (exists && tap == 0) {
        if (!gates) v = product + small(layer, kConvBias, c);
        v *= sigmoid(v);
        floats(gates ? r_.gate : r_.u)[c] = gates ? v : rounded(v);
      }
    }
  }

  __device__ __forceinline__ static float4 four(const T* from) {
    if constexpr (sizeof(T) == 4) {
      return *reinterpret_cast<const float4*>(from);
    } else {
      const uint2 bits = *reinterpret_cast<const uint2*>(from);
      const float2 low = both_of(bits.x, T()), high = both_of(bits.y, T());
      return make_float4(low.x, low.y, high.x, high.y);
    }
  }

  __device__ __forceinline__ static float multiply_four(float4 w, float4 v, float sum) {
    sum = fmaf(w.x, v.x, sum), sum = fmaf(w.y, v.y, sum);
    return fmaf(w.w, v.w, fmaf(w.z, v.z, sum));
  }

  // This block's channels' part of x_proj, to the blocks that own the outputs.
  __device__ __forceinline__ void hand_on_partials(int layer) const {
    const int outputs = p_.size.projected, lanes = r_.column_lanes;
    const int groups = channels_.count / kChannelGroup, lane = thread_ % lanes;
    const char* buffer = shared_ + r_.buffers + (layer & 1) * r_.buffer_bytes;
    const T* columns = reinterpret_cast<const T*>(buffer + r_.columns);
    const float4* u = reinterpret_cast<const float4*>(shared_ + r_.u);
#pragma unroll 1
    for (int base = 0; base < outputs; base += kRowThreads / lanes) {
      if (base + thread_ / 32 * (32 / lanes) >= outputs) break;
      const int output = base + thread_ / lanes;
      float sum = 0.0f;
      if (output < outputs) {
#pragma unroll 1
        for (int g = lane; g < groups; g += 2 * lanes) {
          const T* from = columns + (g * outputs + output) * kChannelGroup;
          sum = multiply_four(four(from), u[g], sum);
          if (g + lanes < groups) {
            sum = multiply_four(four(from + lanes * outputs * kChannelGroup), u[g + lanes], sum);
          }
        }
      }
#pragma unroll 1
      for (int width = lanes / 2; width > 0; width /= 2) {
        sum += __shfl_xor_sync(0xffffffffu, sum, width);
      }
      if (output < outputs && lane == 0) {
        put_word(words_.partial + output * words_.partial_stride + blockIdx.x, __float_as_uint(sum),
                 layer + 1);
      }
    }
  }

  // A warp for each output that this block owns.
  __device__ __forceinline__ void sum_partials(unsigned tag) const {
    const int lane = thread_ % 32, blocks = static_cast<int>(gridDim.x);
#pragma unroll 1
    for (int output = blockIdx.x + thread_ / 32 * blocks; output < p_.size.projected;
         output += kRowWarps * blocks) {
      const uint64_t* from = words_.partial + output * words_.partial_stride;
      float sum = 0.0f;
      take_pairs<3>(from, blocks / 2, lane, 32, tag, [&](int, unsigned first, unsigned second) {
        sum += __uint_as_float(first) + __uint_as_float(second);
      });
      if (lane == 0 && blocks % 2 != 0) sum += __uint_as_float(take_one(from + blocks - 1, tag));
      sum = warp_sum(sum);
      if (lane < kReplicas) {
        put_word(words_.projected + lane * words_.replica_words + output, __float_as_uint(sum),
                 tag);
      }
    }
  }

  __device__ __forceinline__ void read_projected(unsigned tag) const {
    float* projected = floats(r_.projected);
#pragma unroll 1
    for (int i = thread_; i < p_.size.projected; i += kRowThreads) {
      projected[i] = __uint_as_float(take_one(words_.projected + words_.replica + i, tag));
    }
    __syncthreads();
  }

  // dt before its bias and softplus: this lane's part.
  __device__ __forceinline__ float multiply_dt(const T* weights, const float* inputs,
                                               int lane) const {
    const int rank = p_.size.dt_rank;
    float sum = 0.0f;
    if (rank % 4 == 0) {
#pragma unroll 1
      for (int i = 4 * lane; i < rank; i += 8 * kLanes) {
        const float4* from = reinterpret_cast<const float4*>(inputs + i);
        sum = multiply_four(four(weights + i), from[0], sum);
        if (i + 4 * kLanes < rank) {
          sum = multiply_four(four(weights + i + 4 * kLanes), from[kLanes], sum);
        }
      }
    } else {
#pragma unroll 1
      for (int i = lane; i < rank; i += kLanes) sum = fmaf(to_float(weights[i]), inputs[i], sum);
    }
    return sum;
  }

  __device__ __forceinline__ void update(const DecodeLayerArgs& a, int layer) const {
    const float* projected = floats(r_.projected);
    const int rank = p_.size.dt_rank, n = p_.size.d_state, lane = thread_ % kLanes;
    const float *B = projected + rank, *C = B + n;
    const T* dt_proj = static_cast<const T*>(part(layer, kDtProj));
    const void *A_log = part(layer, kALog), *skip = part(layer, kSkip);
    const void* states = part(layer, kSsmState);
#pragma unroll 1
    for (int base = 0; base < channels_.count; base += kRowThreads / kLanes) {
      if (base + thread_ / 32 * (32 / kLanes) >= channels_.count) break;
      const int c = base + thread_ / kLanes;
      const bool exists = c < channels_.count;
      float dt = exists ? multiply_dt(dt_proj + c * rank, projected, lane) : 0.0f;
      dt = sum_of_lanes<kLanes>(dt);
      float y = 0.0f, u = 0.0f;
      if (exists) {
        dt += small(layer, kDtBias, c);
        if (dt <= 20.0f) dt = log1pf(__expf(dt));
        u = floats(r_.u)[c];
#pragma unroll 1
        for (int first = lane; first < n; first += 2 * kLanes) {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const int i = first + j * kLanes, at = c * n + i;
            if (i >= n) break;
            const float A = __expf(bits_to_float(load_bits(A_log, p_.A_dtype, at), p_.A_dtype));
            const float h = bits_to_float(load_bits(states, p_.ssm_dtype, at), p_.ssm_dtype);
            const float next = fmaf(h, __expf(-dt * A), dt * u * B[i]);
            store_float(a.ssm_state, p_.ssm_dtype, int64_t{channels_.first} * n + at, next);
            y = fmaf(next, C[i], y);
          }
        }
      }
      y = sum_of_lanes<kLanes>(y);
      if (exists) {
        y = fmaf(u, bits_to_float(load_bits(skip, p_.D_dtype, c), p_.D_dtype), y);
        y *= floats(r_.gate)[c];
      }
      hand_on_y(channels_.first + c, exists, lane, y, layer + 1);
    }
  }

  // A lane for each replica. Halves travel in pairs.
  __device__ __forceinline__ void hand_on_y(int channel, bool owner, int lane, float y,
                                            unsigned tag) const {
    static_assert(kLanes == kReplicas, "every lane has the sum");
    uint64_t* to = words_.inner + lane * words_.replica_words;
    if constexpr (sizeof(T) == 4) {
      if (owner) put_word(to + channel, __float_as_uint(y), tag);
    } else {
      const float next = __shfl_down_sync(0xffffffffu, y, kLanes);
      T pair[2] = {from_float<T>(y), from_float<T>(next)};
      if (owner && channel % 2 == 0) {
        put_word(to + channel / 2, *reinterpret_cast<const unsigned*>(pair), tag);
      }
    }
  }

  const DecodeCudaParams& p_;
  const RowLayout& r_;
  char* shared_;
  const Range channels_;
  const RowWords words_;
  const int thread_;
};

}  // namespace decode
}  // namespace mamba
