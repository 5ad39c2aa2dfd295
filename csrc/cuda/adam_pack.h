// Adam on a few adjacent elements, as many as a thread reads at once: clip, update, record. Each value is read once and
// each result written once.
#pragma once

#include "launch.h"

namespace bhfast::cuda {

template <class T>
__device__ T* ring_at(void* ring, int64_t slot, int64_t numel, int64_t i) {
  return static_cast<T*>(ring) + slot * numel + i;
}

// Elements from i on, but none beyond the tensor. aligned: to kAccessBytes, all tensors and every slot of every ring.
// slot: where to record; negative if the step is not recorded.
template <class T, class Op>
__device__ void adam_pack(const AdamTensors& t, bool aligned, int64_t i, float clip_coef, const Coefficients& c,
                          int64_t slot) {
  using P = Pack<T>;
  T* const param = static_cast<T*>(t.param) + i;
  const T* const grad = static_cast<const T*>(t.grad) + i;
  T* const exp_avg = static_cast<T*>(t.exp_avg) + i;
  T* const exp_avg_sq = static_cast<T*>(t.exp_avg_sq) + i;

  if (aligned && i + P::kSize <= t.numel) {
    P p = *reinterpret_cast<const P*>(param), m = *reinterpret_cast<const P*>(exp_avg);
    P v = *reinterpret_cast<const P*>(exp_avg_sq);
    const P g = *reinterpret_cast<const P*>(grad);
#pragma unroll
    for (int k = 0; k < P::kSize; ++k) {
      adam_element<T, Op>(p.x[k], g.x[k], m.x[k], v.x[k], clip_coef, c);
    }
    *reinterpret_cast<P*>(param) = p;
    *reinterpret_cast<P*>(exp_avg) = m;
    *reinterpret_cast<P*>(exp_avg_sq) = v;
    if (slot < 0) return;
    const P* const values[kFields] = {&p, &g, &m, &v};
#pragma unroll
    for (int field = 0; field < kFields; ++field) {
      if (!t.rings[field]) continue;
      // A streaming store, because the kernel does not read it again; as uint4, because the compiler would split a P.
      __stcs(reinterpret_cast<uint4*>(ring_at<T>(t.rings[field], slot, t.numel, i)),
             __builtin_bit_cast(uint4, *values[field]));
    }
    return;
  }
  for (int k = 0; k < P::kSize && i + k < t.numel; ++k) {
    adam_element<T, Op>(param[k], grad[k], exp_avg[k], exp_avg_sq[k], clip_coef, c);
    const T values[kFields] = {param[k], grad[k], exp_avg[k], exp_avg_sq[k]};
    if (slot < 0) continue;
#pragma unroll
    for (int field = 0; field < kFields; ++field) {
      if (t.rings[field]) *ring_at<T>(t.rings[field], slot, t.numel, i + k) = values[field];
    }
  }
}

}  // namespace bhfast::cuda
