// Which instruction set the CPU kernels use, chosen at run time.
#pragma once

#include <cstdint>

namespace mamba {

enum class Isa : int32_t { kBaseline = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kAvx512Amx = 4 };
constexpr int kIsaCount = 5;

// The best one that this machine has, or the one that was forced.
Isa current_isa();

// Forces one by name ("baseline", "avx2", "avx512", "avx512_bf16", "avx512_amx"; "" or "auto"
// undoes it). False, and nothing changes, if there is no such name or this machine lacks it.
bool force_isa(const char* name);

const char* isa_name(Isa isa);
bool isa_available(Isa isa);

}  // namespace mamba

// Where kernels are compiled per instruction set: MAMBA_FOR_ISA(name, arguments) calls
// mamba::<isa>::name(arguments) of the current one. kAvx512Bf16 and kAvx512Amx run the AVX-512 code
// unless the file is compiled for them as well (see MAMBA_FOR_ISA_BF16).
#if defined(__x86_64__)
#define MAMBA_FOR_ISA(name, ...)          \
  switch (::mamba::current_isa()) {       \
    case ::mamba::Isa::kAvx512Amx:        \
    case ::mamba::Isa::kAvx512Bf16:       \
    case ::mamba::Isa::kAvx512:           \
      return avx512::name(__VA_ARGS__);   \
    case ::mamba::Isa::kAvx2:             \
      return avx2::name(__VA_ARGS__);     \
    default:                              \
      return baseline::name(__VA_ARGS__); \
  }
#define MAMBA_DECLARE_ISA(declaration) \
  namespace baseline {                 \
  declaration;                         \
  }                                    \
  namespace avx2 {                     \
  declaration;                         \
  }                                    \
  namespace avx512 {                   \
  declaration;                         \
  }
#else
#define MAMBA_FOR_ISA(name, ...) return baseline::name(__VA_ARGS__);
#define MAMBA_DECLARE_ISA(declaration) \
  namespace baseline {                 \
  declaration;                         \
  }
#endif

// The same for files named *.isa_bf16.cpp, which are compiled for those two as well.
#if defined(__x86_64__)
#define MAMBA_FOR_ISA_BF16(name, ...)        \
  switch (::mamba::current_isa()) {          \
    case ::mamba::Isa::kAvx512Amx:           \
      return avx512_amx::name(__VA_ARGS__);  \
    case ::mamba::Isa::kAvx512Bf16:          \
      return avx512_bf16::name(__VA_ARGS__); \
    case ::mamba::Isa::kAvx512:              \
      return avx512::name(__VA_ARGS__);      \
    case ::mamba::Isa::kAvx2:                \
      return avx2::name(__VA_ARGS__);        \
    default:                                 \
      return baseline::name(__VA_ARGS__);    \
  }
#define MAMBA_DECLARE_ISA_BF16(declaration) \
  MAMBA_DECLARE_ISA(declaration)            \
  namespace avx512_bf16 {                   \
  declaration;                              \
  }                                         \
  namespace avx512_amx {                    \
  declaration;                              \
  }
#else
#define MAMBA_FOR_ISA_BF16(name, ...) MAMBA_FOR_ISA(name, __VA_ARGS__)
#define MAMBA_DECLARE_ISA_BF16(declaration) MAMBA_DECLARE_ISA(declaration)
#endif
