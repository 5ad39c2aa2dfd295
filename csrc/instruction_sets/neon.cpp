// NEON, which every 64-bit ARM has: vectors of four floats as in the portable code, with fused multiply-add.
#ifdef __aarch64__
#define BHFAST_ISA neon
#define BHFAST_LANES 4
#define BHFAST_NEON
#include "../cpu/kernels.h"
#include "../native/peak_flops.h"
#include "../native/step.h"

namespace bhfast {
constinit const InstructionSet neon_set{"neon", [] { return true; }, cpu::neon::kKernels, native::neon::make_step,
                                        native::neon::peak_flops};
}  // namespace bhfast
#endif
