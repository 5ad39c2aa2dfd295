// Causal attention of kBlock rows, all heads: Vaswani et al., arXiv 1706.03762. What no query may see is not computed,
// but for the part of a block above the diagonal.
#pragma once

#include "network.h"
#include "product.h"

namespace bhfast::native::BHFAST_ISA {

struct Place {
  int64_t window, begin;  // the first row, in its window
};

// The rows of attention's matrices of one head.
BHFAST_INLINE int64_t head_row(const Network& net, Place at, int64_t head, int64_t row) {
  return (at.window * net.shape.heads + head) * net.rows_per_window + row;
}

BHFAST_INLINE float score_scale(const Network& net) { return 1 / std::sqrt(static_cast<float>(net.head_dim)); }

// to = softmax of the rounded, scaled scores, of queries from `begin` over `keys` keys. Writes to scores.
inline void causal_softmax(float* scores, int64_t stride, int64_t begin, int64_t keys, float scale, const Matrix& to) {
  i32 lane;
  for (int j = 0; j < kLanes; ++j) lane[j] = j;
  float share[kBlock];
  for (int i = 0; i < kBlock; ++i) {
    float* const row = scores + i * stride;
    f32 largest = splat(-INFINITY), sum{};
    for (int64_t c = 0; c < keys; c += kLanes) {
      f32 x = rounded(load(row + c) * scale);
      if (c >= begin) x = lane > static_cast<int>(begin + i - c) ? splat(-INFINITY) : x;
      store(row + c, x);
      largest = max(x, largest);
    }
    const float most = max_of(largest);
    for (int64_t c = 0; c < keys; c += kLanes) {
      const f32 e = exp(load(row + c) - most);
      store(row + c, e);
      sum += e;
    }
    share[i] = 1 / sum_of(sum);
  }
  for (int i = 0; i < kBlock; i += 2) {
    for (int64_t c = 0; c < keys; c += kLanes) {
      const f32 first = load(scores + i * stride + c) * share[i];
      const f32 second = load(scores + (i + 1) * stride + c) * share[i + 1];
      store(to.row(i) + c, first);
      store(to.row(i + 1) + c, second);
      store(to.pair(i, c), pair(first, second));
    }
  }
}

// The weights and the mixed values of the queries in a block. scratch: [kBlock][rows_per_window]
inline void attend(const Network& net, const Block& b, Place at, float* scratch) {
  const int64_t width = net.shape.hidden, stride = net.rows_per_window, keys = at.begin + kBlock;
  const int64_t window = at.window * stride, row = window + at.begin;
  for (int64_t head = 0; head < net.shape.heads; ++head) {
    const int64_t column = head * net.head_dim;
    const Matrix weights = b.weights.at(head_row(net, at, head, at.begin));
    multiply(left(b.qkv.at(row, column)), right_transposed(b.qkv.at(window, width + column)), keys / kLanes,
             net.head_dim / 2, scratch, stride);
    causal_softmax(scratch, stride, at.begin, keys, score_scale(net), weights);
    multiply(left(weights), right(b.qkv.at(window, 2 * width + column)), net.head_dim, keys / 2,
             b.mixed.at(row, column), 1, nullptr);
  }
}

// to = the gradient by the scores of queries over `keys` keys, of d_weights, that by the weights.
inline void softmax_backward(const float* d_weights, int64_t stride, int64_t keys, const Matrix& weights,
                             const Matrix& to) {
  float mean[kBlock];
  for (int i = 0; i < kBlock; ++i) {
    f32 sum{};
    for (int64_t c = 0; c < keys; c += kLanes) {
      sum = fma(rounded(load(d_weights + i * stride + c)), load(weights.row(i) + c), sum);
    }
    mean[i] = sum_of(sum);
  }
  const auto gradient = [&](int i, int64_t c) {
    return load(weights.row(i) + c) * (rounded(load(d_weights + i * stride + c)) - mean[i]);
  };
  for (int i = 0; i < kBlock; i += 2) {
    for (int64_t c = 0; c < keys; c += kLanes) {
      const f32 first = gradient(i, c), second = gradient(i + 1, c);
      store(to.row(i) + c, first);
      store(to.row(i + 1) + c, second);
      store(to.pair(i, c), pair(first, second));
    }
  }
}

// The gradients by the scores and the queries of a block. scratch: [kBlock][rows_per_window]
inline void attend_backward_queries(const Network& net, const Block& b, Place at, float* scratch) {
  const int64_t width = net.shape.hidden, stride = net.rows_per_window, keys = at.begin + kBlock;
  const int64_t window = at.window * stride, row = window + at.begin;
  for (int64_t head = 0; head < net.shape.heads; ++head) {
    const int64_t column = head * net.head_dim, at_head = head_row(net, at, head, at.begin);
    const Matrix d_scores = b.d_scores.at(at_head);
    multiply(left(b.d_mixed.at(row, column)), right_transposed(b.qkv.at(window, 2 * width + column)), keys / kLanes,
             net.head_dim / 2, scratch, stride);
    softmax_backward(scratch, stride, keys, b.weights.at(at_head), d_scores);
    multiply(left(d_scores), right(b.qkv.at(window, width + column)), net.head_dim, keys / 2, b.d_qkv.at(row, column),
             score_scale(net), nullptr);
  }
}

// The gradients by the keys and the values of a block, of the queries of all blocks from there on.
inline void attend_backward_keys(const Network& net, const Block& b, Place at) {
  const int64_t width = net.shape.hidden, queries = net.rows_per_window - at.begin;
  const int64_t row = at.window * net.rows_per_window + at.begin;
  for (int64_t head = 0; head < net.shape.heads; ++head) {
    const int64_t column = head * net.head_dim, at_head = head_row(net, at, head, at.begin);
    multiply(left_transposed(b.d_scores.at(at_head, at.begin)), right(b.qkv.at(row, column)), net.head_dim, queries / 2,
             b.d_qkv.at(row, width + column), score_scale(net), nullptr);
    multiply(left_transposed(b.weights.at(at_head, at.begin)), right(b.d_mixed.at(row, column)), net.head_dim,
             queries / 2, b.d_qkv.at(row, 2 * width + column), 1, nullptr);
  }
}

}  // namespace bhfast::native::BHFAST_ISA
