// Cross-entropy of kBlock rows, and its gradient.
#pragma once

#include "network.h"

namespace bhfast::native::BHFAST_ISA {

// Turn logits into the gradient of `share` times each row's loss, in place and in pairs, and set the losses. Rows
// without a target (-1) have loss 0 and no gradient. scratch: [2][padded vocabulary]
inline void cross_entropy(const Matrix& logits, int64_t vocab, const int32_t* targets, float share, float* losses,
                          float* scratch) {
  const int64_t width = logits.width;
  for (int i = 0; i < kBlock; i += 2) {
    for (int half = 0; half < 2; ++half) {
      const bfloat16* const row = logits.row(i + half);
      const int32_t target = targets[i + half];
      float* const e = scratch + half * width;
      for (int64_t c = 0; c < width; c += kLanes) store(e + c, load(row + c));
      for (int64_t c = vocab; c < width; ++c) e[c] = -INFINITY;
      f32 largest = splat(-INFINITY), sum{};
      for (int64_t c = 0; c < width; c += kLanes) largest = max(load(e + c), largest);
      const float most = max_of(largest), chosen = target < 0 ? 0 : e[target];
      for (int64_t c = 0; c < width; c += kLanes) {
        const f32 power = exp(load(e + c) - most);
        store(e + c, power);
        sum += power;
      }
      const float total = sum_of(sum);
      losses[i + half] = target < 0 ? 0 : std::log(total) + most - chosen;
      const float factor = target < 0 ? 0 : share / total;
      for (int64_t c = 0; c < width; c += kLanes) store(e + c, load(e + c) * factor);
      if (target >= 0) e[target] -= share;
    }
    for (int64_t c = 0; c < width; c += kLanes) {
      const f32 first = load(scratch + c), second = load(scratch + width + c);
      store(logits.row(i) + c, first);
      store(logits.row(i + 1) + c, second);
      store(logits.pair(i, c), pair(first, second));
    }
  }
}

}  // namespace bhfast::native::BHFAST_ISA
