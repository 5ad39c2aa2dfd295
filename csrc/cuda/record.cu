// Copies of tensors of any dtype into the slot of a step.
#include <algorithm>

#include "kernels.h"
#include "launch.h"

namespace bhfast::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kBlockBytes = kAccessBytes * kThreads;

struct Item {
  RecordTensor tensor;
  bool aligned;  // to kAccessBytes: the tensor, and every slot of the ring
};

template <class Unit>
__device__ void copy(const RecordTensor& t, int64_t slot, int64_t begin, int64_t end) {
  const char* const from = static_cast<const char*>(t.data);
  char* const to = static_cast<char*>(t.ring) + slot * t.bytes;
  for (int64_t i = begin + threadIdx.x * sizeof(Unit); i < end; i += kThreads * sizeof(Unit)) {
    *reinterpret_cast<Unit*>(to + i) = *reinterpret_cast<const Unit*>(from + i);
  }
}

__global__ void __launch_bounds__(kThreads) record_kernel(const __grid_constant__ List<Item, int, kShortList> list,
                                                          const __grid_constant__ StepScalars scalars) {
  const int64_t slot = slot_of_step(scalars);
  if (slot < 0) return;
  const int index = list.find(blockIdx.x);
  const RecordTensor& t = list.items[index].tensor;
  const int64_t begin = (blockIdx.x - list.first[index]) * kBlockBytes;
  const int64_t end = min(begin + kBlockBytes, t.bytes);
  if (list.items[index].aligned) {
    copy<int4>(t, slot, begin, end);
  } else {
    copy<char>(t, slot, begin, end);
  }
}

void launch(const RecordTensor* tensors, int count, const StepScalars& scalars, cudaStream_t stream) {
  List<Item, int, kShortList> list;
  list.count = count;
  list.first[0] = 0;
  for (int i = 0; i < count; ++i) {
    const RecordTensor& t = tensors[i];
    list.items[i] = {t, is_aligned(t.data) && is_aligned(t.ring) && t.bytes % kAccessBytes == 0};
    list.first[i + 1] = list.first[i] + static_cast<int>((t.bytes + kBlockBytes - 1) / kBlockBytes);
  }
  if (list.first[count] == 0) return;
  record_kernel<<<list.first[count], kThreads, 0, stream>>>(list, scalars);
  check_launch("the record kernel");
}

}  // namespace

void record(const std::vector<RecordTensor>& tensors, const StepScalars& scalars, cudaStream_t stream) {
  for (size_t begin = 0; begin < tensors.size(); begin += kShortList) {
    launch(&tensors[begin], static_cast<int>(std::min(tensors.size() - begin, size_t{kShortList})), scalars, stream);
  }
}

}  // namespace bhfast::cuda
