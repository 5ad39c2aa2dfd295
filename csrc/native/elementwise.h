// What is done to each element of kBlock rows by itself: embedding, residual connections, GELU.
#pragma once

#include "network.h"

namespace bhfast::native::BHFAST_ISA {

// to = the token's vector + the position's; padding gets those of token 0 and position 0.
inline void embed(const Network& net, int64_t row, const Matrix& to) {
  for (int i = 0; i < kBlock; ++i) {
    const int64_t token = std::max(net.tokens[row + i], 0), position = (row + i) % net.rows_per_window;
    const bfloat16* const one = net.wte.weight.rows + token * to.width;
    const bfloat16* const other = net.wpe.value + (position < net.shape.context ? position : 0) * to.width;
    for (int64_t c = 0; c < to.width; c += kLanes) store(to.row(i) + c, load(one + c) + load(other + c));
  }
}

// to = x + y
inline void add(const Matrix& x, const Matrix& y, const Matrix& to) {
  for (int i = 0; i < kBlock; ++i) {
    for (int64_t c = 0; c < to.width; c += kLanes) store(to.row(i) + c, load(x.row(i) + c) + load(y.row(i) + c));
  }
}

// The tanh form, x / 2 (1 + tanh u) with u = sqrt(2 / pi) (x + 0.044715 x^3), is x sigmoid(2 u): Hendrycks and Gimpel,
// arXiv 1606.08415.
constexpr float kGeluScale = 2 * 0.7978845608f, kGeluCubic = 0.044715f;

BHFAST_INLINE f32 gelu_sigmoid(f32 x) {
  const f32 u = x * kGeluScale * fma(x * x, splat(kGeluCubic), splat(1.0f));
  return 1 / (1 + exp(-u));
}

inline void gelu(const Matrix& x, const Matrix& to) {
  for (int i = 0; i < kBlock; i += 2) {
    for (int64_t c = 0; c < x.width; c += kLanes) {
      const f32 x0 = load(x.row(i) + c), x1 = load(x.row(i + 1) + c);
      const f32 first = x0 * gelu_sigmoid(x0), second = x1 * gelu_sigmoid(x1);
      store(to.row(i) + c, first);
      store(to.row(i + 1) + c, second);
      store(to.pair(i, c), pair(first, second));
    }
  }
}

BHFAST_INLINE f32 gelu_slope(f32 x) {
  const f32 s = gelu_sigmoid(x);
  const f32 slope = kGeluScale * fma(x * x, splat(3 * kGeluCubic), splat(1.0f));  // of 2 u
  return fma(x * slope, s * (1 - s), s);
}

// to = d_y times the slope at x; d_y may be `to` itself.
inline void gelu_backward(const Matrix& d_y, const Matrix& x, const Matrix& to) {
  for (int i = 0; i < kBlock; i += 2) {
    for (int64_t c = 0; c < x.width; c += kLanes) {
      const f32 first = load(d_y.row(i) + c) * gelu_slope(load(x.row(i) + c));
      const f32 second = load(d_y.row(i + 1) + c) * gelu_slope(load(x.row(i + 1) + c));
      store(to.row(i) + c, first);
      store(to.row(i + 1) + c, second);
      store(to.pair(i, c), pair(first, second));
    }
  }
}

}  // namespace bhfast::native::BHFAST_ISA
