// Mean and variance of the final hidden state over all positions of a step, for each dimension: see
// native/statistics.h.
#pragma once

#include "../../ring.h"
#include "pass.h"

namespace bhfast::cuda::resident {

// The sums of value(Pair) over the rows of all windows, without padding: in float32 within a window, then in float64.
template <bool kClustered, class Value>
__device__ void sum_over_positions(const Pass<kClustered>& pass, int column, double (&sums)[2], Value value) {
  const Run& run = pass.run;
  sums[0] = sums[1] = 0;
  for (int window = 0; window < run.windows; ++window) {
    Pair sum{0, 0};
    for (int position = 0; position < run.context; ++position) {
      const int row = window * run.rows_per_window + position;
      const Pair x = value(load_pair(pass.row(run.normed, row / kRowBlock, row % kRowBlock) + column));
      sum = {sum.first + x.first, sum.second + x.second};
    }
    sums[0] += sum.first;
    sums[1] += sum.second;
  }
}

// Log the block's share of the dimensions, if the step is recorded.
template <bool kClustered>
__device__ void log_hidden_statistics(const Pass<kClustered>& pass, int64_t step) {
  const Run& run = pass.run;
  if (step % run.every || (!run.hidden_means.ring && !run.hidden_vars.ring)) return;
  const int64_t positions = int64_t{run.windows} * run.context;
  pass.each_of_cluster((run.hidden + 2 * kWarp - 1) / (2 * kWarp), 0, [&](int64_t i) {
    const int column = 2 * (static_cast<int>(i) * kWarp + pass.lane);
    if (column >= run.hidden) return;
    const auto write = [&](const Log<float>& log, const double (&sums)[2]) {
      const int64_t slot = log.ring ? slot_of(step, run.every, log.slots) : -1;
      for (int k = 0; slot >= 0 && k < 2; ++k) {
        log.ring[slot * run.hidden + column + k] = static_cast<float>(sums[k] / positions);
      }
    };
    double sums[2];
    sum_over_positions(pass, column, sums, [](Pair x) { return x; });
    write(run.hidden_means, sums);
    const Pair mean{static_cast<float>(sums[0] / positions), static_cast<float>(sums[1] / positions)};
    sum_over_positions(pass, column, sums, [&](Pair x) -> Pair {
      const float first = x.first - mean.first, second = x.second - mean.second;
      return {first * first, second * second};
    });
    write(run.hidden_vars, sums);
  });
}

}  // namespace bhfast::cuda::resident
