// AVX2 with fused multiply-add.
#ifdef __x86_64__
#define BHFAST_ISA avx2
#define BHFAST_LANES 8
#include "shared_headers.h"
BHFAST_BEGIN_TARGET("avx2,fma")
#include "../cpu/kernels.h"
#include "../native/peak_flops.h"
#include "../native/step.h"
BHFAST_END_TARGET

namespace bhfast {
constinit const InstructionSet avx2_set{"avx2",
                                        [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); },
                                        cpu::avx2::kKernels, native::avx2::make_step, native::avx2::peak_flops};
}  // namespace bhfast
#endif
