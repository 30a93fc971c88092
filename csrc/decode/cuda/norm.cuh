// The norm in front of a projection: every block normalises all rows for itself, into its shared
// memory, in the weights' dtype.
#pragma once

#include "product.cuh"

namespace mamba {
namespace decode {

template <typename T>
__device__ __forceinline__ float4 load_four(const void* data, int64_t offset) {
  const T* from = static_cast<const T*>(data) + offset;
  if constexpr (sizeof(T) == 4) {
    return __ldg(reinterpret_cast<const float4*>(from));
  } else {
    const uint2 bits = __ldg(reinterpret_cast<const uint2*>(from));
    const T* v = reinterpret_cast<const T*>(&bits);
    return make_float4(to_float(v[0]), to_float(v[1]), to_float(v[2]), to_float(v[3]));
  }
}

// Inputs 4 i to 4 i + 3 of a row, in the order in which products take them.
template <typename T>
__device__ __forceinline__ void store_four(char* row, int i, float4 v) {
  if constexpr (sizeof(T) == 4) {
    reinterpret_cast<float4*>(row)[i] = v;
  } else {
    uint2 bits;
    T* halves = reinterpret_cast<T*>(&bits);
    halves[0] = from_float<T>(v.x), halves[1] = from_float<T>(v.y);
    halves[2] = from_float<T>(v.z), halves[3] = from_float<T>(v.w);
    unsigned* words = reinterpret_cast<unsigned*>(row + i / 2 * 16 + i % 2 * 4);
    words[0] = bits.x, words[2] = bits.y;
  }
}

// Normalises rows of the residual stream, several at a time: teams of whole warps take one each.
template <typename T>
class RowNorm {
  static constexpr int kHeld = 5;  // float4 of a row that a thread keeps; more are read again

 public:
  // `shared` holds 2 * kWarps floats.
  __device__ RowNorm(const DecodeCudaParams& p, const void* weight, const void* bias, float* shared)
      : p_(p), weight_(weight), bias_(bias), shared_(shared), size_(p.size.d_model) {
    lanes_ = kThreads;
    while (lanes_ > 32 && p.size.batch * lanes_ > kThreads) lanes_ /= 2;
    lane_ = static_cast<int>(threadIdx.x) & (lanes_ - 1);
  }

  // All threads call this. Row b goes to `to` + b * `pitch`, with zeros up to a whole unit.
  __device__ void run(char* to, int pitch) {
    const int at_once = kThreads / lanes_;
    for (int first = 0; first < p_.size.batch; first += at_once) {
      const int b = first + static_cast<int>(threadIdx.x) / lanes_;
      normalise(b < p_.size.batch ? b : -1, to + b * pitch);
    }
  }

 private:
  __device__ float4 load(int b, int i) const {
    return __ldcg(reinterpret_cast<const float4*>(p_.residual + int64_t{b} * size_ + i));
  }

  // Of a team's values, through `shared`.
  __device__ float team_sum(float v, float* shared) const {
#pragma unroll
    for (int width = 16; width > 0; width /= 2) v += __shfl_xor_sync(0xffffffffu, v, width);
    const int warp = static_cast<int>(threadIdx.x) / 32, warps = lanes_ / 32;
    if (threadIdx.x % 32 == 0) shared[warp] = v;
    __syncthreads();
    const float* own = shared + warp / warps * warps;
    v = own[0];
    for (int i = 1; i < warps; ++i) v += own[i];
    return v;
  }

  template <typename Use>
  __device__ void each(int b, const float4 (&held)[kHeld], const Use& use) const {
    if (b < 0) return;
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
      const int i = 4 * (lane_ + j * lanes_);
      if (i < size_) use(i, held[j]);
    }
#pragma unroll 2
    for (int i = 4 * (lane_ + kHeld * lanes_); i < size_; i += 4 * lanes_) use(i, load(b, i));
  }

  __device__ void normalise(int b, char* to) const {
    float4 held[kHeld];
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
      const int i = 4 * (lane_ + j * lanes_);
      if (b >= 0 && i < size_) held[j] = load(b, i);
      // Needed after the sums over the row.
      if (i < size_)
        asm volatile("prefetch.global.L1 [%0];" ::"l"(static_cast<const T*>(weight_) + i));
    }
    const float size = static_cast<float>(size_);
    float mean = 0.0f, square = 0.0f;
    if (!p_.is_rms_norm) {
      each(b, held, [&](int, float4 v) { mean += v.x + v.y + v.z + v.w; });
      mean = team_sum(mean, shared_ + kWarps) / size;
    }
    each(b, held, [&](int, float4 v) {
      v.x -= mean, v.y -= mean, v.z -= mean, v.w -= mean;
      square += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
    });
    const float rstd = rsqrtf(team_sum(square, shared_) / size + p_.eps);
    each(b, held, [&](int i, float4 v) {
      const float4 w = load_four<T>(weight_, i);
      float4 out = make_float4((v.x - mean) * rstd * w.x, (v.y - mean) * rstd * w.y,
                               (v.z - mean) * rstd * w.z, (v.w - mean) * rstd * w.w);
      if (bias_ != nullptr) {
        const float4 add = load_four<T>(bias_, i);
        out.x += add.x, out.y += add.y, out.z += add.z, out.w += add.w;
      }
      store_four<T>(to, i / 4, out);
    });
    const int end = units_of(size_ * sizeof(T)) * kUnitBytes / static_cast<int>(sizeof(T));
    for (int i = size_ + 4 * lane_; b >= 0 && i < end; i += 4 * lanes_) {
      store_four<T>(to, i / 4, make_float4(0.0f, 0.0f, 0.0f, 0.0f));
    }
    __syncthreads();
  }

  const DecodeCudaParams& p_;
  const void *weight_, *bias_;
  float* shared_;
  const int size_;
  int lanes_, lane_;
};

}  // namespace decode
}  // namespace mamba
