// Adam over a list of tensors in one launch.
#include "adam_pack.h"
#include "kernels.h"

namespace bhfast::cuda {
namespace {

constexpr int kThreads = 256;
template <class T>
constexpr int64_t kBlockElements = kThreads * Pack<T>::kSize;

struct Item {
  AdamTensors tensors;
  bool aligned;  // to kAccessBytes: all tensors, and every slot of every ring
};

template <class T, class Op, int N>
__global__ void __launch_bounds__(kThreads)
    adam_kernel(const __grid_constant__ List<Item, int, N> list, const __grid_constant__ StepScalars scalars) {
  const int index = list.find(blockIdx.x);
  const AdamTensors& t = list.items[index].tensors;
  const Coefficients c = scalars.device_coefficients ? *scalars.device_coefficients : scalars.coefficients;
  const float clip_coef = scalars.device_clip_coef ? *scalars.device_clip_coef : scalars.clip_coef;
  const int64_t slot = slot_of_step(scalars);

  const int64_t i = (blockIdx.x - list.first[index]) * kBlockElements<T> + threadIdx.x * Pack<T>::kSize;
  if (i >= t.numel) return;
  adam_pack<T, Op>(t, list.items[index].aligned, i, clip_coef, c, slot);
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
