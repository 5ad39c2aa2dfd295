// Layer normalization of a block of rows: Ba, Kiros and Hinton, arXiv 1607.06450.
#pragma once

#include "network.h"

namespace bhfast::native::BHFAST_ISA {

constexpr float kNormEpsilon = 1e-5f;

// to = weight * (x - mean) / sqrt(variance + eps) + bias. statistics: [kRowBlock][2], set to the mean and
// 1 / sqrt(variance + eps) of each row.
inline void layer_norm(const Matrix& x, const Norm& norm, float* statistics, const Matrix& to) {
  const float inverse_width = 1.0f / x.width;
  for (int i = 0; i < kRowBlock; ++i) {
    f32 sum{}, squares{};
    for (int64_t c = 0; c < x.width; c += kLanes) sum += load(x.row(i) + c);
    const float mean = reduce_sum(sum) * inverse_width;
    for (int64_t c = 0; c < x.width; c += kLanes) {
      const f32 centered = load(x.row(i) + c) - mean;
      squares = fma(centered, centered, squares);
    }
    statistics[2 * i] = mean;
    statistics[2 * i + 1] = 1 / std::sqrt(reduce_sum(squares) * inverse_width + kNormEpsilon);
  }
  for (int64_t c = 0; c < x.width; c += kLanes) {
    const f32 weight = load(norm.weight.value + c), bias = load(norm.bias.value + c);
    const auto normalized = [&](int i) {
      return fma((load(x.row(i) + c) - statistics[2 * i]) * statistics[2 * i + 1], weight, bias);
    };
    for (int i = 0; i < kRowBlock; i += 2) store_two_rows(to, i, c, normalized(i), normalized(i + 1));
  }
}

// d_y is the gradient of the result. Sets `to` to the gradient of x, plus the residual's gradient unless its rows are
// null, and partial, [2][width], to this block's part of the gradients of weight and bias.
inline void layer_norm_backward(const Matrix& d_y, const Matrix& x, const Norm& norm, const float* statistics,
                                const Matrix& residual, const Matrix& to, float* partial) {
  const float inverse_width = 1.0f / x.width;
  float mean_d[kRowBlock], mean_dx[kRowBlock];  // of d_y * weight, and of d_y * weight * normalized x
  const auto normalized = [&](int i, int64_t c) {
    return (load(x.row(i) + c) - statistics[2 * i]) * statistics[2 * i + 1];
  };
  for (int i = 0; i < kRowBlock; ++i) {
    f32 sum_d{}, sum_dx{};
    for (int64_t c = 0; c < x.width; c += kLanes) {
      const f32 d = load(d_y.row(i) + c) * load(norm.weight.value + c);
      sum_d += d;
      sum_dx = fma(d, normalized(i, c), sum_dx);
    }
    mean_d[i] = reduce_sum(sum_d) * inverse_width;
    mean_dx[i] = reduce_sum(sum_dx) * inverse_width;
  }
  for (int64_t c = 0; c < x.width; c += kLanes) {
    const f32 weight = load(norm.weight.value + c);
    f32 d_weight{}, d_bias{};
    const auto gradient = [&](int i) {
      const f32 d = load(d_y.row(i) + c), n = normalized(i, c);
      d_weight = fma(d, n, d_weight);
      d_bias += d;
      const f32 d_x = (fma(d, weight, -splat(mean_d[i])) - n * mean_dx[i]) * statistics[2 * i + 1];
      return residual.rows ? load(residual.row(i) + c) + rounded(d_x) : d_x;
    };
    for (int i = 0; i < kRowBlock; i += 2) {
      const f32 first = gradient(i), second = gradient(i + 1);  // in this order: both add to the sums
      store_two_rows(to, i, c, first, second);
    }
    store(partial + c, d_weight);
    store(partial + x.width + c, d_bias);
  }
}

}  // namespace bhfast::native::BHFAST_ISA
