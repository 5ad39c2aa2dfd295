#include "update.h"

#include <cmath>
#include <cstring>

#include "../ring.h"

namespace bhfast::native {
namespace {

std::vector<GradTensor> gradients(const Job& job) {
  std::vector<GradTensor> grads;
  for (const Group& group : job.groups) {
    for (const AdamTensors& t : group.tensors) grads.push_back({t.grad, Dtype::bfloat16, t.numel});
  }
  return grads;
}

template <class T>
void write(const Log<T>& log, const T* values, int64_t count, int64_t step, int64_t every) {
  if (!log.ring) return;
  const int64_t slot = slot_of(step, every, log.slots);
  if (slot >= 0) std::memcpy(log.ring + slot * count, values, count * sizeof(T));
}

}  // namespace

Update::Update(const Job& job) : job_(job), grads_(gradients(job)), sums_(cpu::norm_blocks(grads_)) {
  for (const Group& group : job.groups) {
    for (const AdamTensors& t : group.tensors) {
      for (int64_t begin = 0; begin < t.numel; begin += cpu::kChunk) {
        chunks_.push_back({&t, &group, begin, std::min(begin + cpu::kChunk, t.numel)});
      }
    }
  }
}

void Update::sum_squares(Worker& worker) {
  for (size_t block = 0; block < sums_.size(); ++block) {
    if (worker.has(block)) sums_[block] = cpu::sum_squares(grads_, block);
  }
  worker.clock.was(Activity::adam);
}

Update::Clipping Update::clipping() const {
  const float norm = cpu::norm_of(sums_);
  return {norm, clip_coefficient(norm, job_.max_grad_norm, true)};
}

void Update::advance(Worker& worker, int64_t step) {
  const int64_t slot = job_.slots ? slot_of(step, job_.every, job_.slots) : -1;
  const float coefficient = clipping().coefficient;
  for (size_t i = 0; i < chunks_.size(); ++i) {
    if (!worker.has(i)) continue;
    const auto& [tensors, group, begin, end] = chunks_[i];
    const Coefficients& coefficients = group->coefficients[step - 1];
    cpu::kernels().adam({*tensors, begin, end, Dtype::bfloat16, job_.rounding, coefficients, coefficient});
    worker.clock.was(Activity::adam);
    if (slot >= 0) cpu::record(*tensors, begin, end, Dtype::bfloat16, slot);
    worker.clock.was(Activity::recording);
  }
}

void Update::log(int64_t step, const std::vector<float>& losses, float share, const bfloat16* logits) const {
  double sum = 0;
  for (const float loss : losses) sum += loss;
  const float loss = static_cast<float>(sum * share);
  const auto [norm, coefficient] = clipping();
  job_.step_losses[step - 1] = loss;
  job_.step_grad_norms[step - 1] = norm;
  bfloat16 rounded_loss;
  store(rounded_loss, rounded<bfloat16>(loss));
  write(job_.losses, &rounded_loss, 1, step, job_.every);
  write(job_.logits, logits, job_.shape.vocab, step, job_.every);
  write(job_.logged_learning_rates, &job_.learning_rates[step - 1], 1, step, job_.every);
  write(job_.clip_coefs, &coefficient, 1, step, job_.every);
  write(job_.grad_norms, &norm, 1, step, job_.every);
}

}  // namespace bhfast::native
