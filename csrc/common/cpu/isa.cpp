#include "../cpu_isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace mamba {
namespace {

constexpr const char* kNames[kIsaCount] = {"baseline", "avx2", "avx512", "avx512_bf16",
                                           "avx512_amx"};
constexpr const char* kVariable = "MAMBA_SSM_CPU_ISA";

// Whether the processor has tiles with bf16 products, and the system lets this process use them: it
// has to ask, once, because they enlarge what is saved of a thread.
bool has_tiles() {
#if defined(__x86_64__) && defined(__linux__)
  static const bool granted = [] {
    unsigned a, b, c, d;
    constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kBf16) == 0 || (d & kTile) == 0) {
      return false;
    }
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return granted;
#else
  return false;
#endif
}

// On Intel the bf16 dot product runs at half the rate of fp32 multiply-adds per input (measured on
// Sapphire Rapids: 41 against 71 billion products a second and core, whose tiles serve bf16
// instead), on AMD at twice that rate.
bool bf16_dot_pays() {
#if defined(__x86_64__)
  return __builtin_cpu_is("amd");
#else
  return false;
#endif
}

Isa best_isa() {
  int best = 0;
  for (int i = 0; i < kIsaCount; ++i) {
    const auto isa = static_cast<Isa>(i);
    if (isa == Isa::kAvx512Bf16 && !bf16_dot_pays()) continue;
    if (isa_available(isa)) best = i;
  }
  return static_cast<Isa>(best);
}

// Looks the name up among those that this machine has; false if it is not there.
bool find_isa(const char* name, Isa* isa) {
  if (name == nullptr || *name == '\0' || std::strcmp(name, "auto") == 0) {
    *isa = best_isa();
    return true;
  }
  for (int i = 0; i < kIsaCount; ++i) {
    if (std::strcmp(name, kNames[i]) == 0 && isa_available(static_cast<Isa>(i))) {
      *isa = static_cast<Isa>(i);
      return true;
    }
  }
  return false;
}

std::atomic<int32_t>& chosen() {
  static std::atomic<int32_t> isa{[] {
    Isa found;
    if (!find_isa(std::getenv(kVariable), &found)) found = best_isa();
    return static_cast<int32_t>(found);
  }()};
  return isa;
}

}  // namespace

bool isa_available(Isa isa) {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  switch (isa) {
    case Isa::kAvx2:
      return avx2;
    case Isa::kAvx512:
      return avx512;
    case Isa::kAvx512Bf16:
    case Isa::kAvx512Amx: {
      const bool bf16 =
          avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
      return bf16 && (isa == Isa::kAvx512Bf16 || has_tiles());
    }
    default:
      return true;
  }
#else
  return isa == Isa::kBaseline;
#endif
}

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

Isa current_isa() { return static_cast<Isa>(chosen().load(std::memory_order_relaxed)); }

bool force_isa(const char* name) {
  Isa isa;
  if (!find_isa(name, &isa)) return false;
  chosen().store(static_cast<int32_t>(isa), std::memory_order_relaxed);
  return true;
}

}  // namespace mamba
