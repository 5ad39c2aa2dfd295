// Cross-entropy of a block of rows, and its gradient.
#pragma once

#include "network.h"

namespace bhfast::native::BHFAST_ISA {

// Set the loss of each row, and replace the logits by the gradient of `scale` times that loss. Rows without a target
// (-1) have loss 0 and no gradient. scratch: [kRowBlock][padded vocabulary]
inline void cross_entropy(const Matrix& logits, int64_t vocab, const int32_t* targets, float scale, float* losses,
                          float* scratch) {
  const int64_t width = logits.width;
  bfloat16 minus_infinity;
  bhfast::store(minus_infinity, -INFINITY);
  float factors[kRowBlock];
  for (int i = 0; i < kRowBlock; ++i) {
    bfloat16* const row = logits.row(i);
    const int32_t target = targets[i];
    float* const e = scratch + i * width;
    std::fill(row + vocab, row + width, minus_infinity);
    f32 largest = splat(-INFINITY), sum{};
    for (int64_t c = 0; c < width; c += kLanes) largest = max(load(row + c), largest);
    const float row_max = reduce_max(largest), target_logit = target < 0 ? 0 : to_float(row[target]);
    for (int64_t c = 0; c < width; c += kLanes) {
      const f32 power = exp(load(row + c) - row_max);
      store(e + c, power);
      sum += power;
    }
    const float total = reduce_sum(sum);
    losses[i] = target < 0 ? 0 : std::log(total) + row_max - target_logit;
    factors[i] = target < 0 ? 0 : scale / total;
  }
  // Column by column: the pairs of a vector of columns are side by side, those of the next one far away.
  for (int64_t c = 0; c < width; c += kLanes) {
    const auto gradient = [&](int i) { return load(scratch + i * width + c) * factors[i]; };
    for (int i = 0; i < kRowBlock; i += 2) store_two_rows(logits, i, c, gradient(i), gradient(i + 1));
  }
  for (int i = 0; i < kRowBlock; ++i) {
    if (targets[i] < 0) continue;
    store_element(logits, i, targets[i], scratch[i * width + targets[i]] * factors[i] - scale);
  }
}

}  // namespace bhfast::native::BHFAST_ISA
