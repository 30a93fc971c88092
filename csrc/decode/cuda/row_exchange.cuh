// How the blocks of a single row's step pass results on: words of 8 bytes, a value of 4 and a tag,
// that are written and read whole. Whoever waits for a value polls the word itself, so that passing
// it on takes one trip to the L2 cache and back, without fences. Tags are numbers of layers, words
// are zero before the step.
//
// A word is written again in the next layer, which nobody can reach before all readers are done: a
// block hands on sums for x_proj in every layer, after it has read everything of the layer before,
// and no layer is completed without them.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace mamba {
namespace decode {

__device__ __forceinline__ void put_word(uint64_t* words, unsigned at, unsigned value,
                                         unsigned tag) {
  const uint64_t word = (uint64_t{tag} << 32) | value;
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(words + at), "l"(word) : "memory");
}

__device__ __forceinline__ ulonglong2 peek_two(const uint64_t* from) {
  ulonglong2 v;
  asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];"
               : "=l"(v.x), "=l"(v.y)
               : "l"(from)
               : "memory");
  return v;
}

__device__ __forceinline__ uint64_t peek_one(const uint64_t* from) {
  uint64_t v;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(v) : "l"(from) : "memory");
  return v;
}

__device__ __forceinline__ unsigned tag_of(unsigned long long word) {
  return static_cast<unsigned>(word >> 32);
}

__device__ __forceinline__ unsigned value_of(unsigned long long word) {
  return static_cast<unsigned>(word);
}

// Counts the turns of a waiting loop. Built with MAMBA_DECODE_WATCHDOG, a kernel that waits for
// seconds ends with an error instead of hanging.
class Patience {
 public:
  __device__ __forceinline__ void turn() {
#ifdef MAMBA_DECODE_WATCHDOG
    if (++turns_ > (1u << 22)) __trap();
#endif
  }

 private:
#ifdef MAMBA_DECODE_WATCHDOG
  unsigned turns_ = 0;
#endif
};

// Takes kAtOnce pairs of words at a time, for this thread's k below `pairs`: use(prepare(k), value
// of word 2 k, value of word 2 k + 1). What `prepare` does is done while the words are not there.
template <int kAtOnce, typename Prepare, typename Use>
__device__ __forceinline__ void take_pairs(const uint64_t* words, unsigned pairs, unsigned thread,
                                           unsigned threads, unsigned tag, const Prepare& prepare,
                                           const Use& use) {
  Patience patience;
#pragma unroll 1
  for (unsigned base = thread; base < pairs; base += kAtOnce * threads) {
    ulonglong2 v[kAtOnce];
    decltype(prepare(base)) prepared[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      if (base + j * threads < pairs) prepared[j] = prepare(base + j * threads);
    }
    const uint64_t* from = words + 2 * base;
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      if (base + j * threads < pairs) v[j] = peek_two(from + 2 * j * threads);
    }
    bool waits;
    do {
      waits = false;
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        if (base + j * threads < pairs && (tag_of(v[j].x) != tag || tag_of(v[j].y) != tag)) {
          waits = true;
          v[j] = peek_two(from + 2 * j * threads);
        }
      }
      if (waits) patience.turn();
    } while (waits);
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      if (base + j * threads < pairs) use(prepared[j], value_of(v[j].x), value_of(v[j].y));
    }
  }
}

// Keeps the compiler from computing a place later than here.
__device__ __forceinline__ unsigned now(unsigned place) {
  asm volatile("" : "+r"(place));
  return place;
}

__device__ __forceinline__ unsigned take_one(const uint64_t* from, unsigned tag) {
  Patience patience;
  uint64_t word = peek_one(from);
#pragma unroll 1
  while (tag_of(word) != tag) {
    patience.turn();
    word = peek_one(from);
  }
  return value_of(word);
}

}  // namespace decode
}  // namespace mamba
