// Any machine: vectors of four floats, which compilers have everywhere.
#define BHFAST_ISA portable
#define BHFAST_LANES 4
#include "../step.h"

namespace bhfast::native {
const InstructionSet portable_set{"portable", [] { return true; }, portable::make_step};
}  // namespace bhfast::native
