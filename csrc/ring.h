// Where a record goes: a ring has `slots` slots, and every step divisible by `every` fills the next one.
#pragma once

#include <cstdint>

#include "adam.h"

namespace bhfast {

// The slot of `step`, counted from 1, or -1 if the step is not recorded. Slot 0 also holds record 0, the initial state.
BHFAST_INLINE int64_t slot_of(int64_t step, int64_t every, int64_t slots) {
  return step % every ? -1 : step / every % slots;
}

}  // namespace bhfast
