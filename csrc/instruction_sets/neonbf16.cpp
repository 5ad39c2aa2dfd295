// NEON with dot products of bfloat16 (FEAT_BF16): Apple M2, Graviton 3, Grace, and later ones.
#ifdef __aarch64__
#define BHFAST_ISA neonbf16
#define BHFAST_LANES 4
#define BHFAST_NEON
#define BHFAST_BFLOAT16_DOT
#include "shared_headers.h"
#ifdef __APPLE__
#include <sys/sysctl.h>
#else
#include <sys/auxv.h>
#endif
BHFAST_BEGIN_TARGET("+bf16")
#include "../cpu/kernels.h"
#include "../native/peak_flops.h"
#include "../native/step.h"
BHFAST_END_TARGET

namespace bhfast {
namespace {

bool has_bf16() {
#ifdef __APPLE__
  int has = 0;
  size_t size = sizeof has;
  return sysctlbyname("hw.optional.arm.FEAT_BF16", &has, &size, nullptr, 0) == 0 && has;
#else
  constexpr unsigned long kHwcap2Bf16 = 1 << 14;  // <asm/hwcap.h>
  return getauxval(AT_HWCAP2) & kHwcap2Bf16;
#endif
}

}  // namespace

constinit const InstructionSet neonbf16_set{"neonbf16", has_bf16, cpu::neonbf16::kKernels, native::neonbf16::make_step,
                                            native::neonbf16::peak_flops};
}  // namespace bhfast
#endif
