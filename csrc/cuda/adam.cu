// Adam over a list of tensors in one launch: clip, update, record. Each value is read once and each result written
// once.
#include "kernels.h"
#include "launch.h"

namespace bhfast::cuda {
namespace {

constexpr int kThreads = 256;
template <class T>
constexpr int64_t kBlockElements = kThreads * Pack<T>::kSize;

struct Item {
  AdamTensors tensors;
  bool aligned;  // to kAccessBytes: all tensors, and every slot of every ring
};

template <class T>
__device__ T* ring_at(void* ring, int64_t slot, int64_t numel, int64_t i) {
  return static_cast<T*>(ring) + slot * numel + i;
}

template <class T, class Op, int N>
__global__ void __launch_bounds__(kThreads)
    adam_kernel(const __grid_constant__ List<Item, int, N> list, const __grid_constant__ StepScalars scalars) {
  const int index = list.find(blockIdx.x);
  const AdamTensors& t = list.items[index].tensors;
  const Coefficients c = scalars.device_coefficients ? *scalars.device_coefficients : scalars.coefficients;
  const float clip_coef = scalars.device_clip_coef ? *scalars.device_clip_coef : scalars.clip_coef;
  const int64_t slot = slot_of_step(scalars);

  using P = Pack<T>;
  const int64_t i = (blockIdx.x - list.first[index]) * kBlockElements<T> + threadIdx.x * P::kSize;
  if (i >= t.numel) return;
  T* const param = static_cast<T*>(t.param) + i;
  const T* const grad = static_cast<const T*>(t.grad) + i;
  T* const exp_avg = static_cast<T*>(t.exp_avg) + i;
  T* const exp_avg_sq = static_cast<T*>(t.exp_avg_sq) + i;

  if (list.items[index].aligned && i + P::kSize <= t.numel) {
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

template <class T>
bool all_aligned(const AdamTensors& t) {
  bool aligned = is_aligned(t.param) && is_aligned(t.grad) && is_aligned(t.exp_avg) && is_aligned(t.exp_avg_sq);
  for (void* ring : t.rings)
    aligned = aligned && (!ring || (is_aligned(ring) && t.numel * sizeof(T) % kAccessBytes == 0));
  return aligned;
}

template <class T, class Op, int N>
void launch(const AdamTensors* tensors, int count, const StepScalars& scalars, cudaStream_t stream) {
  List<Item, int, N> list;
  list.count = count;
  list.first[0] = 0;
  for (int i = 0; i < count; ++i) {
    list.items[i] = {tensors[i], all_aligned<T>(tensors[i])};
    const int64_t blocks = (tensors[i].numel + kBlockElements<T> - 1) / kBlockElements<T>;
    list.first[i + 1] = list.first[i] + static_cast<int>(blocks);
  }
  if (list.first[count] == 0) return;
  adam_kernel<T, Op, N><<<list.first[count], kThreads, 0, stream>>>(list, scalars);
  check_launch("the Adam kernel");
}

constexpr int kMaxTensors = 340;  // as many as fit into a kernel's arguments, with the scalars

template <class T, class Op>
void launch_all(const std::vector<AdamTensors>& tensors, const StepScalars& scalars, cudaStream_t stream) {
  static_assert(sizeof(List<Item, int, kMaxTensors>) + sizeof(StepScalars) <= kMaxArgumentBytes);
  for (size_t begin = 0; begin < tensors.size(); begin += kMaxTensors) {
    const int count = static_cast<int>(std::min(tensors.size() - begin, size_t{kMaxTensors}));
    const auto launch_list = count <= kShortList ? launch<T, Op, kShortList> : launch<T, Op, kMaxTensors>;
    launch_list(&tensors[begin], count, scalars, stream);
  }
}

}  // namespace

void adam(const std::vector<AdamTensors>& tensors, Dtype dtype, Rounding rounding, const StepScalars& scalars,
          cudaStream_t stream) {
  if (dtype == Dtype::float32) {
    launch_all<float, float>(tensors, scalars, stream);
  } else if (rounding == Rounding::per_op) {
    launch_all<bfloat16, bfloat16>(tensors, scalars, stream);
  } else {
    launch_all<bfloat16, float>(tensors, scalars, stream);
  }
}

}  // namespace bhfast::cuda
