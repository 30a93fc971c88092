// What a single row's step does with a block's channels between in_proj and out_proj: convolution
// and gate, x_proj together with the other blocks, dt_proj, softplus, state update, skip, gate.
#pragma once

#include "row_exchange.cuh"
#include "row_layout.h"
#include "row_product.cuh"
#include "states.cuh"

namespace mamba {
namespace decode {

// The words that this block reads of the arrays of which there are replicas.
__device__ __forceinline__ const uint64_t* own_replica(const DecodeCudaParams& p,
                                                       const RowLayout& r) {
  return p.words + blockIdx.x % kReplicas * r.words.replica;
}

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int width = 16; width > 0; width /= 2) v += __shfl_xor_sync(0xffffffffu, v, width);
  return v;
}

// The sum over the pieces of a row of weights, by kLanes lanes together.
template <int kLanes>
__device__ __forceinline__ float row_sum(const float* sums, int row, int pieces) {
  const float* from = sums + row * pieces;
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kRowWarps / kLanes; ++i) {
    const int piece = static_cast<int>(threadIdx.x) % kLanes + i * kLanes;
    if (piece < pieces) sum += from[piece];
  }
#pragma unroll
  for (int width = kLanes / 2; width > 0; width /= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, width);
  }
  return sum;
}

// from_bits() without branches.
__device__ __forceinline__ float bits_to_float(unsigned bits, DType dtype) {
  const float half = __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
  const float wide = __uint_as_float(dtype == DType::kFloat32 ? bits : bits << 16);
  return dtype == DType::kFloat16 ? half : wide;
}

// This block's parts of a layer's small arrays in shared memory. kUsual fixes at compile time which
// of them there are, with which dtypes and sizes: see usual() in row.cu.
template <typename T, bool kUsual>
class SmallArrays {
 public:
  __device__ __forceinline__ SmallArrays(const DecodeCudaParams& p, const RowLayout& r,
                                         const char* shared, int first_channel)
      : p_(p), r_(r), shared_(shared), first_(first_channel) {}

  __device__ __forceinline__ int d_state() const { return kUsual ? 16 : p_.size.d_state; }
  __device__ __forceinline__ int d_conv() const { return kUsual ? 4 : p_.size.d_conv; }
  __device__ __forceinline__ DType conv_dtype() const {
    return kUsual ? dtype_code<T>() : p_.conv_dtype;
  }
  __device__ __forceinline__ DType ssm_dtype() const {
    return kUsual ? dtype_code<T>() : p_.ssm_dtype;
  }
  __device__ __forceinline__ DType A_dtype() const { return kUsual ? DType::kFloat32 : p_.A_dtype; }
  __device__ __forceinline__ DType D_dtype() const { return kUsual ? DType::kFloat32 : p_.D_dtype; }

  // All layers have the same biases or none.
  __device__ __forceinline__ bool exists(int part) const {
    if (kUsual) return part != kNormBias && part != kInBias && part != kGateBias;
    const void* const* fields = reinterpret_cast<const void* const*>(&p_.layer[0]);
    return fields[r_.small[part].field] != nullptr;
  }

  // A part may begin anywhere in its first 16 bytes; what all blocks have whole begins there.
  __device__ __forceinline__ const char* at(int part) const {
    const SmallLayout& s = r_.small[part];
    return shared_ + s.place + (first_ * s.unit & 15);
  }

  // Element i; 0 if there is none.
  __device__ __forceinline__ float value(int part, int i) const {
    return exists(part) ? to_float(reinterpret_cast<const T*>(at(part))[i]) : 0.0f;
  }

  __device__ __forceinline__ float value(int part, int i, DType dtype) const {
    return bits_to_float(load_bits(at(part), dtype, i), dtype);
  }

  __device__ __forceinline__ float scale(int part, int i) const {
    return reinterpret_cast<const float*>(at(part))[i];
  }

 private:
  const DecodeCudaParams& p_;
  const RowLayout& r_;
  const char* shared_;
  const int first_;
};

// The computing threads of a block meet.
__device__ __forceinline__ void meet() {
  asm volatile("bar.sync 1, %0;" ::"n"(kRowThreads) : "memory");
}

// Four int8 weights as floats: a byte of 128 more is the end of the mantissa of a number from 2^23
// on.
__device__ __forceinline__ float4 four_of(unsigned bytes) {
  constexpr unsigned kTwoTo23 = 0x4b000000u;
  const float offset = __uint_as_float(kTwoTo23) + 128.0f;
  bytes ^= 0x80808080u;
  return make_float4(__uint_as_float(__byte_perm(bytes, kTwoTo23, 0x7650)) - offset,
                     __uint_as_float(__byte_perm(bytes, kTwoTo23, 0x7651)) - offset,
                     __uint_as_float(__byte_perm(bytes, kTwoTo23, 0x7652)) - offset,
                     __uint_as_float(__byte_perm(bytes, kTwoTo23, 0x7653)) - offset);
}

template <typename T, typename W, bool kUsual>
class RowStates {
  static constexpr bool kInt8 = sizeof(W) == 1;
  static constexpr int kLanes = 8;  // of a channel in the state update
  static constexpr int kAtOnce = kRowThreads / kLanes;
  static constexpr int kTaps = kMaxDecodeConv;

 public:
  __device__ RowStates(const DecodeCudaParams& p, const RowLayout& r, char* shared, Range channels,
                       RowBarriers barriers)
      : p_(p),
        r_(r),
        shared_(shared),
        channels_(channels),
        small_(p, r, shared, channels.first),
        barriers_(barriers),
        thread_(threadIdx.x) {}

  // in_proj's sums lie in shared memory and lack `factor`.
  __device__ __forceinline__ void run(int layer, float factor) const {
    const DecodeLayerArgs& a = p_.layer[layer];
    wait_patiently(barriers_.ready(kForConvolution), layer & 1);
    convolve(a, factor);
    meet();
    hand_on_partials(layer + 1);
    wait_patiently(barriers_.ready(kForStates), layer & 1);
    const int channel = thread_ / kLanes;
    const Channel first = load(channel);
    sum_partials(layer + 1);
    read_projected(layer + 1);
    if (thread_ < kBlockArrivals) arrive(barriers_.used(kForConvolution));
    update(a, channel, first, layer + 1);
  }

 private:
  __device__ __forceinline__ float* floats(int offset) const {
    return reinterpret_cast<float*>(shared_ + offset);
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

  // One half of the threads takes the convolution, a lane for each tap, the other the gates.
  __device__ __forceinline__ void convolve(const DecodeLayerArgs& a, float factor) const {
    constexpr int kHalf = kRowThreads / 2;
    const bool gates = thread_ >= kHalf;
    const int tap = thread_ % kTaps, width = small_.d_conv();
#pragma unroll 1
    for (int base = 0; base < channels_.count; base += kHalf / kTaps) {
      if (base + thread_ % kHalf / 32 * (32 / kTaps) >= channels_.count) break;  // a whole warp
      const int own = base + thread_ % kHalf / kTaps;
      const bool exists = own < channels_.count;
      const int c = exists ? own : base;
      const bool moves = !gates && tap < width;
      const int at = c * width + (moves ? tap : 0);
      float x = 0.0f, weight = 0.0f;
      if (moves) {
        weight = small_.value(kConvWeight, at);
        if (tap + 1 < width) x = small_.value(kConvState, at + 1, small_.conv_dtype());
      }
      const float bias = gates ? small_.value(kGateBias, c) : small_.value(kInBias, c);
      const float conv_bias = gates ? 0.0f : small_.value(kConvBias, c);
      float v = row_sum<kTaps>(floats(r_.sums), gates ? channels_.count + c : c,
                               r_.product[kOfModel].pieces);
      if (kInt8) v *= small_.scale(gates ? kGateScales : kInScales, c);
      v = rounded(fmaf(v, factor, bias));
      if (tap + 1 == width) x = v;
      const float product = sum_of_lanes<kTaps>(x * weight);
      if (!exists) continue;
      if (!gates) v = product + conv_bias;
      v *= sigmoid(v);
      if (tap == 0) floats(gates ? r_.gate : r_.u)[c] = gates ? v : rounded(v);
      if (moves) store_float(a.conv_state, small_.conv_dtype(), channels_.first * width + at, x);
    }
  }

  template <typename V>  // four weights
  using FourOf = std::conditional_t<sizeof(V) == 4, float4,
                                    std::conditional_t<sizeof(V) == 2, uint2, unsigned>>;
  using Four = FourOf<T>;

  __device__ __forceinline__ static float4 floats_of(float4 v) { return v; }
  __device__ __forceinline__ static float4 floats_of(uint2 bits) {
    const float2 low = both_of(bits.x, T()), high = both_of(bits.y, T());
    return make_float4(low.x, low.y, high.x, high.y);
  }

  __device__ __forceinline__ static float4 floats_of(unsigned bytes) { return four_of(bytes); }

  template <typename V>
  __device__ __forceinline__ static float4 four(const V* from) {
    return floats_of(*reinterpret_cast<const FourOf<V>*>(from));
  }

  __device__ __forceinline__ static float multiply_four(float4 w, float4 v, float sum) {
    sum = fmaf(w.x, v.x, sum), sum = fmaf(w.y, v.y, sum);
    return fmaf(w.w, v.w, fmaf(w.z, v.z, sum));
  }

  // This block's channels' part of x_proj, to the blocks that own the outputs.
  __device__ __forceinline__ void hand_on_partials(unsigned tag) const {
    const int outputs = p_.size.projected, log2 = r_.column_lanes_log2, lanes = 1 << log2;
    const int groups = channels_.count / kChannelGroup, lane = thread_ & (lanes - 1);
    const W* columns = reinterpret_cast<const W*>(shared_ + r_.columns);
    const float4* u = reinterpret_cast<const float4*>(shared_ + r_.u);
#pragma unroll 1
    for (int base = 0; base < outputs; base += kRowThreads >> log2) {
      if (base + (thread_ / 32 * 32 >> log2) >= outputs) break;  // a whole warp
      const int output = base + (thread_ >> log2);
      float sum = 0.0f;
      if (output < outputs) {
        const W* from = columns + (lane * outputs + output) * kChannelGroup;
#pragma unroll 1
        for (int g = lane; g < groups; g += lanes) {
          sum = multiply_four(four(from), u[g], sum);
          from += outputs * kChannelGroup << log2;
        }
      }
#pragma unroll 1
      for (int width = lanes / 2; width > 0; width /= 2) {
        sum += __shfl_xor_sync(0xffffffffu, sum, width);
      }
      if (output < outputs && lane == 0) {
        if (kInt8) sum *= small_.scale(kXScales, output);
        put_word(p_.words, r_.words.partial + output * r_.words.partial_stride + blockIdx.x,
                 __float_as_uint(sum), tag);
      }
    }
  }

  // A warp for each output that this block owns.
  __device__ __forceinline__ void sum_partials(unsigned tag) const {
    const unsigned lane = thread_ % 32, blocks = gridDim.x, outputs = p_.size.projected;
#pragma unroll 1
    for (unsigned output = blockIdx.x + thread_ / 32 * blocks; output < outputs;
         output += kRowWarps * blocks) {
      const uint64_t* from = p_.words + r_.words.partial + output * r_.words.partial_stride;
      float sum = 0.0f;
      take_pairs<3>(
          from, blocks / 2, lane, 32, tag, [](unsigned) { return 0; },
          [&](int, unsigned first, unsigned second) {
            sum += __uint_as_float(first) + __uint_as_float(second);
          });
      if (lane == 0 && blocks % 2 != 0) sum += __uint_as_float(take_one(from + blocks - 1, tag));
      sum = warp_sum(sum);
      if (lane < kReplicas) {
        put_word(p_.words, r_.words.projected + lane * r_.words.replica + output,
                 __float_as_uint(sum), tag);
      }
    }
  }

  // By the last threads: the first have sums to complete.
  __device__ __forceinline__ void read_projected(unsigned tag) const {
    float* projected = floats(r_.projected);
#pragma unroll 1
    for (int i = kRowThreads - 1 - thread_; i < p_.size.projected; i += kRowThreads) {
      projected[i] = __uint_as_float(take_one(own_replica(p_, r_) + r_.words.projected + i, tag));
    }
    meet();
  }

  // What a lane knows of a channel before x_proj's results come: of states `lane` and `lane` +
  // kLanes the decays' exponents and the states, of dt_proj the first weights.
  struct Channel {
    float A[2], h[2], bias, skip, u, gate;
    Four dt[2];
  };

  // (A, h) of state i of channel c.
  __device__ __forceinline__ float2 load_state(int c, int i) const {
    if (i >= small_.d_state()) return make_float2(0.0f, 0.0f);
    const int at = c * small_.d_state() + i;
    return make_float2(-__expf(small_.value(kALog, at, small_.A_dtype())),
                       small_.value(kSsmState, at, small_.ssm_dtype()));
  }

  __device__ __forceinline__ Channel load(int c) const {
    Channel v = {};
    if (c >= channels_.count) return v;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float2 state = load_state(c, thread_ % kLanes + j * kLanes);
      v.A[j] = state.x, v.h[j] = state.y;
    }
    if (dt_in_fours()) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int i = 4 * (static_cast<int>(thread_ % kLanes) + j * kLanes);
        if (i < p_.size.dt_rank) v.dt[j] = *reinterpret_cast<const Four*>(dt_weights(c) + i);
      }
    }
    v.bias = small_.value(kDtBias, c);
    v.skip = small_.value(kSkip, c, small_.D_dtype());
    v.u = floats(r_.u)[c];
    v.gate = floats(r_.gate)[c];
    return v;
  }

  __device__ __forceinline__ bool dt_in_fours() const { return kUsual || p_.size.dt_rank % 4 == 0; }
  __device__ __forceinline__ const T* dt_weights(int c) const {
    return reinterpret_cast<const T*>(small_.at(kDtProj)) + c * p_.size.dt_rank;
  }

  // dt before its bias and softplus: this lane's part.
  __device__ __forceinline__ float multiply_dt(int c, const Channel& v, const float* inputs,
                                               int lane) const {
    const int rank = p_.size.dt_rank;
    float sum = 0.0f;
    if (dt_in_fours()) {
      const float4* fours = reinterpret_cast<const float4*>(inputs);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int i = lane + j * kLanes;
        if (4 * i < rank) sum = multiply_four(floats_of(v.dt[j]), fours[i], sum);
      }
      const T* weights = dt_weights(c);
#pragma unroll 1
      for (int i = lane + 2 * kLanes; 4 * i < rank; i += kLanes) {
        sum = multiply_four(four(weights + 4 * i), fours[i], sum);
      }
    } else {
      const T* weights = dt_weights(c);
#pragma unroll 1
      for (int i = lane; i < rank; i += kLanes) sum = fmaf(to_float(weights[i]), inputs[i], sum);
    }
    return sum;
  }

  __device__ __forceinline__ void update(const DecodeLayerArgs& a, int c, Channel v,
                                         unsigned tag) const {
    const float* projected = floats(r_.projected);
    const int rank = p_.size.dt_rank, n = small_.d_state(), lane = thread_ % kLanes;
    const float *B = projected + rank, *C = B + n;
#pragma unroll 1
    while (c / (32 / kLanes) * (32 / kLanes) < channels_.count) {  // a whole warp
      const bool exists = c < channels_.count;
      float dt = exists ? multiply_dt(c, v, projected, lane) : 0.0f;
      dt = sum_of_lanes<kLanes>(dt) + v.bias;
      if (dt <= 20.0f) dt = log1pf(__expf(dt));
      const float input = dt * v.u;
      float y = 0.0f;
      if (exists) {
#pragma unroll 1
        for (int first = lane; first < n; first += 2 * kLanes) {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const int i = first + j * kLanes;
            if (i >= n) break;
            if (first != lane) {
              const float2 state = load_state(c, i);
              v.A[j] = state.x, v.h[j] = state.y;
            }
            const float next = fmaf(v.h[j], __expf(dt * v.A[j]), input * B[i]);
            y = fmaf(next, C[i], y);
            store_float(a.ssm_state, small_.ssm_dtype(), (channels_.first + c) * n + i, next);
          }
        }
      }
      y = fmaf(v.u, v.skip, sum_of_lanes<kLanes>(y)) * v.gate;
      hand_on_y(channels_.first + c, exists, lane, y, tag);
      c += kAtOnce;
      v = load(c);
    }
  }

  // A lane for each replica. Halves travel in pairs.
  __device__ __forceinline__ void hand_on_y(unsigned channel, bool owner, unsigned lane, float y,
                                            unsigned tag) const {
    static_assert(kLanes == kReplicas, "every lane has the sum");
    const unsigned to = r_.words.inner + lane * r_.words.replica;
    if constexpr (sizeof(T) == 4) {
      if (owner) put_word(p_.words, to + channel, __float_as_uint(y), tag);
    } else {
      const float next = __shfl_down_sync(0xffffffffu, y, kLanes);
      T pair[2] = {from_float<T>(y), from_float<T>(next)};
      if (owner && channel % 2 == 0) {
        put_word(p_.words, to + channel / 2, *reinterpret_cast<const unsigned*>(pair), tag);
      }
    }
  }

  const DecodeCudaParams& p_;
  const RowLayout& r_;
  char* shared_;
  const Range channels_;
  const SmallArrays<T, kUsual> small_;
  const RowBarriers barriers_;
  const unsigned thread_;
};

}  // namespace decode
}  // namespace mamba
