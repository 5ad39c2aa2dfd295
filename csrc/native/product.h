// Products of matrices: bfloat16 factors, sums in float32, each sum over its terms in order, two at a time.
#pragma once

#include "matrix.h"

namespace bhfast::native::BHFAST_ISA {

// A tile of sums stays in registers: at most kSums vectors, at most kWide side by side.
constexpr int kSums = kLanes == 16 ? 16 : 8;
constexpr int kWide = kLanes == 16 ? 4 : 2;

// Where pair k of row i lies: at(i) + k * step.
struct Left {
  const uint32_t* first;
  int64_t row, panel, step;

  const uint32_t* at(int64_t i) const { return first + i / kLanes * panel + i % kLanes * row; }
};

// Where the pairs k of kLanes columns lie: first + column / kLanes * panel + k * kLanes.
struct Right {
  const uint32_t* first;
  int64_t panel;
};

BHFAST_INLINE Left left(const Matrix& m) {
  return {reinterpret_cast<const uint32_t*>(m.rows), m.width / 2, m.width / 2 * kLanes, 1};
}
BHFAST_INLINE Left left_transposed(const Matrix& m) { return {m.pairs, 1, m.pairs_panel, kLanes}; }
BHFAST_INLINE Right right(const Matrix& m) { return {m.pairs, m.pairs_panel}; }
BHFAST_INLINE Right right_transposed(const Matrix& m) { return {m.turned, m.turned_panel}; }

template <int kRows, int kVectors, class Emit>
BHFAST_INLINE void tile(const uint32_t* a, int64_t row, int64_t step, Right b, int64_t pairs, Emit emit) {
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
      uint32_t one;
      __builtin_memcpy(&one, a + i * row + k * step, sizeof one);
      const u32 all = splat(one);
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) sum[i][j] = dot(sum[i][j], all, columns[j]);
    }
  }
  emit(sum);
}

template <int kVectors, class Emit>
BHFAST_INLINE void tiles(Left a, Right b, int64_t rows, int64_t pairs, int64_t column, Emit emit) {
  constexpr int kRows = kSums / (kVectors == 3 ? 4 : kVectors);
  for (int64_t row = 0; row < rows; row += kRows) {
    tile<kRows, kVectors>(a.at(row), a.row, a.step, b, pairs, [&](auto& sum) { emit(row, column, sum); });
  }
}

// Call emit(row, column, sums) for each tile of the product of `rows` rows and `vectors` * kLanes columns, where sums
// is f32 [an even number][any number].
template <class Emit>
BHFAST_INLINE void product(Left a, Right b, int64_t rows, int64_t vectors, int64_t pairs, Emit emit) {
  int64_t v = 0;
  for (; v + kWide <= vectors; v += kWide) {
    tiles<kWide>(a, {b.first + v * b.panel, b.panel}, rows, pairs, v * kLanes, emit);
  }
  const Right rest{b.first + v * b.panel, b.panel};
  if constexpr (kWide > 2) {
    if (vectors - v == 3) tiles<3>(a, rest, rows, pairs, v * kLanes, emit);
    if (vectors - v == 2) tiles<2>(a, rest, rows, pairs, v * kLanes, emit);
  }
  if (vectors - v == 1) tiles<1>(a, rest, rows, pairs, v * kLanes, emit);
}

// to = scale * a b + bias, rounded once, in its rows and, if it keeps them, its pairs. bias is [width], or null.
inline void multiply(Left a, Right b, int64_t width, int64_t pairs, const Matrix& to, float scale,
                     const bfloat16* bias) {
  product(a, b, kBlock, width / kLanes, pairs, [&](int64_t row, int64_t column, auto& sum) {
    constexpr int kRows = sizeof sum / sizeof sum[0], kVectors = sizeof sum[0] / sizeof sum[0][0];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      const int64_t c = column + j * kLanes;
      const f32 offset = bias ? load(bias + c) : f32{};
#pragma GCC unroll 16
      for (int i = 0; i < kRows; i += 2) {
        const f32 first = fma(sum[i][j], splat(scale), offset), second = fma(sum[i + 1][j], splat(scale), offset);
        store(to.row(row + i) + c, first);
        store(to.row(row + i + 1) + c, second);
        if (to.pairs) store(to.pair(row + i, c), pair(first, second));
      }
    }
  });
}

// to = a b in float32, [kBlock][stride].
inline void multiply(Left a, Right b, int64_t vectors, int64_t pairs, float* to, int64_t stride) {
  product(a, b, kBlock, vectors, pairs, [&](int64_t row, int64_t column, auto& sum) {
    constexpr int kRows = sizeof sum / sizeof sum[0], kVectors = sizeof sum[0] / sizeof sum[0][0];
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) store(to + (row + i) * stride + column + j * kLanes, sum[i][j]);
    }
  });
}

}  // namespace bhfast::native::BHFAST_ISA
