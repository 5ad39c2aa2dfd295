// Mean and variance of the final hidden state over all positions of a step, for each dimension.
#pragma once

#include "../ring.h"
#include "pass.h"

namespace bhfast::native::BHFAST_ISA {

// Add value(row) over the rows of all windows, without padding: in float32 within a window, then in float64.
template <class Value>
inline void sum_over_positions(const Network& net, double (&sums)[kLanes], Value value) {
  std::fill_n(sums, kLanes, 0.0);
  for (int64_t window = 0; window < net.shape.windows; ++window) {
    const int64_t first = window * net.rows_per_window;
    f32 sum{};
    for (int64_t row = first; row < first + net.shape.context; ++row) sum += value(row);
    for (int i = 0; i < kLanes; ++i) sums[i] += sum[i];
  }
}

// Log this thread's share of the dimensions, if the step is recorded.
inline void log_hidden_statistics(const Pass& pass, const TrainingRun& run, int64_t step) {
  const Network& net = pass.net;
  if (step % run.every || (!run.hidden_means.ring && !run.hidden_vars.ring)) return;
  const int64_t width = net.shape.hidden, positions = net.shape.windows * net.shape.context;
  const auto write = [&](const Log<float>& log, int64_t c, const double (&sums)[kLanes]) {
    const int64_t slot = log.ring ? slot_of(step, run.every, log.slots) : -1;
    for (int i = 0; slot >= 0 && i < kLanes; ++i) log.ring[slot * width + c + i] = sums[i] / positions;
  };
  for (int64_t c = 0; c < width; c += kLanes) {
    if (!pass.worker.owns(c / kLanes)) continue;
    double sums[kLanes];
    sum_over_positions(net, sums, [&](int64_t row) { return load(net.normed.row(row) + c); });
    write(run.hidden_means, c, sums);
    f32 mean;
    for (int i = 0; i < kLanes; ++i) mean[i] = sums[i] / positions;
    sum_over_positions(net, sums, [&](int64_t row) {
      const f32 centered = load(net.normed.row(row) + c) - mean;
      return centered * centered;
    });
    write(run.hidden_vars, c, sums);
  }
  pass.lap(Activity::recording);
}

}  // namespace bhfast::native::BHFAST_ISA
