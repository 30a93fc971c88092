// What Python reads and sets of the instruction set, through ctypes.
#include "../cpu_isa.h"

#define MAMBA_EXPORT extern "C" __attribute__((visibility("default")))

// The name of the instruction set in use.
MAMBA_EXPORT const char* mamba_ssm_cpu_isa() { return mamba::isa_name(mamba::current_isa()); }

// The name of instruction set i if this machine has it, "" if not, null past the last.
MAMBA_EXPORT const char* mamba_ssm_available_cpu_isa(int i) {
  if (i < 0 || i >= mamba::kIsaCount) return nullptr;
  const auto isa = static_cast<mamba::Isa>(i);
  return mamba::isa_available(isa) ? mamba::isa_name(isa) : "";
}

MAMBA_EXPORT int mamba_ssm_force_cpu_isa(const char* name) { return mamba::force_isa(name); }
