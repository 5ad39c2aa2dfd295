// The operations on the CPU: whole, and in parts that the native engine's threads divide among themselves.
#pragma once

#include <cstdint>
#include <vector>

#include "../tensors.h"
#include "flat_tensors.h"

namespace bhfast::cpu {

// Whole operations, on torch's threads.
void adam(std::vector<AdamTensors>, Dtype, Rounding, const StepScalars&);
float grad_norm(std::vector<GradTensor>);
void record(const std::vector<RecordTensor>&, const StepScalars&);

// Several steps of Adam on one tensor, from given gradients. The states after the steps from `first` on are recorded.
struct AdamSteps {
  void* param;
  void* exp_avg;
  void* exp_avg_sq;
  const void* grads;  // [steps, numel], each step contiguous
  int64_t grad_stride;
  int64_t numel;
  int64_t steps;
  int64_t first;
  void* records[3];                  // of param, exp_avg, exp_avg_sq: each [steps - first, numel], or null
  const Coefficients* coefficients;  // [steps]
  const float* clip_coefs;           // [steps]
  const bool* updated;               // [steps]: false if a step changes nothing
};
void adam_steps(const AdamSteps&, Dtype, Rounding);

// Elements that Adam updates before they are recorded: few enough to stay in the L1 cache.
constexpr int64_t kChunk = 4096;

// Copy elements [begin, end) to a slot of their rings.
void record(const AdamTensors&, int64_t begin, int64_t end, Dtype, int64_t slot);

// The parts of grad_norm: the sum of squares of each block of kNormBlock elements, and the norm from these sums.
inline int64_t norm_blocks(const FlatTensors<GradTensor>& grads) {
  return (grads.numel() + kNormBlock - 1) / kNormBlock;
}
float sum_squares(const FlatTensors<GradTensor>&, int64_t block);
float norm_from_sums(std::vector<float> sums);

}  // namespace bhfast::cpu
