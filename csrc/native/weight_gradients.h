// The gradients of all parameters, from those of all activations. Each sums over all rows, in order.
#pragma once

#include "pass.h"
#include "product.h"

namespace bhfast::native::BHFAST_ISA {

// Of the weights and biases of kRowBlock outputs of a linear layer with input x.
inline void linear_gradient(const Network& net, const Linear& layer, const Matrix& x, const Matrix& d_y,
                            int64_t output) {
  Matrix grad;
  grad.rows = layer.grad + output * layer.inputs;
  grad.width = layer.inputs;
  multiply(left_transposed(d_y.at(0, output)), right(x), layer.inputs, net.rows / 2, grad, 1, nullptr);
  for (int64_t c = output; c < output + kRowBlock; c += kLanes) {
    f32 sum{};
    for (int64_t row = 0; row < net.rows; row += 2) sum = dot(sum, load(d_y.pair(row, c)), splat(kPairOfOnes));
    store(layer.bias.grad + c, sum);
  }
}

// Of the vectors of kRowBlock tokens, as rows of the output layer and as embeddings. Frozen tokens have none.
// scratch: [kRowBlock][hidden]
inline void token_gradient(const Network& net, int64_t token, const bool* frozen, float* scratch) {
  const int64_t width = net.shape.hidden;
  multiply(left_transposed(net.logits.at(0, token)), right(net.normed), width / kLanes, net.rows / 2, scratch, width);
  for (int32_t row = net.first_row[token / kRowBlock]; row >= 0; row = net.next_row[row]) {
    float* const sum = scratch + (net.tokens[row] - token) * width;
    for (int64_t c = 0; c < width; c += kLanes) store(sum + c, load(sum + c) + load(net.d_embedded.row(row) + c));
  }
  for (int64_t i = 0; i < std::min<int64_t>(kRowBlock, net.shape.vocab - token); ++i) {
    if (frozen && frozen[token + i]) std::fill_n(scratch + i * width, width, 0.0f);
    for (int64_t c = 0; c < width; c += kLanes) {
      store(net.wte.grad + (token + i) * width + c, load(scratch + i * width + c));
    }
  }
}

// Of the vector of a position.
inline void position_gradient(const Network& net, int64_t position) {
  const int64_t width = net.shape.hidden;
  for (int64_t c = 0; c < width; c += kLanes) {
    f32 sum{};
    for (int64_t row = position; row < net.rows; row += net.rows_per_window) sum += load(net.d_embedded.row(row) + c);
    store(net.wpe.grad + position * width + c, sum);
  }
}

// Of the weight and bias of a layer normalization.
inline void norm_gradient(const Network& net, const Norm& norm) {
  const int64_t width = net.shape.hidden;
  for (int64_t c = 0; c < width; c += kLanes) {
    f32 d_weight{}, d_bias{};
    const float* const end = norm.partial + net.rows / kRowBlock * 2 * width;
    for (const float* partial = norm.partial + c; partial < end; partial += 2 * width) {
      d_weight += load(partial);
      d_bias += load(partial + width);
    }
    store(norm.weight.grad + c, d_weight);
    store(norm.bias.grad + c, d_bias);
  }
}

// This thread's share of all of them.
inline void weight_gradients(const Pass& pass, const bool* frozen) {
  const Network& net = pass.net;
  int64_t item = 0;
  const auto is_own = [&] { return pass.worker.owns(item++); };
  const auto each_output = [&](const Linear& layer, const Matrix& x, const Matrix& d_y) {
    for (int64_t output = 0; output < layer.outputs; output += kRowBlock) {
      if (is_own()) linear_gradient(net, layer, x, d_y, output);
    }
  };
  for (const Block& block : net.blocks) {
    each_output(block.c_attn, block.normed_1, block.d_qkv);
    each_output(block.attn_proj, block.mixed, block.d_mid);
    each_output(block.c_fc, block.normed_2, block.d_hidden);
    each_output(block.mlp_proj, block.activated, block.d_out);
    if (is_own()) norm_gradient(net, block.ln_1);
    if (is_own()) norm_gradient(net, block.ln_2);
  }
  if (is_own()) norm_gradient(net, net.ln_f);
  for (int64_t token = 0; token < net.shape.vocab; token += kRowBlock) {
    if (is_own()) token_gradient(net, token, frozen, pass.scratch.floats);
  }
  for (int64_t position = 0; position < net.shape.context; ++position) {
    if (is_own()) position_gradient(net, position);
  }
  pass.lap(Activity::weight_gradients);
}

}  // namespace bhfast::native::BHFAST_ISA
