// One token of a whole model for a single row, in one launch: a block on each multiprocessor. At
// one row the time is the chain of small results, so that a block does all it can without the
// others, and passes results on as tagged words (row_exchange.cuh). A layer has four exchanges:
//
//   residual   read by all; norm; in_proj of a block's own channels; convolution, SiLU
//   partials   of x_proj: each block's channels' part, summed by the block that owns the output
//   projected  read by all; dt_proj, softplus, state update, skip and gate of a block's channels
//   y          read by all; out_proj of a block's rows, added to the residual stream
//
// Weights come through a ring in shared memory (row_ring.cuh), the layers' small arrays beside it
// (row_copies.cuh). Sums are taken in an order that depends on sizes and the number of
// multiprocessors only.
#pragma once

#include "row_copies.cuh"
#include "row_product_int8.cuh"
#include "row_states.cuh"

namespace mamba {
namespace decode {

// T is the dtype of activations and small weights, W that of the large weights.
template <typename T, typename W, bool kUsual>
class RowStep {
  static constexpr bool kInt8 = sizeof(W) == 1;
  static constexpr int kElement = sizeof(T);
  static constexpr int kAtOnce = 3;  // pairs of words of a thread

 public:
  __device__ RowStep(const DecodeCudaParams& p, const RowLayout& r, char* shared,
                     const Shares& shares, RowBarriers barriers)
      : p_(p),
        r_(r),
        shared_(shared),
        thread_(threadIdx.x),
        shares_(shares),
        barriers_(barriers),
        plain_norm_(kUsual || (p.is_rms_norm && p.norm_bias == nullptr)) {}

  // What the computing threads do.
  __device__ void run() {
    const int layers = p_.size.layers;
    const RowStates<T, W, kUsual> states(p_, r_, shared_, shares_.channels, barriers_);
    RingReader ring(r_, shared_, barriers_);
    float square = begin();
    bool inner = false;  // the product is out_proj
    int layer = 0;
    // Every product goes through one copy of the code: fetching instructions takes time.
    while (true) {
      if (kInt8 && inner) keep_out_scales();
      if (inner || layer > 0) square = read_inputs(inner, layer);
      if (inner) {
        meet();
        if (thread_ < kBlockArrivals) arrive(barriers_.used(kForStates));
      } else {
        normalise(layer, square);
      }
      const bool at_head = layer == layers;
      const int rows = inner     ? shares_.rows.count
                       : at_head ? shares_.tokens.count
                                 : 2 * shares_.channels.count;
      multiply_rows(r_.product[inner ? kOfInner : kOfModel], rows, inputs(inner), ring,
                    floats(at_head ? r_.head_sums : r_.sums));
      const float factor = inner || !plain_norm_ ? 1.0f : scale();
      meet();
      if (at_head) {
        finish_head(factor);
        return;
      }
      if (inner) {
        finish_out(layer++);
      } else {
        states.run(layer, factor);
      }
      // Nobody polls for what the others' blocks cannot have yet either: it would delay their
      // words.
      meet();
      pause();
      inner = !inner;
    }
  }

 private:
  // Less than the words of other blocks take.
  __device__ __forceinline__ static void pause() {
    constexpr unsigned kCycles = 250;
    const unsigned start = static_cast<unsigned>(clock());
    while (static_cast<unsigned>(clock()) - start < kCycles) {
    }
  }

  __device__ __forceinline__ float* floats(int offset) const {
    return reinterpret_cast<float*>(shared_ + offset);
  }

  __device__ __forceinline__ SmallArrays<T, kUsual> smalls() const {
    return SmallArrays<T, kUsual>(p_, r_, shared_, 0);
  }

  // The residual stream begins as the embedding, which every block reads for
  // itself. An id outside the vocabulary gives NaN. Returns this thread's part
  // of the sum of squares.
  __device__ float begin() {
    const int64_t id = p_.ids[0];
    const bool exists = id >= 0 && id < p_.size.vocab;
    const T* row = static_cast<const T*>(p_.embedding) + (exists ? id * p_.size.d_model : 0);
    const auto embedded = [&](int i) { return exists ? to_float(row[i]) : NAN; };
    for (int i = thread_; i < shares_.rows.count; i += kRowThreads) {
      floats(r_.residual)[2 * i] = embedded(shares_.rows.first + i);
    }
    const Inputs<W> all = inputs(false);
    float square = 0.0f;
    wait_patiently(barriers_.ready(kForNorm), 0);
#pragma unroll 1
    for (int k = thread_; k < p_.size.d_model / 2; k += kRowThreads) {
      put_pair(all, all.offset(2 * k), norm_weights(k), embedded(2 * k), embedded(2 * k + 1),
               square);
    }
    return square;
  }

  // Elements 2 k and 2 k + 1 of an array that begins at 16 bytes.
  __device__ __forceinline__ static float2 pair_of(const char* data, unsigned k) {
    if constexpr (kElement == 4) {
      return reinterpret_cast<const float2*>(data)[k];
    } else {
      return both_of(reinterpret_cast<const unsigned*>(data)[k], T());
    }
  }

  // Of elements 2 k and 2 k + 1, where they are all of the norm that comes before the product.
  __device__ __forceinline__ float2 norm_weights(unsigned k) const {
    return plain_norm_ ? pair_of(smalls().at(kNormWeight), k) : make_float2(1.0f, 1.0f);
  }

  // Two values of the residual stream.
  __device__ __forceinline__ static void put_pair(const Inputs<W>& all, unsigned offset,
                                                  float2 weight, float first, float second,
                                                  float& square) {
    square = fmaf(first, first, square);
    square = fmaf(second, second, square);
    all.put_two(offset, make_float2(first * weight.x, second * weight.y));
  }

  __device__ __forceinline__ Inputs<W> inputs(bool inner) const {
    return Inputs<W>(floats(r_.inputs), inner ? p_.size.d_inner : p_.size.d_model);
  }

  // The inputs of out_proj (`inner`), or the residual stream, of which it returns this thread's
  // part of the sum of squares.
  __device__ __forceinline__ float read_inputs(bool inner, int layer) const {
    struct Place {
      unsigned to;
      float2 weight;
    };
    constexpr unsigned kPer = 8 / kElement;  // values of y in a pair of words
    const unsigned each = inner ? kPer : 2, size = inner ? p_.size.d_inner : p_.size.d_model;
    const Inputs<W> all = inputs(inner);
    float square = 0.0f;
    if (!inner) wait_patiently(barriers_.ready(kForNorm), layer & 1);
    take_pairs<kAtOnce>(
        own_replica(p_, r_) + (inner ? r_.words.inner : 0), size / each, thread_, kRowThreads,
        inner ? layer + 1 : layer,
        [&](unsigned k) {
          return Place{now(all.offset(each * k)),
                       inner ? make_float2(0.0f, 0.0f) : norm_weights(k)};
        },
        [&](Place place, unsigned first, unsigned second) {
          if (!inner) {
            put_pair(all, place.to, place.weight, __uint_as_float(first), __uint_as_float(second),
                     square);
          } else if constexpr (kElement == 4) {
            all.put_two(place.to, make_float2(__uint_as_float(first), __uint_as_float(second)));
          } else {
            const float2 low = both_of(first, T()), high = both_of(second, T());
            all.put_four(place.to, make_float4(low.x, low.y, high.x, high.y));
          }
        });
    return square;
  }

  // Completes the norm; the plain one but for scale().
  __device__ __forceinline__ void normalise(int layer, float square) const {
    if (plain_norm_) {
      square = warp_sum(square);
      if (thread_ % 32 == 0) floats(r_.norm)[thread_ / 32] = square;
      meet();
    } else {
      normalise_fully();
    }
    if (thread_ < kBlockArrivals && layer < p_.size.layers) arrive(barriers_.used(kForNorm));
  }

  // A norm with a mean or a bias. A thread comes back to what it wrote itself.
  __device__ __forceinline__ void normalise_fully() const {
    const int size = p_.size.d_model;
    const float count = static_cast<float>(size);
    const Inputs<W> all = inputs(false);
    float* warps = floats(r_.norm);
    float sum = 0.0f, square = 0.0f;
#pragma unroll 1
    for (int k = thread_; k < size / 2; k += kRowThreads) {
      const float2 v = all.two(2 * k);
      sum += v.x + v.y;
    }
    const float mean = p_.is_rms_norm ? 0.0f : block_sum(sum, warps) / count;
#pragma unroll 1
    for (int k = thread_; k < size / 2; k += kRowThreads) {
      const float2 v = all.two(2 * k);
      square += (v.x - mean) * (v.x - mean) + (v.y - mean) * (v.y - mean);
    }
    const float rstd = rsqrtf(block_sum(square, warps + kRowWarps) / count + p_.eps);
#pragma unroll 1
    for (int k = thread_; k < size / 2; k += kRowThreads) {
      const float2 v = all.two(2 * k);
      const auto normal = [&](float x, int i) {
        return (x - mean) * rstd * smalls().value(kNormWeight, i) + smalls().value(kNormBias, i);
      };
      all.put_two(all.offset(2 * k), make_float2(normal(v.x, 2 * k), normal(v.y, 2 * k + 1)));
    }
    meet();
  }

  __device__ __forceinline__ float block_sum(float v, float* warps) const {
    v = warp_sum(v);
    if (thread_ % 32 == 0) warps[thread_ / 32] = v;
    meet();
    v = warps[0];
#pragma unroll 1
    for (int i = 1; i < kRowWarps; ++i) v += warps[i];
    return v;
  }

  // What in_proj's and lm_head's sums have to be multiplied with.
  __device__ __forceinline__ float scale() const {
    const float4* warps = reinterpret_cast<const float4*>(shared_ + r_.norm);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kRowWarps / 4; ++i) {
      const float4 v = warps[i];
      sum += (v.x + v.y) + (v.z + v.w);
    }
    return rsqrtf(fmaf(sum, r_.one_of_model, p_.eps));
  }

  // out_proj's scales outlive the stage that they come with.
  __device__ __forceinline__ void keep_out_scales() const {
    const SmallArrays<T, kUsual> small(p_, r_, shared_, shares_.rows.first);
    for (int i = thread_; i < shares_.rows.count; i += kRowThreads) {
      floats(r_.out_scales)[i] = small.scale(kOutScales, i);
    }
  }

  // This block's rows of the residual stream. Its dtype rounds once, when the
  // sum is complete.
  __device__ __forceinline__ void finish_out(int layer) const {
    float* residual = floats(r_.residual);
    const T* bias = static_cast<const T*>(p_.layer[layer].out_bias);
    const unsigned lane = thread_ % kReplicas, first = shares_.rows.first;
    const int count = shares_.rows.count;
#pragma unroll 1
    for (int base = 0; base < count; base += kRowThreads / kReplicas) {
      if (base + thread_ / 32 * (32 / kReplicas) >= count) break;  // a whole warp
      const int own = base + thread_ / kReplicas, i = own < count ? own : base;
      float v = residual[2 * i + layer % 2] + (bias == nullptr ? 0.0f : to_float(bias[first + i]));
      const float sum = row_sum<kReplicas>(floats(r_.sums), i, r_.product[kOfInner].pieces);
      v += kInt8 ? sum * floats(r_.out_scales)[i] : sum;
      if (own >= count) continue;
      if (p_.residual_dtype != DType::kFloat32) v = to_float(from_float<T>(v));
      if (lane == 0) residual[2 * i + (layer + 1) % 2] = v;
      put_word(p_.words, lane * r_.words.replica + first + i, __float_as_uint(v), layer + 1);
    }
  }

  __device__ __forceinline__ void finish_head(float factor) const {
    const int pieces = r_.product[kOfModel].pieces;
    for (int i = thread_; i < shares_.tokens.count; i += kRowThreads) {
      const float* sums = floats(r_.head_sums) + i * pieces;
      float sum = sums[0];
      for (int k = 1; k < pieces; ++k) sum += sums[k];
      const int token = shares_.tokens.first + i;
      if (kInt8) sum *= __ldg(p_.head_scales + token);
      static_cast<T*>(p_.logits)[token] = from_float<T>(sum * factor);
    }
  }

  const DecodeCudaParams& p_;
  const RowLayout& r_;
  char* shared_;
  const unsigned thread_;
  const Shares& shares_;
  const RowBarriers barriers_;
  const bool plain_norm_;
};

}  // namespace decode
}  // namespace mamba
