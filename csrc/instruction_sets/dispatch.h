// The CPU code is compiled once for each instruction set: see the files in this folder. The one to run is chosen here,
// when the extension is loaded.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "../tensors.h"

namespace bhfast::native {
class TrainingStep;
}

namespace bhfast {

struct TrainingRun;

// Elements [begin, end) of one step of Adam.
struct AdamRange {
  const AdamTensors& tensors;
  int64_t begin, end;
  Dtype dtype;
  Rounding rounding;
  const Coefficients& coefficients;
  float clip_coef;
};

// The inner loops of the operations. Every instruction set gives the same bits.
struct Kernels {
  void (*adam)(const AdamRange&);
  // out[i] = grad[begin + i]^2 in float32
  void (*square)(const GradTensor& grad, int64_t begin, int64_t count, float* out);
  // The sum of `width` values, a power of two, by adding the second half to the first until one is left. Overwrites x.
  float (*sum_by_halving)(float* x, int64_t width);
};

struct InstructionSet {
  const char* name;
  bool (*runs_here)();
  Kernels kernels;
  // The native engine's step, whose bits depend on the instruction set: see native/step.h and native/peak_flops.h.
  std::unique_ptr<native::TrainingStep> (*make_step)(const TrainingRun& run, int threads);
  double (*peak_flops)();
};

#ifdef __x86_64__
extern const InstructionSet amx_set, avx512bf16_set, avx512_set, avx2_set;
#endif
#ifdef __aarch64__
extern const InstructionSet neonbf16_set, neon_set;
#endif
extern const InstructionSet portable_set;

// The names of the instruction sets that this machine supports, fastest first.
std::vector<std::string> instruction_sets();

// Throws std::invalid_argument if this machine does not support it.
const InstructionSet& find_instruction_set(const std::string& name);

// The instruction set whose kernels the operations use: the fastest, unless another was chosen.
const InstructionSet& current_instruction_set();
void use_instruction_set(const std::string& name);

}  // namespace bhfast
