// The gradients of all parameters, once those of all activations are there. Each sums over all rows, in order.
#pragma once

#include "network.h"
#include "product.h"

namespace bhfast::native::BHFAST_ISA {

// Of kBlock outputs of a linear layer with input x.
inline void linear_gradient(const Network& net, const Linear& layer, const Matrix& x, const Matrix& d_y,
                            int64_t output) {
  Matrix grad;
  grad.rows = layer.grad + output * layer.inputs;
  grad.width = layer.inputs;
  multiply(left_transposed(d_y.at(0, output)), right(x), layer.inputs, net.rows / 2, grad, 1, nullptr);
  for (int64_t c = output; c < output + kBlock; c += kLanes) {
    f32 sum{};
    for (int64_t row = 0; row < net.rows; row += 2) sum = dot(sum, load(d_y.pair(row, c)), splat(kOnes));
    store(layer.bias.grad + c, sum);
  }
}

// Of kBlock tokens: as rows of the output layer, and as embeddings. scratch: [kBlock][hidden]
inline void token_gradient(const Network& net, int64_t token, float* scratch) {
  const int64_t width = net.shape.hidden;
  multiply(left_transposed(net.logits.at(0, token)), right(net.normed), width / kLanes, net.rows / 2, scratch, width);
  for (int32_t row = net.first_row[token / kBlock]; row >= 0; row = net.next_row[row]) {
    float* const sum = scratch + (net.tokens[row] - token) * width;
    for (int64_t c = 0; c < width; c += kLanes) store(sum + c, load(sum + c) + load(net.d_embedded.row(row) + c));
  }
  for (int64_t i = 0; i < std::min<int64_t>(kBlock, net.shape.vocab - token); ++i) {
    for (int64_t c = 0; c < width; c += kLanes) {
      store(net.wte.grad + (token + i) * width + c, load(scratch + i * width + c));
    }
  }
}

// Of a position's vector.
inline void position_gradient(const Network& net, int64_t position) {
  const int64_t width = net.shape.hidden;
  for (int64_t c = 0; c < width; c += kLanes) {
    f32 sum{};
    for (int64_t row = position; row < net.rows; row += net.rows_per_window) sum += load(net.d_embedded.row(row) + c);
    store(net.wpe.grad + position * width + c, sum);
  }
}

// Of a layer normalisation.
inline void norm_gradient(const Network& net, const Norm& norm) {
  const int64_t width = net.shape.hidden;
  for (int64_t c = 0; c < width; c += kLanes) {
    f32 d_weight{}, d_bias{};
    for (const float* part = norm.partial + c; part < norm.partial + net.rows / kBlock * 2 * width; part += 2 * width) {
      d_weight += load(part);
      d_bias += load(part + width);
    }
    store(norm.weight.grad + c, d_weight);
    store(norm.bias.grad + c, d_bias);
  }
}

}  // namespace bhfast::native::BHFAST_ISA
