// The end of a step: the norm of the gradients, clipping, Adam, recording. The arithmetic is that of the CPU's
// operations.
#pragma once

#include "../cpu/kernels.h"
#include "engine.h"
#include "team.h"

namespace bhfast::native {

class Update {
 public:
  explicit Update(const Job& job);

  // This thread's part of the squares of all gradients.
  void sum_squares(Worker& worker);

  // This thread's part of the parameters, once all squares are summed.
  void advance(Worker& worker, int64_t step);

  // Log what is one value a step, once all squares are summed: for one thread. losses: [rows], of which the loss is
  // `share` times the sum. logits: [vocab]
  void log(int64_t step, const std::vector<float>& losses, float share, const bfloat16* logits) const;

 private:
  struct Clipping {
    float norm, coefficient;
  };
  Clipping clipping() const;

  struct Chunk {
    const AdamTensors* tensors;
    const Group* group;
    int64_t begin, end;
  };

  const Job& job_;
  const cpu::Ranges<GradTensor> grads_;
  std::vector<float> sums_;  // [blocks]
  std::vector<Chunk> chunks_;
};

}  // namespace bhfast::native
