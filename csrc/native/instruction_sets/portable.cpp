// Any machine: vectors of four floats, which compilers have everywhere.
#define BHFAST_ISA portable
#define BHFAST_LANES 4
#include "../peak.h"
#include "../step.h"

namespace bhfast::native {
const InstructionSet portable_set{"portable", [] { return true; }, portable::make_step, portable::peak};
}  // namespace bhfast::native
