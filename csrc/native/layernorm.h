// Layer normalisation of kBlock rows: Ba, Kiros and Hinton, arXiv 1607.06450.
#pragma once

#include "network.h"

namespace bhfast::native::BHFAST_ISA {

constexpr float kNormEpsilon = 1e-5f;

// to = weight * (x - mean) / sqrt(variance + eps) + bias; keeps mean and 1 / sqrt(...) of each row.
inline void layer_norm(const Matrix& x, const Norm& norm, float* statistics, const Matrix& to) {
  const float share = 1.0f / x.width;
  for (int i = 0; i < kBlock; ++i) {
    f32 sum{}, squares{};
    for (int64_t c = 0; c < x.width; c += kLanes) sum += load(x.row(i) + c);
    const float mean = sum_of(sum) * share;
    for (int64_t c = 0; c < x.width; c += kLanes) {
      const f32 centered = load(x.row(i) + c) - mean;
      squares = fma(centered, centered, squares);
    }
    statistics[2 * i] = mean;
    statistics[2 * i + 1] = 1 / std::sqrt(sum_of(squares) * share + kNormEpsilon);
  }
  for (int64_t c = 0; c < x.width; c += kLanes) {
    const f32 weight = load(norm.weight.value + c), bias = load(norm.bias.value + c);
    const auto normed = [&](int i) {
      return fma((load(x.row(i) + c) - statistics[2 * i]) * statistics[2 * i + 1], weight, bias);
    };
    for (int i = 0; i < kBlock; i += 2) {
      const f32 first = normed(i), second = normed(i + 1);
      store(to.row(i) + c, first);
      store(to.row(i + 1) + c, second);
      store(to.pair(i, c), pair(first, second));
    }
  }
}

// to = (residual +) the gradient by x, of d_y, the gradient by the result; partial: those by weight and bias,
// [2][width]. residual.rows may be null.
inline void layer_norm_backward(const Matrix& d_y, const Matrix& x, const Norm& norm, const float* statistics,
                                const Matrix& residual, const Matrix& to, float* partial) {
  const float share = 1.0f / x.width;
  float mean_d[kBlock], mean_dx[kBlock];  // of d_y * weight, and of that times the normalised x
  const auto normalised = [&](int i, int64_t c) {
    return (load(x.row(i) + c) - statistics[2 * i]) * statistics[2 * i + 1];
  };
  for (int i = 0; i < kBlock; ++i) {
    f32 sum_d{}, sum_dx{};
    for (int64_t c = 0; c < x.width; c += kLanes) {
      const f32 d = load(d_y.row(i) + c) * load(norm.weight.value + c);
      sum_d += d;
      sum_dx = fma(d, normalised(i, c), sum_dx);
    }
    mean_d[i] = sum_of(sum_d) * share;
    mean_dx[i] = sum_of(sum_dx) * share;
  }
  for (int64_t c = 0; c < x.width; c += kLanes) {
    const f32 weight = load(norm.weight.value + c);
    f32 d_weight{}, d_bias{};
    const auto gradient = [&](int i) {
      const f32 d = load(d_y.row(i) + c), n = normalised(i, c);
      d_weight = fma(d, n, d_weight);
      d_bias += d;
      const f32 d_x = (fma(d, weight, -splat(mean_d[i])) - n * mean_dx[i]) * statistics[2 * i + 1];
      return residual.rows ? load(residual.row(i) + c) + rounded(d_x) : d_x;
    };
    for (int i = 0; i < kBlock; i += 2) {
      const f32 first = gradient(i), second = gradient(i + 1);
      store(to.row(i) + c, first);
      store(to.row(i + 1) + c, second);
      if (to.pairs) store(to.pair(i, c), pair(first, second));
    }
    store(partial + c, d_weight);
    store(partial + x.width + c, d_bias);
  }
}

}  // namespace bhfast::native::BHFAST_ISA
