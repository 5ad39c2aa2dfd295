#include "kernels.h"

#include <stdexcept>

namespace bhfast::cpu {
namespace {

template <class T, class Op, bool kDecays>
BHFAST_INLINE void adam_elements(const AdamRange& r) {
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
BHFAST_INLINE void adam_elements(const AdamRange& r) {
  if (r.coefficients.decay == 1) {
    adam_elements<T, Op, false>(r);
  } else {
    adam_elements<T, Op, true>(r);
  }
}

BHFAST_INLINE void adam_range(const AdamRange& r) {
  if (r.dtype == Dtype::float32) {
    adam_elements<float, float>(r);
  } else if (r.rounding == Rounding::per_op) {
    adam_elements<bfloat16, bfloat16>(r);
  } else {
    adam_elements<bfloat16, float>(r);
  }
}

template <class T>
BHFAST_INLINE void squares(const void* data, int64_t begin, int64_t count, float* __restrict out) {
  const T* __restrict x = static_cast<const T*>(data) + begin;
  for (int64_t i = 0; i < count; ++i) out[i] = to_float(x[i]) * to_float(x[i]);
}

BHFAST_INLINE void square_range(const GradTensor& grad, int64_t begin, int64_t count, float* out) {
  if (grad.dtype == Dtype::bfloat16) {
    squares<bfloat16>(grad.data, begin, count, out);
  } else {
    squares<float>(grad.data, begin, count, out);
  }
}

BHFAST_INLINE float halve_range(float* x, int64_t width) {
  while (width > 1) {
    width /= 2;
    float* __restrict first = x;
    const float* __restrict second = x + width;
    for (int64_t i = 0; i < width; ++i) first[i] += second[i];
  }
  return x[0];
}

// One set of kernels per instruction set: the same code, inlined into functions that may use other instructions.
#define BHFAST_KERNELS(name, target)                                                            \
  target void adam_##name(const AdamRange& r) { adam_range(r); }                                \
  target void square_##name(const GradTensor& grad, int64_t begin, int64_t count, float* out) { \
    square_range(grad, begin, count, out);                                                      \
  }                                                                                             \
  target float halve_##name(float* x, int64_t width) { return halve_range(x, width); }

BHFAST_KERNELS(portable, )
#ifdef __x86_64__
BHFAST_KERNELS(avx2, __attribute__((target("avx2,fma"))))
BHFAST_KERNELS(avx512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512"))))
#endif

const Kernels kAll[] = {
#ifdef __x86_64__
    {"avx512",
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
     },
     adam_avx512, square_avx512, halve_avx512},
    {"avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }, adam_avx2, square_avx2,
     halve_avx2},
#endif
    {"portable", [] { return true; }, adam_portable, square_portable, halve_portable},
};

const Kernels* best() {
  for (const Kernels& k : kAll) {
    if (k.runs_here()) return &k;
  }
  return nullptr;
}

const Kernels* in_use = best();

}  // namespace

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Kernels& k : kAll) {
    if (k.runs_here()) names.emplace_back(k.name);
  }
  return names;
}

const Kernels& kernels() { return *in_use; }

void use_instruction_set(const std::string& name) {
  for (const Kernels& k : kAll) {
    if (name == k.name && k.runs_here()) {
      in_use = &k;
      return;
    }
  }
  std::string there;
  for (const std::string& other : instruction_sets()) there += (there.empty() ? "" : ", ") + other;
  throw std::invalid_argument("name must be an instruction set of this machine (" + there + "), got '" + name + "'");
}

}  // namespace bhfast::cpu
