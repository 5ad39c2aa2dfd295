// Cross-entropy and its gradient, half a warp for each row: see native/loss.h.
#pragma once

#include "../../ring.h"
#include "elementwise.h"

namespace bhfast::cuda::resident {

// Log the logits of the first window's last position; set the loss of each row, and replace the logits by the gradient
// of the mean loss. Rows without a target have loss 0 and no gradient.
template <bool kClustered>
__device__ void cross_entropy(const Pass<kClustered>& pass, int64_t step) {
  const Run& run = pass.run;
  const int vocab = run.vocab;
  const int64_t slot = run.logits_log.ring ? slot_of(step, run.every, run.logits_log.slots) : -1;
  pass.each_row(kRowBlock, [&](int row_block, int i) {
    const int row = row_block * kRowBlock + i, target = token_at(pass, step, row, run.target_offset);
    bfloat16* const logits = pass.row(run.logits, row_block, i);
    if (slot >= 0 && row == run.context - 1) {
      for (int c = pass.lane % kHalf; c < vocab; c += kHalf) run.logits_log.ring[slot * vocab + c] = logits[c];
    }
    const float target_logit = target < 0 ? 0 : to_float(logits[target]);
    float largest = -INFINITY, sum = 0;
    pass.each_pair(vocab, [&](int c) {
      const Pair x = load_pair(logits + c);
      largest = fmaxf(largest, x.first);
      if (c + 1 < vocab) largest = fmaxf(largest, x.second);
    });
    largest = row_max(largest);
    pass.each_pair(vocab, [&](int c) {
      const Pair x = load_pair(logits + c);
      sum += expf(x.first - largest);
      if (c + 1 < vocab) sum += expf(x.second - largest);
    });
    const float total = row_sum(sum), factor = target < 0 ? 0 : run.loss_scale / total;
    if (pass.lane % kHalf == 0) run.row_losses[row] = target < 0 ? 0 : logf(total) + largest - target_logit;
    pass.each_pair(run.padded_vocab, [&](int c) {
      const Pair x = load_pair(logits + c);
      const auto gradient = [&](float value, int column) {
        const float d = column < vocab ? expf(value - largest) * factor : 0;
        return column == target ? d - run.loss_scale : d;
      };
      store_pair(logits + c, gradient(x.first, c), gradient(x.second, c + 1));
    });
  });
}

}  // namespace bhfast::cuda::resident
