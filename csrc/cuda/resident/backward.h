// The backward pass of the block's own rows: see native/backward.h.
#pragma once

#include "attention.h"
#include "elementwise.h"
#include "layernorm.h"

namespace bhfast::cuda::resident {

// d_logits -> d_normed -> d_out of the last block
template <bool kClustered>
__device__ void backward_head(const Pass<kClustered>& pass) {
  const Run& run = pass.run;
  linear_backward(pass, run.wte, run.logits, store_in(pass, run.d_normed));
  pass.sync();
  layer_norm_backward(pass, run.ln_f, run.d_normed, run.x_out, nullptr, pass.blocks[run.layers - 1].d_out);
  pass.sync();
}

// d_out -> d_hidden -> d_mid -> d_mixed
template <bool kClustered>
__device__ void backward_mlp(const Pass<kClustered>& pass, const Block& block) {
  const Matrix& d_normed = pass.run.d_normed;
  linear_backward(pass, block.mlp_proj, block.d_out, [&](int row_block, int i, int column, float first, float second) {
    const Pair x = load_pair(pass.row(block.hidden, row_block, i) + column);
    store_pair(pass.row(block.d_hidden, row_block, i) + column, rounded_bfloat16(first) * gelu_slope(x.first),
               rounded_bfloat16(second) * gelu_slope(x.second));
  });
  pass.sync();
  linear_backward(pass, block.c_fc, block.d_hidden, store_in(pass, d_normed));
  pass.sync();
  layer_norm_backward(pass, block.ln_2, d_normed, block.x_mid, &block.d_out, block.d_mid);
  pass.sync();
  linear_backward(pass, block.attn_proj, block.d_mid, store_in(pass, block.d_mixed));
  pass.sync();
}

// d_mixed -> d_scores -> the queries' part of d_qkv
template <bool kClustered>
__device__ void backward_queries(const Pass<kClustered>& pass, const Block& block) {
  const int hidden = pass.run.hidden;
  each_score(pass, block.d_mixed, 0, block.qkv, 2 * hidden,
             [&](int row_block, int i, int c, float first, float second) {
               store_pair(pass.row(block.d_scores, row_block, i) + c, first, second);
             });
  pass.sync();
  softmax_backward(pass, block.weights, block.d_scores);
  pass.sync();
  mix_keys(pass, block.d_scores, block.qkv, hidden, block.d_qkv, score_scale(pass));
}

// d_scores, d_mixed -> the rest of d_qkv -> d_x. Needs the d_scores of all later rows of the window.
template <bool kClustered>
__device__ void backward_keys_values(const Pass<kClustered>& pass, const Block& block) {
  const int hidden = pass.run.hidden;
  mix_queries(pass, block.d_scores, block.qkv, block.d_qkv, hidden, score_scale(pass));
  mix_queries(pass, block.weights, block.d_mixed, block.d_qkv, 2 * hidden, 1);
  pass.sync();
  linear_backward(pass, block.c_attn, block.d_qkv, store_in(pass, pass.run.d_normed));
  pass.sync();
  layer_norm_backward(pass, block.ln_1, pass.run.d_normed, block.x, &block.d_mid, block.d_x);
  pass.sync();
}

}  // namespace bhfast::cuda::resident
