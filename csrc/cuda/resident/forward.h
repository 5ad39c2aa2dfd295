// The forward pass of the block's own rows: see native/forward.h.
#pragma once

#include "attention.h"
#include "elementwise.h"
#include "layernorm.h"
#include "loss.h"

namespace bhfast::cuda::resident {

// x -> normed_1 -> qkv
template <bool kClustered>
__device__ void forward_qkv(const Pass<kClustered>& pass, const Block& block) {
  layer_norm(pass, block.ln_1, block.x, block.normed_1);
  pass.sync();
  linear(pass, block.c_attn, block.normed_1, block.c_attn.outputs, store_in(pass, block.qkv));
}

// An `emit` that rounds, adds x, and stores the sum.
template <bool kClustered>
__device__ auto add_to(const Pass<kClustered>& pass, const Matrix& x, const Matrix& to) {
  return [&pass, &x, &to](int row_block, int i, int column, float first, float second) {
    const Pair before = load_pair(pass.row(x, row_block, i) + column);
    store_pair(pass.row(to, row_block, i) + column, before.first + rounded_bfloat16(first),
               before.second + rounded_bfloat16(second));
  };
}

// qkv -> weights -> mixed -> x_mid. Needs the keys and values of all earlier rows of the window.
template <bool kClustered>
__device__ void forward_attention(const Pass<kClustered>& pass, const Block& block) {
  const int hidden = pass.run.hidden;
  const float scale = score_scale(pass);
  each_score(pass, block.qkv, 0, block.qkv, hidden, [&](int row_block, int i, int c, float first, float second) {
    store_pair(pass.row(block.weights, row_block, i) + c, first * scale, second * scale);
  });
  pass.sync();
  causal_softmax(pass, block.weights);
  pass.sync();
  mix_keys(pass, block.weights, block.qkv, 2 * hidden, block.mixed, 1);
  pass.sync();
  linear(pass, block.attn_proj, block.mixed, hidden, add_to(pass, block.x, block.x_mid));
  pass.sync();
}

// x_mid -> normed_2 -> hidden, activated -> out
template <bool kClustered>
__device__ void forward_mlp(const Pass<kClustered>& pass, const Block& block) {
  layer_norm(pass, block.ln_2, block.x_mid, block.normed_2);
  pass.sync();
  linear(pass, block.c_fc, block.normed_2, block.c_fc.outputs,
         [&](int row_block, int i, int column, float first, float second) {
           const float x = rounded_bfloat16(first), y = rounded_bfloat16(second);
           store_pair(pass.row(block.hidden, row_block, i) + column, x, y);
           store_pair(pass.row(block.activated, row_block, i) + column, gelu(x), gelu(y));
         });
  pass.sync();
  linear(pass, block.mlp_proj, block.activated, pass.run.hidden, add_to(pass, block.x_mid, block.out));
  pass.sync();
}

// x_out -> normed -> logits -> losses and d_logits, in the place of the logits
template <bool kClustered>
__device__ void forward_head(const Pass<kClustered>& pass, int64_t step) {
  const Run& run = pass.run;
  layer_norm(pass, run.ln_f, run.x_out, run.normed);
  pass.sync();
  linear(pass, run.wte, run.normed, run.padded_vocab, store_in(pass, run.logits));
  pass.sync();
  cross_entropy(pass, step);
  pass.sync();
}

}  // namespace bhfast::cuda::resident
