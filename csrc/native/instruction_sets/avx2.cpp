// AVX2 with fused multiply-add.
#ifdef __x86_64__
#define BHFAST_ISA avx2
#define BHFAST_LANES 8
#include "../standard.h"
#include "../update.h"
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#include "../peak.h"
#include "../step.h"
#pragma GCC pop_options

namespace bhfast::native {
const InstructionSet avx2_set{"avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); },
                              avx2::make_step, avx2::peak};
}  // namespace bhfast::native
#endif
