#include "optimizer_step.h"

#include <cmath>
#include <cstring>

#include "../instruction_sets/dispatch.h"
#include "../ring.h"

namespace bhfast::native {
namespace {

std::vector<GradTensor> gradients(const TrainingRun& run) {
  std::vector<GradTensor> grads;
  for (const ParameterGroup& group : run.groups) {
    for (const AdamTensors& t : group.tensors) grads.push_back({t.grad, Dtype::bfloat16, t.numel});
  }
  return grads;
}

// Write `count` values to the log's slot for the step, if it is recorded.
template <class T>
void write(const Log<T>& log, const T* values, int64_t count, int64_t step, int64_t every) {
  if (!log.ring) return;
  const int64_t slot = slot_of(step, every, log.slots);
  if (slot >= 0) std::memcpy(log.ring + slot * count, values, count * sizeof(T));
}

}  // namespace

OptimizerStep::OptimizerStep(const TrainingRun& run)
    : run_(run), grads_(gradients(run)), sums_(cpu::norm_blocks(grads_)) {
  for (const ParameterGroup& group : run.groups) {
    for (const AdamTensors& t : group.tensors) {
      for (int64_t begin = 0; begin < t.numel; begin += cpu::kChunk) {
        chunks_.push_back({&t, &group, begin, std::min(begin + cpu::kChunk, t.numel)});
      }
    }
  }
}

void OptimizerStep::sum_squares(Worker& worker) {
  for (size_t block = 0; block < sums_.size(); ++block) {
    if (worker.owns(block)) sums_[block] = cpu::sum_squares(grads_, block);
  }
  worker.timer.lap(Activity::adam);
}

OptimizerStep::Clipping OptimizerStep::clipping() const {
  const float norm = cpu::norm_from_sums(sums_);
  return {norm, clip_coefficient(norm, run_.max_grad_norm, true)};
}

void OptimizerStep::apply(Worker& worker, int64_t step) {
  const int64_t slot = run_.slots ? slot_of(step, run_.every, run_.slots) : -1;
  const float clip_coef = clipping().coefficient;
  const Kernels& kernels = current_instruction_set().kernels;
  for (size_t i = 0; i < chunks_.size(); ++i) {
    if (!worker.owns(i)) continue;
    const auto& [tensors, group, begin, end] = chunks_[i];
    const Coefficients& coefficients = group->coefficients[step - 1];
    kernels.adam({*tensors, begin, end, Dtype::bfloat16, run_.rounding, coefficients, clip_coef});
    worker.timer.lap(Activity::adam);
    if (slot >= 0) cpu::record(*tensors, begin, end, Dtype::bfloat16, slot);
    worker.timer.lap(Activity::recording);
  }
}

void OptimizerStep::record_rows(Worker& worker, int64_t step) const {
  for (const RecordedRows& own : run_.recorded_rows) {
    const int64_t slot = slot_of(step, run_.every, own.slots);
    if (slot < 0) continue;
    char* const record = own.ring + slot * own.count * own.row_bytes;
    const int64_t begin = own.count * worker.index / worker.count, end = own.count * (worker.index + 1) / worker.count;
    for (int64_t i = begin; i < end; ++i) {
      std::memcpy(record + i * own.row_bytes, own.tensor + own.rows[i] * own.row_bytes, own.row_bytes);
    }
  }
  worker.timer.lap(Activity::recording);
}

void OptimizerStep::log(int64_t step, const std::vector<float>& losses, float loss_scale,
                        const bfloat16* logits) const {
  double sum = 0;
  for (const float loss : losses) sum += loss;
  const float loss = static_cast<float>(sum * loss_scale);
  const auto [norm, coefficient] = clipping();
  run_.step_losses[step - 1] = loss;
  run_.step_grad_norms[step - 1] = norm;
  bfloat16 rounded_loss;
  store(rounded_loss, rounded<bfloat16>(loss));
  write(run_.losses, &rounded_loss, 1, step, run_.every);
  write(run_.logits, logits, run_.shape.vocab, step, run_.every);
  write(run_.logged_learning_rates, &run_.learning_rates[step - 1], 1, step, run_.every);
  write(run_.clip_coefs, &coefficient, 1, step, run_.every);
  write(run_.grad_norms, &norm, 1, step, run_.every);
}

}  // namespace bhfast::native
