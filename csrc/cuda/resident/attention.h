// Causal multi-head attention: see native/attention.h. The attention matrices have a row for each query, and for each
// head rows_per_window columns, one for each key. Scores of keys after the query's block are not computed.
#pragma once

#include "pass.h"
#include "product.h"

namespace bhfast::cuda::resident {

template <bool kClustered>
__device__ float score_scale(const Pass<kClustered>& pass) {
  return 1 / sqrtf(static_cast<float>(pass.run.head_dim));
}

// The products of a head's part of each query with that of each key: left times transposed right.
// emit(row block, row, column in the attention matrix, first, second)
template <bool kClustered, class Emit>
__device__ void each_score(const Pass<kClustered>& pass, const Matrix& left, int left_column, const Matrix& right,
                           int right_column, Emit emit) {
  const int head_dim = pass.run.head_dim, blocks = pass.run.rows_per_window / kRowBlock;
  pass.each_own(pass.run.heads * blocks, [&](int row_block, int item) {
    const int head = item / blocks, key = item % blocks;
    if (key * kRowBlock > pass.position(row_block)) return;
    const int key_block = pass.first_of_window(row_block) + key;
    const Sums sums =
        multiply<false, true>(pass, head_dim / kTile, across(pass, left, row_block, left_column + head * head_dim),
                              across(pass, right, key_block, right_column + head * head_dim));
    each_result(sums, pass.lane,
                [&](int i, int c, float first, float second) { emit(row_block, i, item * kTile + c, first, second); });
  });
}

// to = scale * matrix times right, where matrix is an attention matrix and right has a row for each key.
template <bool kClustered>
__device__ void mix_keys(const Pass<kClustered>& pass, const Matrix& matrix, const Matrix& right, int right_column,
                         const Matrix& to, float scale) {
  const int head_dim = pass.run.head_dim;
  pass.each_tile(pass.run.hidden, [&](int row_block, int column) {
    const int first_key = column / head_dim * pass.run.rows_per_window, window = pass.first_of_window(row_block);
    const Sums sums =
        multiply<false, false>(pass, pass.position(row_block) / kTile + 1, across(pass, matrix, row_block, first_key),
                               down(pass, right, window, right_column + column));
    each_result(sums, pass.lane, [&](int i, int c, float first, float second) {
      store_pair(pass.row(to, row_block, i) + column + c, first * scale, second * scale);
    });
  });
}

// to = scale * transposed matrix times right, where right has a row for each query. These are sums over the queries of
// the keys' block and all later ones.
template <bool kClustered>
__device__ void mix_queries(const Pass<kClustered>& pass, const Matrix& matrix, const Matrix& right, const Matrix& to,
                            int to_column, float scale) {
  const int head_dim = pass.run.head_dim, rows_per_window = pass.run.rows_per_window;
  pass.each_tile(pass.run.hidden, [&](int row_block, int column) {
    const int position = pass.position(row_block);
    const Sums sums =
        multiply<true, false>(pass, (rows_per_window - position) / kTile,
                              down(pass, matrix, row_block, column / head_dim * rows_per_window + position),
                              down(pass, right, row_block, column));
    each_result(sums, pass.lane, [&](int i, int c, float first, float second) {
      store_pair(pass.row(to, row_block, i) + to_column + column + c, first * scale, second * scale);
    });
  });
}

// Replace the scores, scaled and rounded, by their softmax.
template <bool kClustered>
__device__ void causal_softmax(const Pass<kClustered>& pass, const Matrix& scores) {
  const int rows_per_window = pass.run.rows_per_window;
  pass.each_row(kRowBlock * pass.run.heads, [&](int row_block, int item) {
    const int i = item % kRowBlock, begin = pass.position(row_block), query = begin + i;
    bfloat16* const row = pass.row(scores, row_block, i) + item / kRowBlock * rows_per_window;
    float largest = -INFINITY, sum = 0;
    pass.each_pair(query + 1, [&](int c) {
      const Pair x = load_pair(row + c);
      largest = fmaxf(largest, x.first);
      if (c < query) largest = fmaxf(largest, x.second);
    });
    largest = row_max(largest);
    pass.each_pair(query + 1, [&](int c) {
      const Pair x = load_pair(row + c);
      sum += expf(x.first - largest);
      if (c < query) sum += expf(x.second - largest);
    });
    const float inverse_sum = 1 / row_sum(sum);
    pass.each_pair(begin + kRowBlock, [&](int c) {
      const Pair x = load_pair(row + c);
      store_pair(row + c, c <= query ? expf(x.first - largest) * inverse_sum : 0,
                 c < query ? expf(x.second - largest) * inverse_sum : 0);
    });
  });
}

// Replace d_weights, the rounded gradient of the attention weights, by the gradient of the scores.
template <bool kClustered>
__device__ void softmax_backward(const Pass<kClustered>& pass, const Matrix& weights, const Matrix& d_weights) {
  pass.each_row(kRowBlock * pass.run.heads, [&](int row_block, int item) {
    const int i = item % kRowBlock, first = item / kRowBlock * pass.run.rows_per_window;
    const int keys = pass.position(row_block) + kRowBlock;
    const bfloat16* const w = pass.row(weights, row_block, i) + first;
    bfloat16* const d = pass.row(d_weights, row_block, i) + first;
    float sum = 0;
    pass.each_pair(keys, [&](int c) {
      const Pair x = load_pair(d + c), y = load_pair(w + c);
      sum = fmaf(x.first, y.first, sum);
      sum = fmaf(x.second, y.second, sum);
    });
    const float mean = row_sum(sum);  // of d_weights, weighted by the attention weights
    pass.each_pair(keys, [&](int c) {
      const Pair x = load_pair(d + c), y = load_pair(w + c);
      store_pair(d + c, y.first * (x.first - mean), y.second * (x.second - mean));
    });
  });
}

}  // namespace bhfast::cuda::resident
