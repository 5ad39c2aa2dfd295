// The forward pass of a block of rows.
#pragma once

#include "attention.h"
#include "elementwise.h"
#include "layernorm.h"
#include "loss.h"
#include "pass.h"
#include "product.h"

namespace bhfast::native::BHFAST_ISA {

inline void linear(const Linear& layer, const Matrix& x, const Matrix& to) {
  multiply(left(x), right_transposed(layer.weight), layer.outputs, layer.inputs / 2, to, 1, layer.bias.value);
}

// x -> normed_1 -> qkv
inline void forward_qkv(const Pass& pass, const Block& block, RowBlock rows) {
  const int64_t row = rows.first, hidden = pass.net.shape.hidden;
  const Matrix normed = pass.scratch.with_rows(block.normed_1.at(row));
  layer_norm(block.x.at(row), block.ln_1, block.ln_1.statistics + 2 * row, normed);
  pass.lap(Activity::elementwise);
  linear(block.c_attn, normed, block.qkv.at(row));
  pass.lap(Activity::products);
  const Matrix keys_and_values = block.qkv.at(row, hidden);
  const bfloat16* pointers[kRowBlock];
  for (int i = 0; i < kRowBlock; ++i) pointers[i] = keys_and_values.row(i);
  pack_transposed(pointers, 2 * hidden, keys_and_values);
  pass.lap(Activity::attention);
}

// qkv -> mixed -> x_mid. Needs the keys and values of all earlier rows of the window.
inline void forward_attention(const Pass& pass, const Block& block, RowBlock rows) {
  const int64_t row = rows.first;
  attend(pass.net, block, rows, pass.scratch.floats);
  pass.lap(Activity::attention);
  const Matrix projected = pass.scratch.block(pass.net.shape.hidden);
  linear(block.attn_proj, block.mixed.at(row), projected);
  pass.lap(Activity::products);
  add(block.x.at(row), projected, block.x_mid.at(row));
}

// x_mid -> normed_2 -> hidden -> activated -> out
inline void forward_mlp(const Pass& pass, const Block& block, RowBlock rows) {
  const int64_t row = rows.first;
  const Matrix x_mid = block.x_mid.at(row), hidden = block.hidden.at(row), out = block.out.at(row);
  const Matrix normed = pass.scratch.with_rows(block.normed_2.at(row));
  layer_norm(x_mid, block.ln_2, block.ln_2.statistics + 2 * row, normed);
  pass.lap(Activity::elementwise);
  linear(block.c_fc, normed, hidden);
  pass.lap(Activity::products);
  const Matrix activated = pass.scratch.with_rows(block.activated.at(row));
  gelu(hidden, activated);
  pass.lap(Activity::elementwise);
  linear(block.mlp_proj, activated, out);
  pass.lap(Activity::products);
  add(x_mid, out, out);
  pass.lap(Activity::elementwise);
}

// x_out -> normed -> logits -> losses and d_logits, in the place of the logits
inline void forward_head(const Pass& pass, RowBlock rows) {
  Network& net = pass.net;
  const int64_t row = rows.first;
  const Matrix normed = net.normed.at(row), logits = net.logits.at(row);
  layer_norm(net.x_out.at(row), net.ln_f, net.ln_f.statistics + 2 * row, normed);
  pass.lap(Activity::elementwise);
  multiply(left(normed), right_transposed(net.wte.weight), net.padded_vocab, net.wte.inputs / 2, logits.rows_only(), 1,
           nullptr);
  pass.lap(Activity::products);
  const int64_t last = net.shape.context - 1 - row;
  if (last >= 0 && last < kRowBlock) std::copy_n(logits.row(last), net.shape.vocab, net.logged_logits.data());
  pass.lap(Activity::recording);
  cross_entropy(logits, net.shape.vocab, net.targets.data() + row, net.loss_scale, net.losses.data() + row,
                pass.scratch.floats);
  pass.lap(Activity::elementwise);
}

}  // namespace bhfast::native::BHFAST_ISA
