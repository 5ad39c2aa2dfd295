// Causal multi-head attention of a block of rows: Vaswani et al., arXiv 1706.03762. Scores of keys after the block are
// not computed; those after a query within the block are masked.
#pragma once

#include "network.h"
#include "product.h"

namespace bhfast::native::BHFAST_ISA {

// The row of the attention matrices, [windows, heads, queries], that belongs to a head and the block's first row.
BHFAST_INLINE int64_t attention_row(const Network& net, RowBlock rows, int64_t head) {
  return (rows.window * net.shape.heads + head) * net.rows_per_window + rows.position;
}

BHFAST_INLINE float score_scale(const Network& net) { return 1 / std::sqrt(static_cast<float>(net.head_dim)); }

// to = softmax of the scaled, rounded scores. The first query has position `begin` and there are `keys` keys. scores:
// [kRowBlock][stride], overwritten.
inline void causal_softmax(float* scores, int64_t stride, int64_t begin, int64_t keys, float scale, const Matrix& to) {
  i32 lane;
  for (int j = 0; j < kLanes; ++j) lane[j] = j;
  float inverse_sum[kRowBlock];
  for (int i = 0; i < kRowBlock; ++i) {
    float* const row = scores + i * stride;
    f32 largest = splat(-INFINITY), sum{};
    for (int64_t c = 0; c < keys; c += kLanes) {
      f32 x = rounded(load(row + c) * scale);
      if (c >= begin) x = lane > static_cast<int>(begin + i - c) ? splat(-INFINITY) : x;
      store(row + c, x);
      largest = max(x, largest);
    }
    const float row_max = reduce_max(largest);
    for (int64_t c = 0; c < keys; c += kLanes) {
      const f32 power = exp(load(row + c) - row_max);
      store(row + c, power);
      sum += power;
    }
    inverse_sum[i] = 1 / reduce_sum(sum);
  }
  fill_block(to, keys, [&](int i, int64_t c) { return load(scores + i * stride + c) * inverse_sum[i]; });
}

// Set the attention weights of a block of queries, and the values mixed with them.
// scratch: [kRowBlock][rows_per_window]
inline void attend(const Network& net, const Block& block, RowBlock rows, float* scratch) {
  const int64_t width = net.shape.hidden, stride = net.rows_per_window, keys = rows.position + kRowBlock;
  const int64_t window = rows.first - rows.position;
  for (int64_t head = 0; head < net.shape.heads; ++head) {
    const int64_t column = head * net.head_dim;
    const Matrix weights = block.weights.at(attention_row(net, rows, head));
    multiply(left(block.qkv.at(rows.first, column)), right_transposed(block.qkv.at(window, width + column)),
             keys / kLanes, net.head_dim / 2, scratch, stride);
    causal_softmax(scratch, stride, rows.position, keys, score_scale(net), weights);
    multiply(left(weights), right(block.qkv.at(window, 2 * width + column)), net.head_dim, keys / 2,
             block.mixed.at(rows.first, column), 1, nullptr);
  }
}

// to = the gradient of the scores, from d_weights, the gradient of the attention weights: [kRowBlock][stride].
inline void softmax_backward(const float* d_weights, int64_t stride, int64_t keys, const Matrix& weights,
                             const Matrix& to) {
  float mean[kRowBlock];  // of d_weights, weighted by the attention weights
  for (int i = 0; i < kRowBlock; ++i) {
    f32 sum{};
    for (int64_t c = 0; c < keys; c += kLanes) {
      sum = fma(rounded(load(d_weights + i * stride + c)), load(weights.row(i) + c), sum);
    }
    mean[i] = reduce_sum(sum);
  }
  fill_block(to, keys, [&](int i, int64_t c) {
    return load(weights.row(i) + c) * (rounded(load(d_weights + i * stride + c)) - mean[i]);
  });
}

// Set the gradients of the scores and the queries of a block. scratch: [kRowBlock][rows_per_window]
inline void attend_backward_queries(const Network& net, const Block& block, RowBlock rows, float* scratch) {
  const int64_t width = net.shape.hidden, stride = net.rows_per_window, keys = rows.position + kRowBlock;
  const int64_t window = rows.first - rows.position;
  for (int64_t head = 0; head < net.shape.heads; ++head) {
    const int64_t column = head * net.head_dim, weights_row = attention_row(net, rows, head);
    const Matrix d_scores = block.d_scores.at(weights_row);
    multiply(left(block.d_mixed.at(rows.first, column)), right_transposed(block.qkv.at(window, 2 * width + column)),
             keys / kLanes, net.head_dim / 2, scratch, stride);
    softmax_backward(scratch, stride, keys, block.weights.at(weights_row), d_scores);
    multiply(left(d_scores), right(block.qkv.at(window, width + column)), net.head_dim, keys / 2,
             block.d_qkv.at(rows.first, column), score_scale(net), nullptr);
  }
}

// Set the gradients of the keys and the values of a block. They sum over the queries of this block and all later ones.
inline void attend_backward_keys_values(const Network& net, const Block& block, RowBlock rows) {
  const int64_t width = net.shape.hidden, queries = net.rows_per_window - rows.position;
  for (int64_t head = 0; head < net.shape.heads; ++head) {
    const int64_t column = head * net.head_dim, weights_row = attention_row(net, rows, head);
    multiply(left_transposed(block.d_scores.at(weights_row, rows.position)), right(block.qkv.at(rows.first, column)),
             net.head_dim, queries / 2, block.d_qkv.at(rows.first, width + column), score_scale(net), nullptr);
    multiply(left_transposed(block.weights.at(weights_row, rows.position)), right(block.d_mixed.at(rows.first, column)),
             net.head_dim, queries / 2, block.d_qkv.at(rows.first, 2 * width + column), 1, nullptr);
  }
}

}  // namespace bhfast::native::BHFAST_ISA
