// AVX-512.
#ifdef __x86_64__
#define BHFAST_ISA avx512
#define BHFAST_LANES 16
#include "shared_headers.h"
BHFAST_BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,fma", "prefer-vector-width=512")
#include "../cpu/kernels.h"
#include "../native/peak_flops.h"
#include "../native/step.h"
BHFAST_END_TARGET

namespace bhfast {
constinit const InstructionSet avx512_set{"avx512",
                                          [] {
                                            return __builtin_cpu_supports("avx512f") &&
                                                   __builtin_cpu_supports("avx512bw") &&
                                                   __builtin_cpu_supports("avx512dq") &&
                                                   __builtin_cpu_supports("avx512vl");
                                          },
                                          cpu::avx512::kKernels, native::avx512::make_step, native::avx512::peak_flops};
}  // namespace bhfast
#endif
