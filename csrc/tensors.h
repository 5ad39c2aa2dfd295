// What the kernels of every device are handed: raw pointers to contiguous tensors, and the numbers of one step.
#pragma once

#include <cstdint>

#include "adam.h"

namespace bhfast {

enum class Dtype { bfloat16, float32 };
enum class Rounding { per_op, opmath };

constexpr int kFields = 4;  // param, grad, exp_avg, exp_avg_sq: the order of bhfast.ops.checks.FIELDS

constexpr int64_t kNormBlock = 1024;  // squares summed as one by a gradient norm: bhfast.ops.arithmetic.NORM_BLOCK

struct AdamTensors {
  void* param;
  const void* grad;
  void* exp_avg;
  void* exp_avg_sq;
  void* rings[kFields];  // each [slots, numel], or null
  int64_t numel;
};

struct GradTensor {
  const void* data;
  Dtype dtype;
  int64_t numel;
};

struct RecordTensor {
  const void* data;
  void* ring;  // [slots, bytes]
  int64_t bytes;
};

// The numbers of a step. The pointers, where not null, are to the device's memory and stand for the value beside them.
struct StepNumbers {
  const Coefficients* coefficients_at;
  Coefficients coefficients;
  const float* clip_coef_at;
  float clip_coef;
  const int64_t* step_at;
  int64_t step;
  int64_t every;
  int64_t slots;
};

}  // namespace bhfast
