// What an instruction set provides: a training step, of which every thread of a team runs its part.
#pragma once

#include <memory>

#include "engine.h"
#include "team.h"

namespace bhfast::native {

class Program {
 public:
  virtual ~Program() = default;
  // Run `step`, counted from 1. All threads of the team call it.
  virtual void step(Worker& worker, int64_t step) = 0;
};

struct InstructionSet {
  const char* name;
  bool (*runs_here)();
  std::unique_ptr<Program> (*make)(const Job& job, int threads);
  double (*peak)();  // see peak.h
};

// Those compiled for this kind of machine, best first; each is defined in instruction_sets/.
#ifdef __x86_64__
extern const InstructionSet avx512bf16_set, avx512_set, avx2_set;
#endif
extern const InstructionSet portable_set;

}  // namespace bhfast::native
