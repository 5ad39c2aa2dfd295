// Products of matrices: bfloat16 factors, float32 sums. Each sum adds its terms in order, two at a time.
#pragma once

#include "matrix.h"

namespace bhfast::native::BHFAST_ISA {

// A product is computed in tiles whose sums stay in registers: at most kTileVectors vectors, at most kTileWidth in a
// row.
constexpr int kTileVectors = kRegisters / 2;
constexpr int kTileWidth = kRegisters / 8;

// The left factor of a product. Pair k of row i lies at at(i) + k * step.
struct LeftFactor {
  const uint32_t* first;
  int64_t row, panel, step;

  const uint32_t* at(int64_t i) const { return first + i / kLanes * panel + i % kLanes * row; }
};

// The right factor of a product. Pairs k of kLanes columns lie at first + column / kLanes * panel + k * kLanes.
struct RightFactor {
  const uint32_t* first;
  int64_t panel;
};

BHFAST_INLINE LeftFactor left(const Matrix& m) {
  return {reinterpret_cast<const uint32_t*>(m.rows), m.width / 2, m.width / 2 * kLanes, 1};
}
BHFAST_INLINE LeftFactor left_transposed(const Matrix& m) { return {m.pairs, 1, m.pairs_panel, kLanes}; }
BHFAST_INLINE RightFactor right(const Matrix& m) { return {m.pairs, m.pairs_panel}; }
BHFAST_INLINE RightFactor right_transposed(const Matrix& m) { return {m.transposed, m.transposed_panel}; }

template <int kRows, int kVectors, class Emit>
BHFAST_INLINE void multiply_tile(const uint32_t* a, int64_t row, int64_t step, RightFactor b, int64_t pairs,
                                 Emit emit) {
  f32 sum[kRows][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) sum[i][j] = f32{};
  }
  for (int64_t k = 0; k < pairs; ++k) {
    u32 columns[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) columns[j] = load(b.first + j * b.panel + k * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      uint32_t pair;
      __builtin_memcpy(&pair, a + i * row + k * step, sizeof pair);
      const u32 in_all_lanes = splat(pair);
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) sum[i][j] = dot(sum[i][j], in_all_lanes, columns[j]);
    }
  }
  emit(sum);
}

// The tiles of kVectors * kLanes columns, one below the other.
template <int kVectors, class Emit>
BHFAST_INLINE void multiply_columns(LeftFactor a, RightFactor b, int64_t rows, int64_t pairs, int64_t column,
                                    Emit emit) {
  constexpr int kRows = kTileVectors / (kVectors == 3 ? 4 : kVectors);
  for (int64_t row = 0; row < rows; row += kRows) {
    multiply_tile<kRows, kVectors>(a.at(row), a.row, a.step, b, pairs, [&](auto& sum) { emit(row, column, sum); });
  }
}

// Call emit(row, column, sums) for each tile of the product of `rows` rows and `vectors` * kLanes columns, where sums
// is f32 [an even number][any number].
template <class Emit>
BHFAST_INLINE void multiply_tiles(LeftFactor a, RightFactor b, int64_t rows, int64_t vectors, int64_t pairs,
                                  Emit emit) {
  int64_t v = 0;
  for (; v + kTileWidth <= vectors; v += kTileWidth) {
    multiply_columns<kTileWidth>(a, {b.first + v * b.panel, b.panel}, rows, pairs, v * kLanes, emit);
  }
  const RightFactor rest{b.first + v * b.panel, b.panel};
  if constexpr (kTileWidth > 2) {
    if (vectors - v == 3) multiply_columns<3>(a, rest, rows, pairs, v * kLanes, emit);
    if (vectors - v == 2) multiply_columns<2>(a, rest, rows, pairs, v * kLanes, emit);
  }
  if (vectors - v == 1) multiply_columns<1>(a, rest, rows, pairs, v * kLanes, emit);
}

// to = scale * a b + bias, rounded once, for a block of rows. bias is [width], or null.
inline void multiply(LeftFactor a, RightFactor b, int64_t width, int64_t pairs, const Matrix& to, float scale,
                     const bfloat16* bias) {
  multiply_tiles(a, b, kRowBlock, width / kLanes, pairs, [&](int64_t row, int64_t column, auto& sum) {
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
  multiply_tiles(a, b, kRowBlock, vectors, pairs, [&](int64_t row, int64_t column, auto& sum) {
    constexpr int kRows = sizeof sum / sizeof sum[0], kVectors = sizeof sum[0] / sizeof sum[0][0];
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) store(to + (row + i) * stride + column + j * kLanes, sum[i][j]);
    }
  });
}

}  // namespace bhfast::native::BHFAST_ISA
