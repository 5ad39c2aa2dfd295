// Element by element, for a block of rows: embedding, residual connection, GELU.
#pragma once

#include "network.h"

namespace bhfast::native::BHFAST_ISA {

// to = the token's vector + the position's. Padding gets the vectors of token 0 and position 0.
inline void embed(const Network& net, int64_t row, const Matrix& to) {
  for (int i = 0; i < kRowBlock; ++i) {
    const int64_t token = std::max(net.tokens[row + i], 0), position = (row + i) % net.rows_per_window;
    const bfloat16* const token_vector = net.wte.weight.rows + token * to.width;
    const bfloat16* const position_vector = net.wpe.value + (position < net.shape.context ? position : 0) * to.width;
    for (int64_t c = 0; c < to.width; c += kLanes) {
      store(to.row(i) + c, load(token_vector + c) + load(position_vector + c));
    }
  }
}

// to = x + y
inline void add(const Matrix& x, const Matrix& y, const Matrix& to) {
  for (int i = 0; i < kRowBlock; ++i) {
    for (int64_t c = 0; c < to.width; c += kLanes) store(to.row(i) + c, load(x.row(i) + c) + load(y.row(i) + c));
  }
}

// GELU in its tanh form, x / 2 (1 + tanh u) with u = sqrt(2 / pi) (x + 0.044715 x^3), equals x sigmoid(2 u): Hendrycks
// and Gimpel, arXiv 1606.08415.
constexpr float kGeluScale = 2 * 0.7978845608f, kGeluCubic = 0.044715f;

BHFAST_INLINE f32 gelu_sigmoid(f32 x) {
  const f32 two_u = x * kGeluScale * fma(x * x, splat(kGeluCubic), splat(1.0f));
  return inverse(1 + exp(-two_u));
}

inline void gelu(const Matrix& x, const Matrix& to) {
  fill_block(to, x.width, [&](int i, int64_t c) {
    const f32 value = load(x.row(i) + c);
    return value * gelu_sigmoid(value);
  });
}

BHFAST_INLINE f32 gelu_slope(f32 x) {
  const f32 s = gelu_sigmoid(x);
  const f32 slope_of_two_u = kGeluScale * fma(x * x, splat(3 * kGeluCubic), splat(1.0f));
  return fma(x * slope_of_two_u, s * (1 - s), s);
}

// to = d_y times GELU's slope at x. `to` may be d_y.
inline void gelu_backward(const Matrix& d_y, const Matrix& x, const Matrix& to) {
  fill_block(to, x.width, [&](int i, int64_t c) { return load(d_y.row(i) + c) * gelu_slope(load(x.row(i) + c)); });
}

}  // namespace bhfast::native::BHFAST_ISA
