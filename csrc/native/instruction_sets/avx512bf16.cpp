// AVX-512 with products of bfloat16.
#ifdef __x86_64__
#define BHFAST_ISA avx512bf16
#define BHFAST_LANES 16
#define BHFAST_BFLOAT16_DOT
#include "../standard.h"
#include "../update.h"
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,prefer-vector-width=512")
#include "../peak.h"
#include "../step.h"
#pragma GCC pop_options

namespace bhfast::native {
const InstructionSet avx512bf16_set{"avx512bf16",
                                    [] {
                                      return __builtin_cpu_supports("avx512bf16") &&
                                             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                                             __builtin_cpu_supports("avx512vl");
                                    },
                                    avx512bf16::make_step, avx512bf16::peak};
}  // namespace bhfast::native
#endif
