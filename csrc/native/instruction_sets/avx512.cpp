// AVX-512.
#ifdef __x86_64__
#define BHFAST_ISA avx512
#define BHFAST_LANES 16
#include "../standard.h"
#include "../update.h"
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512")
#include "../peak.h"
#include "../step.h"
#pragma GCC pop_options

namespace bhfast::native {
const InstructionSet avx512_set{"avx512",
                                [] {
                                  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
                                },
                                avx512::make_step, avx512::peak};
}  // namespace bhfast::native
#endif
