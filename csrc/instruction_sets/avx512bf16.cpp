// AVX-512 with dot products of bfloat16.
#ifdef __x86_64__
#define BHFAST_ISA avx512bf16
#define BHFAST_LANES 16
#define BHFAST_BFLOAT16_DOT
#include "shared_headers.h"
BHFAST_BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma", "prefer-vector-width=512")
#include "../cpu/kernels.h"
#include "../native/peak_flops.h"
#include "../native/step.h"
BHFAST_END_TARGET

namespace bhfast {
constinit const InstructionSet avx512bf16_set{
    "avx512bf16",
    [] {
      return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    },
    cpu::avx512bf16::kKernels, native::avx512bf16::make_step, native::avx512bf16::peak_flops};
}  // namespace bhfast
#endif
