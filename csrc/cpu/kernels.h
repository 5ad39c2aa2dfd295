// The CPU's kernels, each compiled for several instruction sets. All give the same bits; the best is chosen when
// loaded.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../tensors.h"
#include "ranges.h"

namespace bhfast::cpu {

constexpr int64_t kChunk = 4096;  // elements advanced before they are recorded: they stay in the first cache

// Elements [begin, end) of one step of Adam.
struct AdamRange {
  const AdamTensors& tensors;
  int64_t begin, end;
  Dtype dtype;
  Rounding rounding;
  const Coefficients& coefficients;
  float clip_coef;
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

// Copy elements [begin, end) to a slot of their rings.
void record(const AdamTensors&, int64_t begin, int64_t end, Dtype, int64_t slot);

// The parts of grad_norm: the sum of the squares of kNormBlock elements, for each block; the norm, of these sums.
inline int64_t norm_blocks(const Ranges<GradTensor>& grads) { return (grads.numel() + kNormBlock - 1) / kNormBlock; }
float sum_squares(const Ranges<GradTensor>&, int64_t block);
float norm_of(std::vector<float> sums);

// Whole operations, on torch's threads.
void adam(std::vector<AdamTensors>, Dtype, Rounding, const StepNumbers&);
float grad_norm(std::vector<GradTensor>);
void record(const std::vector<RecordTensor>&, const StepNumbers&);

}  // namespace bhfast::cpu
