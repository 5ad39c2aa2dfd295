// The arguments of every device's kernels: raw pointers to contiguous tensors, and the scalars of a step.
#pragma once

#include <cstdint>

#include "adam.h"

namespace bhfast {

enum class Dtype { bfloat16, float32 };
enum class Rounding { per_op, opmath };

constexpr int kFields = 4;  // param, grad, exp_avg, exp_avg_sq: the order of bhfast.ops.checks.FIELDS

constexpr int64_t kNormBlock = 1024;  // squares that a gradient norm sums together: bhfast.ops.arithmetic.NORM_BLOCK

constexpr int64_t kCoefficientCount = sizeof(Coefficients) / sizeof(float);

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

// The scalars of a step. Where a pointer is not null, it points to device memory and replaces the value below it.
struct StepScalars {
  const Coefficients* device_coefficients;
  Coefficients coefficients;
  const float* device_clip_coef;
  float clip_coef;
  const int64_t* device_step;
  int64_t step;
  int64_t every;
  int64_t slots;
};

}  // namespace bhfast
