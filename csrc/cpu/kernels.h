// The CPU's kernels, each compiled for several instruction sets. All give the same bits; the best is chosen when
// loaded.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../tensors.h"

namespace bhfast::cpu {

// Elements [begin, end) of one step of Adam. Records go to their slot when the elements are done.
struct AdamRange {
  const AdamTensors& tensors;
  int64_t begin, end;
  Dtype dtype;
  Rounding rounding;
  const Coefficients& coefficients;
  float clip_coef;
  int64_t slot;  // -1: the step is not recorded
};

struct Kernels {
  const char* name;
  bool (*runs_here)();
  void (*adam)(const AdamRange&);
  // out[i] = grad[begin + i]^2 in float32
  void (*square)(const GradTensor& grad, int64_t begin, int64_t count, float* out);
  // The sum of `width` values, a power of two, by adding the second half to the first until one is left. Writes to x.
  float (*halve)(float* x, int64_t width);
};

std::vector<std::string> instruction_sets();  // those that run here, best first
const Kernels& kernels();                     // those in use
void use_instruction_set(const std::string& name);

void adam(const std::vector<AdamTensors>&, Dtype, Rounding, const StepNumbers&);
float grad_norm(const std::vector<GradTensor>&);
void record(const std::vector<RecordTensor>&, const StepNumbers&);

}  // namespace bhfast::cpu
