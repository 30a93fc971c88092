#include "choose.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "../../common/simd.h"

namespace mamba {
namespace MAMBA_ISA {
namespace {

constexpr int64_t kPiece = 512;  // logits that are looked at as one
constexpr float kInfinity = __builtin_inff();

typedef double VecD __attribute__((vector_size(8 * MAMBA_LANES)));

template <class E>
MAMBA_INLINE float value_at(const typename E::T* p) {
  if constexpr (std::is_same_v<E, F32>) return *p;
  if constexpr (std::is_same_v<E, F16>) return half_to_float(*p);
  if constexpr (std::is_same_v<E, BF16>) return bfloat16_to_float(*p);
}
// What is left of a value in this type.
template <class E>
MAMBA_INLINE float rounded(float value) {
  if constexpr (std::is_same_v<E, F32>) return value;
  if constexpr (std::is_same_v<E, F16>) return half_to_float(float_to_half(value));
  if constexpr (std::is_same_v<E, BF16>) return bfloat16_to_float(float_to_bfloat16(value));
}

struct Largest {
  float value = -kInfinity;
  bool nan = false;

  void add(float x) {
    if (x > value) value = x;
    nan |= x != x;
  }
};

template <class E>
Largest largest_of(const typename E::T* x, int64_t count) {
  Vec top = broadcast(-kInfinity);
  VecI nan{};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Vec v = E::read(x + i);
    top = v > top ? v : top;
    nan |= v != v;
  }
  Largest result;
  for (int lane = 0; lane < kLanes; ++lane) result.add(top[lane]), result.nan |= nan[lane] != 0;
  for (; i < count; ++i) result.add(value_at<E>(x + i));
  return result;
}

// The first NaN, or else the first of the largest.
template <class E>
int64_t place_of_largest(const typename E::T* x, int64_t count) {
  float best = -kInfinity;
  int64_t start = 0;
  for (int64_t piece = 0; piece < count; piece += kPiece) {
    const Largest here = largest_of<E>(x + piece, std::min(kPiece, count - piece));
    if (here.nan) {
      for (int64_t i = piece;; ++i) {
        const float v = value_at<E>(x + i);
        if (v != v) return i;
      }
    }
    if (here.value > best) best = here.value, start = piece;
  }
  while (value_at<E>(x + start) != best) ++start;
  return start;
}

struct Candidate {
  float value, weight;
  int64_t index;
};

// Logits fall into classes by how far they are below the largest one: 1 / 128 wide, the last one
// without an end. Thresholds are found by going through the classes, then through one of them.
constexpr int kClasses = 4096;
constexpr int64_t kGroup = 64;  // logits whose maximum stands for them

struct Scratch {
  float *values, *weights;
  Candidate* candidates;
  double* mass;
  int64_t* count;
  int64_t bytes = 0;

  Scratch(int64_t vocab, void* base) {
    auto take = [&](int64_t size) {
      void* p = static_cast<char*>(base) + bytes;
      bytes += (size + 63) / 64 * 64;
      return p;
    };
    values = static_cast<float*>(take(4 * vocab));
    weights = static_cast<float*>(take(4 * vocab));
    candidates = static_cast<Candidate*>(take(vocab * static_cast<int64_t>(sizeof(Candidate))));
    mass = static_cast<double*>(take(8 * kClasses));
    count = static_cast<int64_t*>(take(8 * kClasses));
  }
};

class Row {
 public:
  Row(const ChoiceParams& p, int64_t row, void* scratch)
      : p_(p), s_(p.vocab, scratch), row_(row), n_(p.vocab) {}

  int64_t choose() {
    int64_t token = -1;
    with_dtype(p_.dtype, [&](auto type) {
      using E = decltype(type);
      const auto* logits = static_cast<const typename E::T*>(p_.logits) + row_ * p_.stride;
      if (!p_.uniform && !p_.seen) {
        token = place_of_largest<E>(logits, n_);
      } else {
        read<E>(logits);
        token = p_.uniform ? draw() : place_of_largest<F32>(s_.values, n_);
      }
    });
    return token;
  }

 private:
  const ChoiceParams& p_;
  const Scratch s_;
  const int64_t row_, n_;
  float top_ = 0;
  // Kept is what lies above the threshold, and the first `ties_` of what is equal to it.
  float threshold_ = -kInfinity;
  int64_t ties_ = 0;

  template <class E>
  void read(const typename E::T* logits) const {
    int64_t i = 0;
    for (; i + kLanes <= n_; i += kLanes) store(s_.values + i, E::read(logits + i));
    for (; i < n_; ++i) s_.values[i] = value_at<E>(logits + i);
    if (!p_.seen) return;
    const uint8_t* seen = p_.seen + row_ * p_.seen_stride;
    for (i = 0; i < n_; ++i) {
      if (i + 8 <= n_) {
        uint64_t eight;
        std::memcpy(&eight, seen + i, 8);
        if (!eight) {
          i += 7;
          continue;
        }
      }
      if (!seen[i]) continue;
      const float x = s_.values[i], penalty = p_.repetition_penalty;
      s_.values[i] = rounded<E>(x < 0 ? x * penalty : x / penalty);
    }
  }

  int64_t draw() {
    for (int64_t i = 0; i < n_; i += kLanes) {
      if (i + kLanes <= n_) {
        store(s_.values + i, load(s_.values + i) / p_.temperature);
      } else {
        for (int64_t j = i; j < n_; ++j) s_.values[j] /= p_.temperature;
      }
    }
    const Largest largest = largest_of<F32>(s_.values, n_);
    if (largest.nan || !std::isfinite(largest.value)) return -1;
    top_ = largest.value;
    ties_ = n_;
    if (p_.top_k > 0 && p_.top_k < n_) keep_most_likely();
    weigh();
    if (p_.top_p > 0 && p_.top_p < 1) keep_nucleus();
    if (p_.min_p > 0) {
      const float least = top_ + static_cast<float>(std::log(static_cast<double>(p_.min_p)));
      if (least > threshold_) threshold_ = least, ties_ = n_;
    }
    drop();
    return pick();
  }

  int class_of(float value) const {
    return static_cast<int>(std::min((top_ - value) * 128.0f, kClasses - 1.0f));
  }

  static bool greater(float a, float b) { return a > b; }

  // The k-th largest value, and all that are equal to it.
  void keep_most_likely() {
    float* const found = reinterpret_cast<float*>(s_.candidates);  // not in use yet
    const int64_t groups = (n_ + kGroup - 1) / kGroup;
    const int64_t k = p_.top_k <= groups ? few(groups, found) : many(found);
    threshold_ = found[k];
  }

  // Few of the values: the k-th largest of the groups' maxima leaves few to look at. Returns the
  // place of the k-th in `found`.
  int64_t few(int64_t groups, float* found) const {
    float* const maxima = s_.weights;  // not in use yet
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t start = g * kGroup;
      maxima[g] = largest_of<F32>(s_.values + start, std::min(kGroup, n_ - start)).value;
    }
    const int64_t k = p_.top_k - 1;
    std::copy(maxima, maxima + groups, found);
    std::nth_element(found, found + k, found + groups, greater);
    const float least = found[k];
    int64_t count = 0;
    for (int64_t g = 0; g < groups; ++g) {
      if (maxima[g] < least) continue;
      for (int64_t i = g * kGroup; i < std::min((g + 1) * kGroup, n_); ++i) {
        if (s_.values[i] >= least) found[count++] = s_.values[i];
      }
    }
    std::nth_element(found, found + k, found + count, greater);
    return k;
  }

  // Many of them: by classes.
  int64_t many(float* found) const {
    std::fill(s_.count, s_.count + kClasses, 0);
    for (int64_t i = 0; i < n_; ++i) ++s_.count[class_of(s_.values[i])];
    int chosen = 0;
    int64_t before = 0;
    while (before + s_.count[chosen] < p_.top_k) before += s_.count[chosen++];
    int64_t count = 0;
    for (int64_t i = 0; i < n_; ++i) {
      if (class_of(s_.values[i]) == chosen) found[count++] = s_.values[i];
    }
    const int64_t k = p_.top_k - before - 1;
    std::nth_element(found, found + k, found + count, greater);
    return k;
  }

  void weigh() const {
    int64_t i = 0;
    for (; i + kLanes <= n_; i += kLanes) {
      store(s_.weights + i, exp(load(s_.values + i) - top_));
    }
    const int rest = static_cast<int>(n_ - i);
    if (rest) {
      write_some<F32>(s_.weights + i, exp(read_some<F32>(s_.values + i, rest) - top_), rest);
    }
  }

  // The fewest, most likely tokens whose weights reach top_p of the sum; the first among equals.
  void keep_nucleus() {
    std::fill(s_.mass, s_.mass + kClasses, 0.0);
    for (int64_t i = 0; i < n_; ++i) {
      if (s_.values[i] >= threshold_) s_.mass[class_of(s_.values[i])] += s_.weights[i];
    }
    double total = 0, before = 0;
    for (int i = 0; i < kClasses; ++i) total += s_.mass[i];
    const double wanted = static_cast<double>(p_.top_p) * total;
    int chosen = 0;
    while (chosen < kClasses && before + s_.mass[chosen] < wanted) before += s_.mass[chosen++];
    if (chosen == kClasses) return;
    int64_t count = 0;
    for (int64_t i = 0; i < n_; ++i) {
      const float value = s_.values[i];
      if (value >= threshold_ && class_of(value) == chosen) {
        s_.candidates[count++] = {value, s_.weights[i], i};
      }
    }
    std::sort(s_.candidates, s_.candidates + count, [](const Candidate& a, const Candidate& b) {
      return a.value != b.value ? a.value > b.value : a.index < b.index;
    });
    for (int64_t i = 0; i < count && (i == 0 || before < wanted); ++i) {
      const Candidate& c = s_.candidates[i];
      ties_ = i > 0 && c.value == threshold_ ? ties_ + 1 : 1;
      threshold_ = c.value;
      before += c.weight;
    }
  }

  // Makes the weight of everything else 0.
  void drop() const {
    if (threshold_ == -kInfinity) return;
    int64_t i = 0;
    for (; i + kLanes <= n_; i += kLanes) {
      const Vec kept = load(s_.weights + i);
      store(s_.weights + i, load(s_.values + i) >= threshold_ ? kept : Vec{});
    }
    for (; i < n_; ++i) s_.weights[i] = s_.values[i] >= threshold_ ? s_.weights[i] : 0.0f;
    if (ties_ == n_) return;
    int64_t left = ties_;
    for (i = 0; i < n_; ++i) {
      if (s_.values[i] == threshold_ && left-- <= 0) s_.weights[i] = 0;
    }
  }

  double sum_of(const float* weights, int64_t count) const {
    VecD sums{};
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      sums += __builtin_convertvector(load(weights + i), VecD);
    }
    double total = 0;
    for (int lane = 0; lane < kLanes; ++lane) total += sums[lane];
    for (; i < count; ++i) total += weights[i];
    return total;
  }

  // The first token with which the running sum of weights goes beyond `uniform` of the whole sum.
  int64_t pick() const {
    double total = 0;
    double* const sums = s_.mass;  // of as many pieces as there are places; the last takes the rest
    const int64_t size = std::max(kPiece, (n_ + kClasses - 1) / kClasses);
    const int64_t pieces = (n_ + size - 1) / size;
    for (int64_t i = 0; i < pieces; ++i) {
      total += sums[i] = sum_of(s_.weights + i * size, std::min(size, n_ - i * size));
    }
    const double wanted = p_.uniform[row_] * total;
    int64_t piece = 0, token = -1;
    double before = 0;
    while (piece + 1 < pieces && before + sums[piece] <= wanted) before += sums[piece++];
    for (int64_t i = piece * size; i < std::min((piece + 1) * size, n_); ++i) {
      if (s_.weights[i] <= 0) continue;
      token = i;
      before += s_.weights[i];
      if (before > wanted) return token;
    }
    // Rounding has left the sum a little below: the last token before, which is likely enough.
    for (int64_t i = piece * size; token < 0 && i-- > 0;) {
      if (s_.weights[i] > 0) token = i;
    }
    return token;
  }
};

int64_t scratch_bytes(const ChoiceParams& p) { return Scratch(p.vocab, nullptr).bytes; }

void choose_row(const ChoiceParams& p, int64_t row, void* scratch) {
  p.tokens[row] = Row(p, row, scratch).choose();
}

}  // namespace

ChooseKernels choose_kernels() { return {scratch_bytes, choose_row}; }

}  // namespace MAMBA_ISA
}  // namespace mamba
