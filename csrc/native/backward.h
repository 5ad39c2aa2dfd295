// The backward pass of a block of rows: the gradients of all activations. Those of the parameters come later: see
// weight_gradients.h.
#pragma once

#include "attention.h"
#include "elementwise.h"
#include "layernorm.h"
#include "pass.h"
#include "product.h"

namespace bhfast::native::BHFAST_ISA {

inline void linear_backward(const Linear& layer, const Matrix& d_y, const Matrix& to) {
  multiply(left(d_y), right(layer.weight), layer.inputs, padded(layer.outputs) / 2, to, 1, nullptr);
}

// See layer_norm_backward. The matrices begin at the block's first row.
inline void norm_backward(const Pass& pass, const Norm& norm, RowBlock rows, const Matrix& d_y, const Matrix& x,
                          const Matrix& residual, const Matrix& to) {
  layer_norm_backward(d_y, x, norm, norm.statistics + 2 * rows.first, residual, to,
                      norm.partial + rows.first / kRowBlock * 2 * pass.net.shape.hidden);
  pass.lap(Activity::elementwise);
}

// d_logits -> d_normed -> d_out of the last block
inline void backward_head(const Pass& pass, RowBlock rows) {
  const Network& net = pass.net;
  const int64_t row = rows.first;
  const Matrix d_normed = pass.scratch.block(net.shape.hidden);
  linear_backward(net.wte, net.logits.at(row), d_normed);
  pass.lap(Activity::products);
  norm_backward(pass, net.ln_f, rows, d_normed, net.x_out.at(row), {}, net.blocks.back().d_out.at(row));
}

// d_out -> d_hidden -> d_mid -> d_mixed
inline void backward_mlp(const Pass& pass, const Block& block, RowBlock rows) {
  const int64_t row = rows.first;
  const Matrix d_out = block.d_out.at(row), d_mid = block.d_mid.at(row);
  const Matrix d_hidden = pass.scratch.with_rows(block.d_hidden.at(row));
  linear_backward(block.mlp_proj, d_out, d_hidden.rows_only());
  pass.lap(Activity::products);
  gelu_backward(d_hidden, block.hidden.at(row), d_hidden);
  pass.lap(Activity::elementwise);
  linear_backward(block.c_fc, d_hidden, d_mid.rows_only());
  pass.lap(Activity::products);
  norm_backward(pass, block.ln_2, rows, d_mid, block.x_mid.at(row), d_out, d_mid);
  linear_backward(block.attn_proj, d_mid, block.d_mixed.at(row));
  pass.lap(Activity::products);
}

// d_mixed -> d_scores -> the queries' part of d_qkv
inline void backward_queries(const Pass& pass, const Block& block, RowBlock rows) {
  attend_backward_queries(pass.net, block, rows, pass.scratch.floats);
  pass.lap(Activity::attention);
}

// d_scores, d_mixed -> the rest of d_qkv -> d_x. Needs the d_scores of all later rows of the window.
inline void backward_keys_values(const Pass& pass, const Block& block, RowBlock rows) {
  const int64_t row = rows.first;
  attend_backward_keys_values(pass.net, block, rows);
  pass.lap(Activity::attention);
  const Matrix d_normed = pass.scratch.block(pass.net.shape.hidden);
  linear_backward(block.c_attn, block.d_qkv.at(row), d_normed);
  pass.lap(Activity::products);
  norm_backward(pass, block.ln_1, rows, d_normed, block.x.at(row), block.d_mid.at(row), block.d_x.at(row));
}

}  // namespace bhfast::native::BHFAST_ISA
