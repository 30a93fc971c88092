// One token of a whole model for a single row, in one launch: a block on each
// multiprocessor. At one row the time is the chain of small results, so that a
// block does all it can without the others, and passes results on as tagged
// words (row_exchange.cuh). A layer has four exchanges:
//
//   residual    read by all; norm; in_proj of a block's own channels;
//   convolution, SiLU partials    of x_proj: each block's channels' part,
//   summed by the block that owns the output projected   read by all; dt_proj,
//   softplus, state update, skip and gate of a block's channels y read by all;
//   out_proj of a block's rows, added to the residual stream
//
// Sums are taken in an order that depends on sizes and the number of
// multiprocessors only.
#pragma once

#include "row_copies.cuh"
#include "row_exchange.cuh"
#include "row_states.cuh"
#include "row_units.cuh"

namespace mamba {
namespace decode {

template <typename T, int kVectors>
class RowStep {
  static constexpr int kElement = sizeof(T);
  static constexpr int kInputs = UnitStream<T, kVectors>::kInputs;
  static constexpr int kAtOnce = 3;  // pairs of words of a thread

 public:
  __device__ RowStep(const DecodeCudaParams& p, const RowLayout& r, char* shared)
      : p_(p),
        r_(r),
        shared_(shared),
        thread_(static_cast<int>(threadIdx.x)),
        channels_(share_of(p.size.d_inner, kChannelGroup, blockIdx.x, gridDim.x)),
        rows_(share_of(p.size.d_model, 1, blockIdx.x, gridDim.x)),
        tokens_(share_of(p.size.vocab, 1, blockIdx.x, gridDim.x)),
        copies_(p, r, shared, channels_, rows_),
        words_(p, kElement),
        x_(reinterpret_cast<float*>(shared + r.x), p.size.d_model),
        y_(reinterpret_cast<float*>(shared + r.y), p.size.d_inner),
        plain_norm_(p.is_rms_norm && p.norm_bias == nullptr) {}

  // The products of all layers go through one copy of the code around them: at
  // this speed fetching instructions takes time.
  __device__ void run() {
    const int layers = p_.size.layers;
    list_units();
    copies_.list();
    __syncthreads();
    float* sums = floats(r_.sums) + thread_ / 32;
    const RowStates<T> states(p_, r_, shared_, channels_, words_);
    UnitStream<T, kVectors> stream;
    Units now = units(kIn);
    const char* weight = address(p_.layer[0].in_proj);
    stream.start(weight, now);
    float square = begin();
    int layer = 0;
    bool inner = false;  // the product is out_proj
    while (true) {
      if (inner) {
        read_y(layer);
        copies_.start(layer + 1);
      } else {
        if (layer > 0) square = read_residual(layer);
        normalise(layer, square);
      }
      float x[kInputs];
      const Inputs<T> inputs(floats(inner ? r_.y : r_.x),
                             inner ? p_.size.d_inner : p_.size.d_model);
      inputs.template load<kVectors>(x, now);
      const bool at_head = layer == layers;
      const bool head_next = inner && layer + 1 == layers;
      const DecodeLayerArgs& a = p_.layer[at_head || head_next ? 0 : inner ? layer + 1 : layer];
      const Units next = units(at_head ? kNone : !inner ? kOut : head_next ? kHeadUnits : kIn);
      const char* next_weight = address(at_head || head_next ? p_.lm_head
                                        : inner              ? a.in_proj
                                                             : a.out_proj);
      stream.run(weight, now, next_weight, next, x, sums);
      if (inner) SmallCopies::wait();
      __syncthreads();
      if (at_head) break;
      if (inner) {
        finish_out(layer++);
      } else {
        states.run(layer, scale());
      }
      inner = !inner;
      now = next, weight = next_weight;
    }
    finish_head();
  }

 private:
  enum UnitKind : int { kIn, kOut, kHeadUnits, kNone, kUnitKinds };
  static_assert(sizeof(Units) * kUnitKinds * kRowWarps <= kUnitTableBytes,
                "the table has its place");

  __device__ void list_units() const {
    const int warp = thread_ % kRowWarps, kind = thread_ / kRowWarps;
    const int model_bytes = kElement * p_.size.d_model;
    const int model_pieces = p_.plan.model_pieces;
    Units u;
    if (kind == kIn) {
      u = units_of_rows<kVectors>(warp, channels_.first, 2 * channels_.count,
                                  p_.size.d_inner - channels_.count, model_bytes, model_pieces);
    } else if (kind == kOut) {
      u = units_of_rows<kVectors>(warp, rows_.first, rows_.count, 0, kElement * p_.size.d_inner,
                                  p_.plan.inner_pieces);
    } else {
      u = units_of_rows<kVectors>(warp, tokens_.first, kind == kHeadUnits ? tokens_.count : 0, 0,
                                  model_bytes, model_pieces);
    }
    if (kind < kUnitKinds) reinterpret_cast<Units*>(shared_ + r_.units)[thread_] = u;
  }

  __device__ __forceinline__ Units units(int kind) const {
    return reinterpret_cast<const Units*>(shared_ + r_.units)[kind * kRowWarps + thread_ / 32];
  }

  __device__ __forceinline__ float* floats(int offset) const {
    return reinterpret_cast<float*>(shared_ + offset);
  }

  __device__ __forceinline__ static const char* address(const void* data) {
    return static_cast<const char*>(data);
  }

  __device__ __forceinline__ float small(int layer, int part, int i) const {
    return small_value<T>(r_, shared_, layer, part, i);
  }

  // The residual stream begins as the embedding, which every block reads for
  // itself. An id outside the vocabulary gives NaN. Returns this thread's part
  // of the sum of squares.
  __device__ float begin() {
    __syncthreads();
    copies_.start(0);
    const int64_t id = p_.ids[0];
    const bool exists = id >= 0 && id < p_.size.vocab;
    const T* row = static_cast<const T*>(p_.embedding) + (exists ? id * p_.size.d_model : 0);
    const auto embedded = [&](int i) { return exists ? to_float(row[i]) : NAN; };
    for (int i = thread_; i < rows_.count; i += kRowThreads) {
      floats(r_.residual)[2 * i] = embedded(rows_.first + i);
    }
    SmallCopies::wait();
    __syncthreads();
    float square = 0.0f;
#pragma unroll 1
    for (int k = thread_; k < p_.size.d_model / 2; k += kRowThreads) {
      put_pair(0, k, embedded(2 * k), embedded(2 * k + 1), square);
    }
    return square;
  }

  // Elements 2 k and 2 k + 1 of an array that begins at 16 bytes.
  __device__ __forceinline__ static float2 pair_of(const char* data, int k) {
    if constexpr (kElement == 4) {
      return reinterpret_cast<const float2*>(data)[k];
    } else {
      return both_of(reinterpret_cast<const unsigned*>(data)[k], T());
    }
  }

  // Two values of the residual stream, times the norm's weights where that is
  // all of the norm that comes before the product.
  __device__ __forceinline__ void put_pair(int layer, int k, float first, float second,
                                           float& square) const {
    square = fmaf(first, first, square);
    square = fmaf(second, second, square);
    if (plain_norm_) {
      const float2 w = pair_of(small_part(r_, shared_, layer, kNormWeight), k);
      first *= w.x, second *= w.y;
    }
    *reinterpret_cast<float2*>(x_.at(2 * k)) = make_float2(first, second);
  }

  __device__ __forceinline__ float read_residual(int layer) const {
    float square = 0.0f;
    take_pairs<kAtOnce>(words_.model + words_.replica, p_.size.d_model / 2, thread_, kRowThreads,
                        layer, [&](int k, unsigned first, unsigned second) {
                          put_pair(layer, k, __uint_as_float(first), __uint_as_float(second),
                                   square);
                        });
    return square;
  }

  // Completes the norm; the plain one but for the factor of all, scale().
  __device__ __forceinline__ void normalise(int layer, float square) const {
    if (!plain_norm_) {
      normalise_fully(layer);
      return;
    }
    square = warp_sum(square);
    if (thread_ % 32 == 0) floats(r_.norm)[thread_ / 32] = square;
    __syncthreads();
  }

  // A norm with a mean or a bias. A thread comes back to what it wrote itself.
  __device__ __forceinline__ void normalise_fully(int layer) const {
    const int size = p_.size.d_model;
    const float count = static_cast<float>(size);
    float* warps = floats(r_.norm);
    float sum = 0.0f, square = 0.0f;
#pragma unroll 1
    for (int k = thread_; k < size / 2; k += kRowThreads) {
      const float* v = x_.at(2 * k);
      sum += v[0] + v[1];
    }
    const float mean = p_.is_rms_norm ? 0.0f : block_sum(sum, warps) / count;
#pragma unroll 1
    for (int k = thread_; k < size / 2; k += kRowThreads) {
      const float* v = x_.at(2 * k);
      square += (v[0] - mean) * (v[0] - mean) + (v[1] - mean) * (v[1] - mean);
    }
    const float rstd = rsqrtf(block_sum(square, warps + kRowWarps) / count + p_.eps);
#pragma unroll 1
    for (int i = 2 * thread_; i < size; i += i % 2 == 0 ? 1 : 2 * kRowThreads - 1) {
      float* v = x_.at(i);
      *v = (*v - mean) * rstd * small(layer, kNormWeight, i) + small(layer, kNormBias, i);
    }
    __syncthreads();
  }

  __device__ __forceinline__ float block_sum(float v, float* warps) const {
    v = warp_sum(v);
    if (thread_ % 32 == 0) warps[thread_ / 32] = v;
    __syncthreads();
    v = warps[0];
#pragma unroll 1
    for (int i = 1; i < kRowWarps; ++i) v += warps[i];
    return v;
  }

  // What in_proj's and lm_head's sums have to be multiplied with.
  __device__ __forceinline__ float scale() const {
    if (!plain_norm_) return 1.0f;
    const float4* warps = reinterpret_cast<const float4*>(shared_ + r_.norm);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kRowWarps / 4; ++i) {
      const float4 v = warps[i];
      sum += (v.x + v.y) + (v.z + v.w);
    }
    return rsqrtf(sum / static_cast<float>(p_.size.d_model) + p_.eps);
  }

  __device__ __forceinline__ void read_y(int layer) const {
    const int pairs = p_.size.d_inner * kElement / 8;
    take_pairs<kAtOnce>(words_.inner + words_.replica, pairs, thread_, kRowThreads, layer + 1,
                        [&](int k, unsigned first, unsigned second) {
                          if constexpr (kElement == 4) {
                            *reinterpret_cast<float2*>(y_.at(2 * k)) =
                                make_float2(__uint_as_float(first), __uint_as_float(second));
                          } else {
                            const float2 low = both_of(first, T()), high = both_of(second, T());
                            *reinterpret_cast<float4*>(y_.at(4 * k)) =
                                make_float4(low.x, low.y, high.x, high.y);
                          }
                        });
    __syncthreads();
  }

  // This block's rows of the residual stream. Its dtype rounds once, when the
  // sum is complete.
  __device__ __forceinline__ void finish_out(int layer) const {
    float* residual = floats(r_.residual);
    const int lane = thread_ % kReplicas;
#pragma unroll 1
    for (int i = thread_ / kReplicas; i < rows_.count; i += kRowThreads / kReplicas) {
      float v = residual[2 * i + layer % 2] + small(layer, kOutBias, i);
      v += row_sum(floats(r_.sums), i, p_.plan.inner_pieces);
      if (p_.residual_dtype != DType::kFloat32) v = to_float(from_float<T>(v));
      if (lane == 0) residual[2 * i + (layer + 1) % 2] = v;
      put_word(words_.model + lane * words_.replica_words + rows_.first + i, __float_as_uint(v),
               layer + 1);
    }
  }

  __device__ __forceinline__ void finish_head() const {
    const float factor = scale();
    for (int i = thread_; i < tokens_.count; i += kRowThreads) {
      static_cast<T*>(p_.logits)[tokens_.first + i] =
          from_float<T>(row_sum(floats(r_.sums), i, p_.plan.model_pieces) * factor);
    }
  }

  const DecodeCudaParams& p_;
  const RowLayout& r_;
  char* shared_;
  const int thread_;
  const Range channels_, rows_, tokens_;
  const SmallCopies copies_;
  const RowWords words_;
  const Inputs<T> x_, y_;
  const bool plain_norm_;
};

}  // namespace decode
}  // namespace mamba
