// Any machine: vectors of four floats, which every compiler supports.
#define BHFAST_ISA portable
#define BHFAST_LANES 4
#include "../cpu/kernels.h"
#include "../native/peak_flops.h"
#include "../native/step.h"

namespace bhfast {
constinit const InstructionSet portable_set{"portable", [] { return true; }, cpu::portable::kKernels,
                                            native::portable::make_step, native::portable::peak_flops};
}  // namespace bhfast
