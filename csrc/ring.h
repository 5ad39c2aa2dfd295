// Where a record goes: in a ring of `slots` records, written one after the other, at every step divisible by `every`.
#pragma once

#include <cstdint>

#include "adam.h"

namespace bhfast {

// Return the slot of a step counted from 1, or -1 if the step is not recorded. Record 0, the start, has slot 0.
BHFAST_INLINE int64_t slot_of(int64_t step, int64_t every, int64_t slots) {
  return step % every ? -1 : step / every % slots;
}

}  // namespace bhfast
