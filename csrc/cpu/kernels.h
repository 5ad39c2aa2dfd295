// The inner loops of the CPU's operations, compiled once for each instruction set: see instruction_sets/.
#pragma once

#include "../adam.h"
#include "../instruction_sets/shared_headers.h"

namespace bhfast::cpu::BHFAST_ISA {

template <class T, class Op, bool kDecays>
void adam_elements(const AdamRange& r) {
  T* __restrict param = static_cast<T*>(r.tensors.param);
  const T* __restrict grad = static_cast<const T*>(r.tensors.grad);
  T* __restrict exp_avg = static_cast<T*>(r.tensors.exp_avg);
  T* __restrict exp_avg_sq = static_cast<T*>(r.tensors.exp_avg_sq);
  const Coefficients c = r.coefficients;
  const float clip_coef = r.clip_coef;
  for (int64_t i = r.begin; i < r.end; ++i) {
    adam_element<T, Op, kDecays>(param[i], grad[i], exp_avg[i], exp_avg_sq[i], clip_coef, c);
  }
}

template <class T, class Op>
void adam_elements(const AdamRange& r) {
  if (r.coefficients.decay == 1) {
    adam_elements<T, Op, false>(r);
  } else {
    adam_elements<T, Op, true>(r);
  }
}

inline void adam(const AdamRange& r) {
  if (r.dtype == Dtype::float32) {
    adam_elements<float, float>(r);
  } else if (r.rounding == Rounding::per_op) {
    adam_elements<bfloat16, bfloat16>(r);
  } else {
    adam_elements<bfloat16, float>(r);
  }
}

template <class T>
void square_elements(const void* data, int64_t begin, int64_t count, float* __restrict out) {
  const T* __restrict x = static_cast<const T*>(data) + begin;
  for (int64_t i = 0; i < count; ++i) out[i] = to_float(x[i]) * to_float(x[i]);
}

inline void square(const GradTensor& grad, int64_t begin, int64_t count, float* out) {
  if (grad.dtype == Dtype::bfloat16) {
    square_elements<bfloat16>(grad.data, begin, count, out);
  } else {
    square_elements<float>(grad.data, begin, count, out);
  }
}

inline float sum_by_halving(float* x, int64_t width) {
  while (width > 1) {
    width /= 2;
    float* __restrict first = x;
    const float* __restrict second = x + width;
    for (int64_t i = 0; i < width; ++i) first[i] += second[i];
  }
  return x[0];
}

constexpr Kernels kKernels{adam, square, sum_by_halving};

}  // namespace bhfast::cpu::BHFAST_ISA
