// Element by element: embedding and GELU; see native/elementwise.h.
#pragma once

#include "pass.h"

namespace bhfast::cuda::resident {

// The token at a row of the step's windows, counted from 0; -1 in padding. offset: 0, or the target's distance; then -1
// also without a target.
template <bool kClustered>
__device__ int token_at(const Pass<kClustered>& pass, int64_t step, int row, int offset = 0) {
  const Run& run = pass.run;
  const int window = row / run.rows_per_window, position = row % run.rows_per_window;
  if (position >= run.context || (offset && position + offset > run.context)) return -1;
  return run.corpus[run.offsets[(step - 1) * run.windows + window] + position + offset];
}

// x = the token's vector + the position's. Padding gets the vectors of token 0 and position 0.
template <bool kClustered>
__device__ void embed(const Pass<kClustered>& pass, int64_t step, const Matrix& to) {
  const Run& run = pass.run;
  pass.each_row(kRowBlock, [&](int row_block, int i) {
    const int row = row_block * kRowBlock + i, position = row % run.rows_per_window;
    const int token = max(token_at(pass, step, row), 0);
    const bfloat16* const token_vector = run.wte.weight.value + int64_t{token} * run.hidden;
    const bfloat16* const position_vector = run.wpe.value + (position < run.context ? position : 0) * run.hidden;
    bfloat16* const result = pass.row(to, row_block, i);
    pass.each_pair(run.hidden, [&](int c) {
      const Pair x = load_pair(token_vector + c), y = load_pair(position_vector + c);
      store_pair(result + c, x.first + y.first, x.second + y.second);
    });
  });
}

constexpr float kGeluScale = 2 * 0.7978845608f, kGeluCubic = 0.044715f;

__device__ inline float gelu_sigmoid(float x) {
  const float two_u = x * kGeluScale * fmaf(x * x, kGeluCubic, 1.0f);
  return 1 / (1 + expf(-two_u));
}

__device__ inline float gelu(float x) { return x * gelu_sigmoid(x); }

__device__ inline float gelu_slope(float x) {
  const float s = gelu_sigmoid(x);
  const float slope_of_two_u = kGeluScale * fmaf(x * x, 3 * kGeluCubic, 1.0f);
  return fmaf(x * slope_of_two_u, s * (1 - s), s);
}

}  // namespace bhfast::cuda::resident
