#include "state_row.h"

#include "../../common/simd.h"

namespace mamba {
namespace MAMBA_ISA {
namespace {

constexpr int kPartials = 16;  // of the sum, whatever the instruction set: it fixes the order
constexpr int kParts = kPartials / kLanes;

MAMBA_INLINE Vec advance(Vec s, Vec decay, Vec B, float input) { return s * decay + B * input; }

float advance_row(float* s, const float* A, float shared_A, const float* B, const float* C,
                  float dt, float input, int64_t n) {
  float sums[kPartials] = {};
  const Vec shared = exp(broadcast(dt * shared_A));
  const int64_t whole = n / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    float* const partial = sums + i / kLanes % kParts * kLanes;
    const Vec decay = A ? exp(load(A + i) * dt) : shared;
    const Vec next = advance(load(s + i), decay, load(B + i), input);
    store(s + i, next);
    store(partial, load(partial) + next * load(C + i));
  }
  if (whole < n) {
    const int count = static_cast<int>(n - whole);
    float* const partial = sums + whole / kLanes % kParts * kLanes;
    const Vec decay = A ? exp(read_some<F32>(A + whole, count) * dt) : shared;
    const Vec next =
        advance(read_some<F32>(s + whole, count), decay, read_some<F32>(B + whole, count), input);
    write_some<F32>(s + whole, next, count);
    // Lanes past the end must add nothing, even where a shared decay is infinite.
    float products[kLanes];
    store(products, next * read_some<F32>(C + whole, count));
    for (int lane = 0; lane < count; ++lane) partial[lane] += products[lane];
  }
  for (int width = kPartials / 2; width > 0; width /= 2) {
    for (int lane = 0; lane < width; ++lane) sums[lane] += sums[lane + width];
  }
  return sums[0];
}

}  // namespace

AdvanceStateRow advance_state_row_function() { return advance_row; }

}  // namespace MAMBA_ISA
}  // namespace mamba
