// The CPU's operations over lists of tensors, on torch's threads.
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "../ring.h"
#include "kernels.h"

namespace bhfast::cpu {
namespace {

constexpr int64_t kNormBlock = 1024;  // _ops.NORM_BLOCK
constexpr int64_t kGrain = 1 << 16;   // elements below which another thread costs more than it saves

// Call visit(index, begin, end) for each tensor's share of elements [begin, end), counted through all tensors in order.
template <class Tensors, class Visit>
void visit_range(const Tensors& tensors, const std::vector<int64_t>& starts, int64_t begin, int64_t end, Visit visit) {
  size_t i = std::upper_bound(starts.begin(), starts.end(), begin) - starts.begin() - 1;
  for (; i < tensors.size() && starts[i] < end; ++i) {
    const int64_t first = std::max(begin - starts[i], int64_t{0});
    const int64_t last = std::min(end - starts[i], tensors[i].numel);
    if (first < last) visit(tensors[i], first, last);
  }
}

template <class Tensors>
std::vector<int64_t> starts_of(const Tensors& tensors) {  // [n + 1]
  std::vector<int64_t> starts{0};
  for (const auto& tensor : tensors) starts.push_back(starts.back() + tensor.numel);
  return starts;
}

}  // namespace

void adam(const std::vector<AdamTensors>& tensors, Dtype dtype, Rounding rounding, const StepNumbers& n) {
  const int64_t slot = n.slots ? slot_of(n.step, n.every, n.slots) : -1;
  const std::vector<int64_t> starts = starts_of(tensors);
  at::parallel_for(0, starts.back(), kGrain, [&](int64_t begin, int64_t end) {
    visit_range(tensors, starts, begin, end, [&](const AdamTensors& t, int64_t first, int64_t last) {
      kernels().adam({t, first, last, dtype, rounding, n.coefficients, n.clip_coef, slot});
    });
  });
}

float grad_norm(const std::vector<GradTensor>& grads) {
  const std::vector<int64_t> starts = starts_of(grads);
  std::vector<float> sums((starts.back() + kNormBlock - 1) / kNormBlock);
  at::parallel_for(0, sums.size(), kGrain / kNormBlock, [&](int64_t begin, int64_t end) {
    alignas(64) float x[kNormBlock];
    for (int64_t block = begin; block < end; ++block) {
      int64_t filled = 0;
      visit_range(grads, starts, block * kNormBlock, (block + 1) * kNormBlock,
                  [&](const GradTensor& grad, int64_t first, int64_t last) {
                    kernels().square(grad, first, last - first, x + filled);
                    filled += last - first;
                  });
      std::fill(x + filled, x + kNormBlock, 0.0f);
      sums[block] = kernels().halve(x, kNormBlock);
    }
  });
  while (sums.size() > 1) {
    int64_t width = 1;
    while (width < kNormBlock && width < static_cast<int64_t>(sums.size())) width *= 2;
    const int64_t blocks = (sums.size() + width - 1) / width;
    sums.resize(blocks * width);
    for (int64_t block = 0; block < blocks; ++block) sums[block] = kernels().halve(&sums[block * width], width);
    sums.resize(blocks);
  }
  return std::sqrt(sums.empty() ? 0.0f : sums[0]);
}

void record(const std::vector<RecordTensor>& records, const StepNumbers& n) {
  const int64_t slot = slot_of(n.step, n.every, n.slots);
  if (slot < 0) return;
  for (const RecordTensor& r : records) std::memcpy(static_cast<char*>(r.ring) + slot * r.bytes, r.data, r.bytes);
}

}  // namespace bhfast::cpu
