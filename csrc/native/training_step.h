// A training step that a pool of threads runs together. Each instruction set has its own: see instruction_sets/.
#pragma once

#include <cstdint>

#include "worker.h"

namespace bhfast::native {

class TrainingStep {
 public:
  virtual ~TrainingStep() = default;
  // Run this worker's share of `step`, counted from 1. Every thread of the pool calls it.
  virtual void run(Worker& worker, int64_t step) = 0;
};

}  // namespace bhfast::native
