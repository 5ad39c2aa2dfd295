#include "operations.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "../instruction_sets/dispatch.h"
#include "../ring.h"
#include "parallel.h"

namespace bhfast::cpu {
namespace {

constexpr int64_t kGrain = 1 << 16;  // elements; with fewer, another thread costs more than it saves

// The scalars of a step may hold a NaN of any bits.
Coefficients with_plain_nans(const Coefficients& c) {
  return {plain_nan(c.decay),   plain_nan(c.bias2_sqrt), plain_nan(c.step_size), plain_nan(c.weight1),
          plain_nan(c.weight2), plain_nan(c.beta2),      plain_nan(c.eps)};
}

const Kernels& kernels() { return current_instruction_set().kernels; }

}  // namespace

void adam(std::vector<AdamTensors> tensors, Dtype dtype, Rounding rounding, const StepScalars& s) {
  const Coefficients coefficients = with_plain_nans(s.coefficients);
  const float clip_coef = plain_nan(s.clip_coef);
  const int64_t slot = s.slots ? slot_of(s.step, s.every, s.slots) : -1;
  const FlatTensors<AdamTensors> all(std::move(tensors));
  parallel_for(all.numel(), kGrain, [&](int64_t begin, int64_t end) {
    all.visit(begin, end, [&](const AdamTensors& t, int64_t first, int64_t last) {
      for (int64_t chunk = first; chunk < last; chunk += kChunk) {
        const int64_t chunk_end = std::min(chunk + kChunk, last);
        kernels().adam({t, chunk, chunk_end, dtype, rounding, coefficients, clip_coef});
        if (slot >= 0) record(t, chunk, chunk_end, dtype, slot);
      }
    });
  });
}

void record(const AdamTensors& t, int64_t begin, int64_t end, Dtype dtype, int64_t slot) {
  const int64_t itemsize = dtype == Dtype::bfloat16 ? 2 : 4;
  const void* const sources[kFields] = {t.param, t.grad, t.exp_avg, t.exp_avg_sq};
  for (int field = 0; field < kFields; ++field) {
    if (!t.rings[field]) continue;
    const char* from = static_cast<const char*>(sources[field]) + begin * itemsize;
    char* to = static_cast<char*>(t.rings[field]) + (slot * t.numel + begin) * itemsize;
    std::memcpy(to, from, (end - begin) * itemsize);
  }
}

void adam_steps(const AdamSteps& s, Dtype dtype, Rounding rounding) {
  const int64_t itemsize = dtype == Dtype::bfloat16 ? 2 : 4;
  std::vector<Coefficients> coefficients(s.steps);
  std::transform(s.coefficients, s.coefficients + s.steps, coefficients.begin(), with_plain_nans);
  const void* const state[3] = {s.param, s.exp_avg, s.exp_avg_sq};
  const int64_t grain = std::max(kChunk / 2, kGrain / std::max(s.steps, int64_t{1}));
  parallel_for(s.numel, grain, [&](int64_t from, int64_t to) {
    for (int64_t begin = from; begin < to; begin += kChunk / 2) {  // half: the gradients of all steps pass by
      const int64_t end = std::min(begin + kChunk / 2, to);
      for (int64_t i = 0; i < s.steps; ++i) {
        const char* grad = static_cast<const char*>(s.grads) + i * s.grad_stride * itemsize;
        const AdamTensors tensors{s.param, grad, s.exp_avg, s.exp_avg_sq, {}, s.numel};
        if (s.updated[i]) {
          kernels().adam({tensors, begin, end, dtype, rounding, coefficients[i], plain_nan(s.clip_coefs[i])});
        }
        for (int field = 0; i >= s.first && field < 3; ++field) {
          if (!s.records[field]) continue;
          const char* value = static_cast<const char*>(state[field]) + begin * itemsize;
          char* record = static_cast<char*>(s.records[field]) + ((i - s.first) * s.numel + begin) * itemsize;
          std::memcpy(record, value, (end - begin) * itemsize);
        }
      }
    }
  });
}

float sum_squares(const FlatTensors<GradTensor>& grads, int64_t block) {
  alignas(64) float x[kNormBlock];
  int64_t filled = 0;
  grads.visit(block * kNormBlock, (block + 1) * kNormBlock, [&](const GradTensor& grad, int64_t first, int64_t last) {
    kernels().square(grad, first, last - first, x + filled);
    filled += last - first;
  });
  std::fill(x + filled, x + kNormBlock, 0.0f);
  return kernels().sum_by_halving(x, kNormBlock);
}

float norm_from_sums(std::vector<float> sums) {
  while (sums.size() > 1) {
    int64_t width = 1;
    while (width < kNormBlock && width < static_cast<int64_t>(sums.size())) width *= 2;
    const int64_t blocks = (sums.size() + width - 1) / width;
    sums.resize(blocks * width);
    for (int64_t block = 0; block < blocks; ++block) {
      sums[block] = kernels().sum_by_halving(&sums[block * width], width);
    }
    sums.resize(blocks);
  }
  return std::sqrt(sums.empty() ? 0.0f : sums[0]);
}

float grad_norm(std::vector<GradTensor> grads) {
  const FlatTensors<GradTensor> all(std::move(grads));
  std::vector<float> sums(norm_blocks(all));
  parallel_for(sums.size(), kGrain / kNormBlock, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) sums[block] = sum_squares(all, block);
  });
  return norm_from_sums(std::move(sums));
}

void record(const std::vector<RecordTensor>& records, const StepScalars& s) {
  const int64_t slot = slot_of(s.step, s.every, s.slots);
  if (slot < 0) return;
  for (const RecordTensor& r : records) std::memcpy(static_cast<char*>(r.ring) + slot * r.bytes, r.data, r.bytes);
}

}  // namespace bhfast::cpu
