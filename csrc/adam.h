// The arithmetic of bhfast for one element, for the host and for CUDA devices.
//
// It follows bhfast/ops/arithmetic.py operation by operation. Each operation is IEEE 754 round-to-nearest-even in
// float32, fused multiply-adds are written as fmaf, and the compiler must neither contract nor reorder
// (-ffp-contract=off, -fmad=false).
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#ifdef __CUDACC__
#define BHFAST_INLINE __host__ __device__ __forceinline__
#else
#define BHFAST_INLINE inline __attribute__((always_inline))
#endif

namespace bhfast {

struct bfloat16 {
  uint16_t bits;
};

BHFAST_INLINE float to_float(float x) { return x; }

BHFAST_INLINE float to_float(bfloat16 x) { return __builtin_bit_cast(float, uint32_t{x.bits} << 16); }

// Round to the nearest value of T, ties to even.
template <class T>
BHFAST_INLINE float rounded(float x);

template <>
BHFAST_INLINE float rounded<float>(float x) {
  return x;
}

template <>
BHFAST_INLINE float rounded<bfloat16>(float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
#ifdef __CUDA_ARCH__
  // A GPU's NaN has all bits set, and would overflow below. A CPU's NaN has the bits of one of its operands, and the
  // lower half of any operand that can be NaN is zero here (see plain_nan), so a CPU needs no test.
  if (x != x) return __builtin_bit_cast(float, 0x7fc00000);
#endif
  return __builtin_bit_cast(float, (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000);
}

// Replace any NaN by the one whose lower half is zero.
BHFAST_INLINE float plain_nan(float x) { return x == x ? x : __builtin_bit_cast(float, 0x7fc00000); }

// Store a value that T can represent. (Only the bits are assigned: compilers do not vectorize copies of a struct.)
BHFAST_INLINE void store(float& to, float x) { to = x; }

BHFAST_INLINE void store(bfloat16& to, float x) {
  to.bits = static_cast<uint16_t>(__builtin_bit_cast(uint32_t, x) >> 16);
}

// The coefficients of one step, in the order of bhfast.ops.arithmetic.AdamCoefficients.
struct Coefficients {
  float decay;       // 1 - lr * weight_decay
  float bias2_sqrt;  // sqrt(1 - beta2^step)
  float step_size;   // -lr / (1 - beta1^step)
  float weight1;     // 1 - beta1
  float weight2;     // 1 - beta2
  float beta2;
  float eps;
};

// One step of AdamW on one element of tensors of T. Every operation rounds to Op: to bfloat16 for bfloat16 tensors with
// per-op rounding, to float otherwise. First the gradient is multiplied by clip_coef and rounded to T. kDecays may be
// false if c.decay is 1.
template <class T, class Op, bool kDecays = true>
BHFAST_INLINE void adam_element(T& param, const T& grad, T& exp_avg, T& exp_avg_sq, float clip_coef,
                                const Coefficients& c) {
  const auto round = rounded<Op>;
  const float g = rounded<T>(to_float(grad) * clip_coef);
  float p = to_float(param), m = to_float(exp_avg), v = to_float(exp_avg_sq);
  if constexpr (kDecays) p = round(p * c.decay);
  m = round(c.weight1 < 0.5f ? fmaf(c.weight1, g - m, m) : fmaf(1 - c.weight1, -(g - m), g));
  v = round(fmaf(c.weight2 * g, g, round(v * c.beta2)));
  const float denom = round(round(round(sqrtf(v)) / c.bias2_sqrt) + round(c.eps));
  p = round(p + c.step_size * m / denom);
  const auto result = [](float x) {
    if constexpr (std::is_same_v<T, Op>) return x;
    return rounded<T>(x);
  };
  store(param, result(p));
  store(exp_avg, result(m));
  store(exp_avg_sq, result(v));
}

// min(1, max_norm / (norm + 1e-6)), rounded to the gradients' dtype; NaN if the norm is. (fminf would ignore a NaN.)
BHFAST_INLINE float clip_coefficient(float norm, float max_norm, bool to_bfloat16) {
  const float ratio = max_norm / (norm + 1e-6f);
  const float coefficient = ratio > 1 ? 1 : plain_nan(ratio);
  return to_bfloat16 ? rounded<bfloat16>(coefficient) : coefficient;
}

}  // namespace bhfast
