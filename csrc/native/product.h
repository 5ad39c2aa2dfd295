// Products of matrices: bfloat16 factors, float32 sums.
//
// multiply_block(a, b, vectors, pairs, emit) multiplies a block of rows by `vectors` * kLanes columns. It calls
// emit(row, column, sums) for each part of the result, where sums is f32 [an even number][any number].
#pragma once

#ifdef BHFAST_TILES
#include "product_of_tiles.h"
#else
#include "product_of_vectors.h"
#endif

namespace bhfast::native::BHFAST_ISA {

// to = scale * a b + bias, rounded once, for a block of rows. bias is [width], or null.
inline void multiply(LeftFactor a, RightFactor b, int64_t width, int64_t pairs, const Matrix& to, float scale,
                     const bfloat16* bias) {
  multiply_block(a, b, width / kLanes, pairs, [&](int64_t row, int64_t column, auto& sum) {
    constexpr int kRows = sizeof sum / sizeof sum[0], kVectors = sizeof sum[0] / sizeof sum[0][0];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      const int64_t c = column + j * kLanes;
      const f32 offset = bias ? load(bias + c) : f32{};
#pragma GCC unroll 16
      for (int i = 0; i < kRows; i += 2) {
        store_two_rows(to, row + i, c, fma(sum[i][j], splat(scale), offset), fma(sum[i + 1][j], splat(scale), offset));
      }
    }
  });
}

// to = a b in float32 for a block of rows; to is [kRowBlock][stride].
inline void multiply(LeftFactor a, RightFactor b, int64_t vectors, int64_t pairs, float* to, int64_t stride) {
  multiply_block(a, b, vectors, pairs, [&](int64_t row, int64_t column, auto& sum) {
    constexpr int kRows = sizeof sum / sizeof sum[0], kVectors = sizeof sum[0] / sizeof sum[0][0];
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) store(to + (row + i) * stride + column + j * kLanes, sum[i][j]);
    }
  });
}

}  // namespace bhfast::native::BHFAST_ISA
