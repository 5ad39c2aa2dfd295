// What a step prepares: the tokens of its windows, and the weights in the layouts that products read.
#pragma once

#include "pass.h"

namespace bhfast::native::BHFAST_ISA {

// Set the tokens and targets of `step`, counted from 1, and the lists of the rows of each token.
inline void load_windows(const Pass& pass, const TrainingRun& run, int64_t step) {
  Network& net = pass.net;
  const Shape& shape = net.shape;
  std::fill(net.first_row.begin(), net.first_row.end(), -1);
  for (int64_t window = shape.windows; window-- > 0;) {
    const int32_t* const tokens = run.corpus + run.offsets[(step - 1) * shape.windows + window];
    for (int64_t t = net.rows_per_window; t-- > 0;) {
      const int64_t row = window * net.rows_per_window + t;
      const bool is_padding = t >= shape.context, has_target = t + run.target_offset <= shape.context;
      net.tokens[row] = is_padding ? -1 : tokens[t];
      net.targets[row] = !is_padding && has_target ? tokens[t + run.target_offset] : -1;
      if (!is_padding) net.next_row[row] = std::exchange(net.first_row[tokens[t] / kRowBlock], row);
    }
  }
  pass.lap(Activity::elementwise);
}

// Set the packed layouts of this thread's share of the weights.
inline void pack_weights(const Pass& pass) {
  const Network& net = pass.net;
  int64_t item = 0;
  const auto pack_layer = [&](const Linear& layer) {
    for (int64_t row = 0; row < layer.outputs; row += kRowBlock) {
      if (!pass.worker.owns(item++)) continue;
      const Matrix weight = layer.weight.at(row);
      const bfloat16* rows[kRowBlock];
      for (int i = 0; i < kRowBlock; ++i) rows[i] = row + i < layer.outputs ? weight.row(i) : net.zeros;
      pack_pairs(rows, layer.inputs, weight);
      pack_transposed(rows, layer.inputs, weight);
    }
  };
  pack_layer(net.wte);
  for (const Block& block : net.blocks) {
    for (const Linear* layer : {&block.c_attn, &block.attn_proj, &block.c_fc, &block.mlp_proj}) pack_layer(*layer);
  }
  pass.lap(Activity::arranging);
}

}  // namespace bhfast::native::BHFAST_ISA
