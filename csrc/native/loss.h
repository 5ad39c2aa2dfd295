// Cross-entropy of a block of rows, and its gradient.
#pragma once

#include "network.h"

namespace bhfast::native::BHFAST_ISA {

// Set the loss of each row, and replace the logits by the gradient of `scale` times that loss. Rows without a target
// (-1) have loss 0 and no gradient. scratch: [2][padded vocabulary]
inline void cross_entropy(const Matrix& logits, int64_t vocab, const int32_t* targets, float scale, float* losses,
                          float* scratch) {
  const int64_t width = logits.width;
  for (int i = 0; i < kRowBlock; i += 2) {
    for (int half = 0; half < 2; ++half) {
      const bfloat16* const row = logits.row(i + half);
      const int32_t target = targets[i + half];
      float* const e = scratch + half * width;
      for (int64_t c = 0; c < width; c += kLanes) store(e + c, load(row + c));
      for (int64_t c = vocab; c < width; ++c) e[c] = -INFINITY;
      f32 largest = splat(-INFINITY), sum{};
      for (int64_t c = 0; c < width; c += kLanes) largest = max(load(e + c), largest);
      const float row_max = reduce_max(largest), target_logit = target < 0 ? 0 : e[target];
      for (int64_t c = 0; c < width; c += kLanes) {
        const f32 power = exp(load(e + c) - row_max);
        store(e + c, power);
        sum += power;
      }
      const float total = reduce_sum(sum);
      losses[i + half] = target < 0 ? 0 : std::log(total) + row_max - target_logit;
      const float factor = target < 0 ? 0 : scale / total;
      for (int64_t c = 0; c < width; c += kLanes) store(e + c, load(e + c) * factor);
      if (target >= 0) e[target] -= scale;
    }
    for (int64_t c = 0; c < width; c += kLanes) {
      store_two_rows(logits, i, c, load(scratch + c), load(scratch + width + c));
    }
  }
}

}  // namespace bhfast::native::BHFAST_ISA
