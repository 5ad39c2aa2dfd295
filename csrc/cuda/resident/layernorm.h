// Layer normalization, half a warp for each row: see native/layernorm.h.
#pragma once

#include "pass.h"

namespace bhfast::cuda::resident {

constexpr float kNormEpsilon = 1e-5f;

// to = weight * (x - mean) / sqrt(variance + eps) + bias, for the block's own rows.
template <bool kClustered>
__device__ void layer_norm(const Pass<kClustered>& pass, const Norm& norm, const Matrix& x, const Matrix& to) {
  const int width = pass.run.hidden;
  const float inverse_width = 1.0f / width;
  pass.each_row(kRowBlock, [&](int row_block, int i) {
    const bfloat16* const from = pass.row(x, row_block, i);
    float sum = 0, squares = 0;
    pass.each_pair(width, [&](int c) {
      const Pair v = load_pair(from + c);
      sum += v.first;
      sum += v.second;
    });
    const float mean = row_sum(sum) * inverse_width;
    pass.each_pair(width, [&](int c) {
      const Pair v = load_pair(from + c);
      squares = fmaf(v.first - mean, v.first - mean, squares);
      squares = fmaf(v.second - mean, v.second - mean, squares);
    });
    const float inverse_deviation = 1 / sqrtf(row_sum(squares) * inverse_width + kNormEpsilon);
    bfloat16* const result = pass.row(to, row_block, i);
    pass.each_pair(width, [&](int c) {
      const Pair v = load_pair(from + c), w = load_pair(norm.weight.value + c), b = load_pair(norm.bias.value + c);
      store_pair(result + c, fmaf((v.first - mean) * inverse_deviation, w.first, b.first),
                 fmaf((v.second - mean) * inverse_deviation, w.second, b.second));
    });
    if (pass.lane % kHalf == 0) {
      float* const statistics = norm.statistics + 2 * (int64_t{row_block} * kRowBlock + i);
      statistics[0] = mean;
      statistics[1] = inverse_deviation;
    }
  });
}

// A row's part of layer_norm_backward.
template <bool kClustered>
__device__ void row_backward(const Pass<kClustered>& pass, const Norm& norm, const bfloat16* d_y, const bfloat16* x,
                             const float* statistics, const bfloat16* residual, bfloat16* to) {
  const int width = pass.run.hidden;
  const float inverse_width = 1.0f / width, mean = statistics[0], inverse_deviation = statistics[1];
  const auto normalized = [&](float v) { return (v - mean) * inverse_deviation; };
  float sum_d = 0, sum_dx = 0;
  pass.each_pair(width, [&](int c) {
    const Pair d = load_pair(d_y + c), w = load_pair(norm.weight.value + c), v = load_pair(x + c);
    const float first = d.first * w.first, second = d.second * w.second;
    sum_d += first;
    sum_d += second;
    sum_dx = fmaf(first, normalized(v.first), sum_dx);
    sum_dx = fmaf(second, normalized(v.second), sum_dx);
  });
  const float mean_d = row_sum(sum_d) * inverse_width, mean_dx = row_sum(sum_dx) * inverse_width;
  const auto gradient = [&](float d, float w, float v) {
    return (fmaf(d, w, -mean_d) - normalized(v) * mean_dx) * inverse_deviation;
  };
  pass.each_pair(width, [&](int c) {
    const Pair d = load_pair(d_y + c), w = load_pair(norm.weight.value + c), v = load_pair(x + c);
    Pair d_x{gradient(d.first, w.first, v.first), gradient(d.second, w.second, v.second)};
    if (residual) {
      const Pair r = load_pair(residual + c);
      d_x = {r.first + rounded_bfloat16(d_x.first), r.second + rounded_bfloat16(d_x.second)};
    }
    store_pair(to + c, d_x.first, d_x.second);
  });
}

// A block's part of the gradients of weight and bias, for two columns.
template <bool kClustered>
__device__ void partial_gradient(const Pass<kClustered>& pass, const Norm& norm, int row_block, const Matrix& d_y,
                                 const Matrix& x, int column) {
  const float* const statistics = norm.statistics + 2 * int64_t{row_block} * kRowBlock;
  Pair d_weight{0, 0}, d_bias{0, 0};
#pragma unroll 4
  for (int i = 0; i < kRowBlock; ++i) {
    const Pair d = load_pair(pass.row(d_y, row_block, i) + column), v = load_pair(pass.row(x, row_block, i) + column);
    const float mean = statistics[2 * i], inverse_deviation = statistics[2 * i + 1];
    d_weight.first = fmaf(d.first, (v.first - mean) * inverse_deviation, d_weight.first);
    d_weight.second = fmaf(d.second, (v.second - mean) * inverse_deviation, d_weight.second);
    d_bias.first += d.first;
    d_bias.second += d.second;
  }
  float* const partial = norm.partial + int64_t{row_block} * 2 * pass.run.hidden + column;
  partial[0] = d_weight.first;
  partial[1] = d_weight.second;
  partial[pass.run.hidden] = d_bias.first;
  partial[pass.run.hidden + 1] = d_bias.second;
}

// d_y is the gradient of the result. Sets `to`, which is another matrix, to the gradient of x, plus the residual's
// gradient unless there is none; and the norm's partial sums.
template <bool kClustered>
__device__ void layer_norm_backward(const Pass<kClustered>& pass, const Norm& norm, const Matrix& d_y, const Matrix& x,
                                    const Matrix* residual, const Matrix& to) {
  pass.each_row(kRowBlock, [&](int row_block, int i) {
    const float* const statistics = norm.statistics + 2 * (int64_t{row_block} * kRowBlock + i);
    row_backward(pass, norm, pass.row(d_y, row_block, i), pass.row(x, row_block, i), statistics,
                 residual ? pass.row(*residual, row_block, i) : nullptr, pass.row(to, row_block, i));
  });
  pass.each_own((pass.run.hidden + 2 * kWarp - 1) / (2 * kWarp), [&](int row_block, int i) {
    const int column = 2 * (i * kWarp + pass.lane);
    if (column < pass.run.hidden) partial_gradient(pass, norm, row_block, d_y, x, column);
  });
}

}  // namespace bhfast::cuda::resident
