// The end of a step: gradient norm, clipping, Adam and recording, with the arithmetic of the CPU's operations.
#pragma once

#include "../cpu/operations.h"
#include "engine.h"
#include "worker.h"

namespace bhfast::native {

class OptimizerStep {
 public:
  explicit OptimizerStep(const TrainingRun& run);

  // Sum this worker's share of the squares of all gradients.
  void sum_squares(Worker& worker);

  // Update and record this worker's share of the parameters. Needs the sums of all workers.
  void apply(Worker& worker, int64_t step);

  // Record this worker's share of the chosen rows. All workers must have updated their share of the parameters.
  void record_rows(Worker& worker, int64_t step) const;

  // Log the values that each step has one of. Called by one worker. Needs the sums of all workers.
  //
  // losses: [rows]; the step's loss is `loss_scale` times their sum. logits: [vocab]
  void log(int64_t step, const std::vector<float>& losses, float loss_scale, const bfloat16* logits) const;

 private:
  struct Clipping {
    float norm, coefficient;
  };
  Clipping clipping() const;

  struct Chunk {
    const AdamTensors* tensors;
    const ParameterGroup* group;
    int64_t begin, end;
  };

  const TrainingRun& run_;
  const cpu::FlatTensors<GradTensor> grads_;
  std::vector<float> sums_;  // [norm blocks]
  std::vector<Chunk> chunks_;
};

}  // namespace bhfast::native
