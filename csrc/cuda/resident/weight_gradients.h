// The gradients of all parameters: see native/weight_gradients.h. The cluster divides them. Each sums over the rows of
// all blocks, in order, so its bits do not depend on the number of blocks.
#pragma once

#include "elementwise.h"
#include "product.h"

namespace bhfast::cuda::resident {

// Of 16 by 16 weights of a linear layer with input x; and of 16 biases, beside the first inputs.
template <bool kClustered>
__device__ void linear_gradient(const Pass<kClustered>& pass, const Linear& layer, const Matrix& x, const Matrix& d_y,
                                int output, int input) {
  const Sums sums =
      multiply<true, false>(pass, pass.run.row_blocks, down(pass, d_y, 0, output), down(pass, x, 0, input));
  each_result(sums, pass.lane, [&](int i, int c, float first, float second) {
    store_pair(layer.weight.grad + int64_t{output + i} * layer.inputs + input + c, first, second);
  });
  if (input == 0 && pass.lane % 4 == 0) {
    store(layer.bias.grad[output + pass.lane / 4], rounded_bfloat16(sums.rows[0]));
    store(layer.bias.grad[output + pass.lane / 4 + 8], rounded_bfloat16(sums.rows[2]));
  }
}

// Of 16 columns of the vectors of 16 tokens, as rows of the output layer and as embeddings. Frozen tokens have none.
template <bool kClustered>
__device__ void token_gradient(const Pass<kClustered>& pass, int64_t step, int token, int column) {
  const Run& run = pass.run;
  const int rows = run.row_blocks * kRowBlock;
  Sums sums =
      multiply<true, false>(pass, run.row_blocks, down(pass, run.logits, 0, token), down(pass, run.normed, 0, column));
  for (int first = 0; first < rows; first += kWarp) {
    const int own = first + pass.lane < rows ? token_at(pass, step, first + pass.lane) : -1;
    unsigned found = __ballot_sync(kAllLanes, own >= token && own < token + kTile);
    while (found) {
      const int source = __ffs(found) - 1, i = __shfl_sync(kAllLanes, own, source) - token, row = first + source;
      found &= found - 1;
      if (i % 8 != pass.lane / 4) continue;
      const bfloat16* const d = pass.row(run.d_embedded, row / kRowBlock, row % kRowBlock) + column + pass.lane % 4 * 2;
#pragma unroll
      for (int right = 0; right < 2; ++right) {
        const Pair x = load_pair(d + right * 8);
        // No index that is known only at run time: the sums stay in registers.
        sums.tile[right][0] += i < 8 ? x.first : 0;
        sums.tile[right][1] += i < 8 ? x.second : 0;
        sums.tile[right][2] += i < 8 ? 0 : x.first;
        sums.tile[right][3] += i < 8 ? 0 : x.second;
      }
    }
  }
  each_result(sums, pass.lane, [&](int i, int c, float first, float second) {
    if (token + i >= run.vocab) return;
    const bool is_frozen = run.frozen && run.frozen[token + i];
    store_pair(run.wte.weight.grad + int64_t{token + i} * run.hidden + column + c, is_frozen ? 0 : first,
               is_frozen ? 0 : second);
  });
}

// Of the vector of a position.
template <bool kClustered>
__device__ void position_gradient(const Pass<kClustered>& pass, int position) {
  const Run& run = pass.run;
  pass.template each_pair<kWarp>(run.hidden, [&](int c) {
    Pair sum{0, 0};
    for (int window = 0; window < run.windows; ++window) {
      const int row = window * run.rows_per_window + position;
      const Pair x = load_pair(pass.row(run.d_embedded, row / kRowBlock, row % kRowBlock) + c);
      sum = {sum.first + x.first, sum.second + x.second};
    }
    store_pair(run.wpe.grad + position * run.hidden + c, sum.first, sum.second);
  });
}

// Of the weight and bias of a layer normalization.
template <bool kClustered>
__device__ void norm_gradient(const Pass<kClustered>& pass, const Norm& norm) {
  const int width = pass.run.hidden;
  const auto sum = [&](const float* partial) {
    float total = 0;
    for (int b = 0; b < pass.run.row_blocks; ++b) total += partial[int64_t{b} * 2 * width];
    return total;
  };
  pass.template each_pair<kWarp>(width, [&](int c) {
    store_pair(norm.weight.grad + c, sum(norm.partial + c), sum(norm.partial + c + 1));
    store_pair(norm.bias.grad + c, sum(norm.partial + width + c), sum(norm.partial + width + c + 1));
  });
}

// The block's share of all of them.
template <bool kClustered>
__device__ void weight_gradients(const Pass<kClustered>& pass, int64_t step) {
  const Run& run = pass.run;
  int64_t items = 0;  // before the current list
  const auto each = [&](int64_t count, auto work) {
    pass.each_of_cluster(count, items, work);
    items += count;
  };
  const auto each_tile = [&](const Linear& layer, const Matrix& x, const Matrix& d_y) {
    const int inputs = layer.inputs / kTile;
    each(layer.outputs / kTile * inputs, [&](int64_t i) {
      linear_gradient(pass, layer, x, d_y, static_cast<int>(i / inputs) * kTile, static_cast<int>(i % inputs) * kTile);
    });
  };
  const int columns = run.hidden / kTile;
  each(run.padded_vocab / kTile * columns, [&](int64_t i) {
    token_gradient(pass, step, static_cast<int>(i / columns) * kTile, static_cast<int>(i % columns) * kTile);
  });
#pragma unroll 1
  for (int layer = 0; layer < run.layers; ++layer) {
    const Block& block = pass.blocks[layer];
    each_tile(block.c_attn, block.normed_1, block.d_qkv);
    each_tile(block.attn_proj, block.mixed, block.d_mid);
    each_tile(block.c_fc, block.normed_2, block.d_hidden);
    each_tile(block.mlp_proj, block.activated, block.d_out);
    each(2, [&](int64_t i) { norm_gradient(pass, i ? block.ln_2 : block.ln_1); });
  }
  each(1, [&](int64_t) { norm_gradient(pass, run.ln_f); });
  each(run.context, [&](int64_t i) { position_gradient(pass, static_cast<int>(i)); });
}

}  // namespace bhfast::cuda::resident
