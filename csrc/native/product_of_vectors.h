// Products of a block of rows, by vector instructions. Each sum adds its terms in order, two at a time.
#pragma once

#include "factors.h"

namespace bhfast::native::BHFAST_ISA {

// A product is computed in tiles whose sums stay in registers: at most kTileVectors vectors, at most kTileWidth in a
// row.
constexpr int kTileVectors = kRegisters / 2;
constexpr int kTileWidth = kRegisters / 8;

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
BHFAST_INLINE void multiply_columns(LeftFactor a, RightFactor b, int64_t pairs, int64_t column, Emit emit) {
  constexpr int kRows = kTileVectors / (kVectors == 3 ? 4 : kVectors);
  for (int64_t row = 0; row < kRowBlock; row += kRows) {
    multiply_tile<kRows, kVectors>(a.at(row), a.row, a.step, b, pairs, [&](auto& sum) { emit(row, column, sum); });
  }
}

template <class Emit>
BHFAST_INLINE void multiply_block(LeftFactor a, RightFactor b, int64_t vectors, int64_t pairs, Emit emit) {
  int64_t v = 0;
  for (; v + kTileWidth <= vectors; v += kTileWidth) {
    multiply_columns<kTileWidth>(a, {b.first + v * b.panel, b.panel}, pairs, v * kLanes, emit);
  }
  const RightFactor rest{b.first + v * b.panel, b.panel};
  if constexpr (kTileWidth > 2) {
    if (vectors - v == 3) multiply_columns<3>(a, rest, pairs, v * kLanes, emit);
    if (vectors - v == 2) multiply_columns<2>(a, rest, pairs, v * kLanes, emit);
  }
  if (vectors - v == 1) multiply_columns<1>(a, rest, pairs, v * kLanes, emit);
}

}  // namespace bhfast::native::BHFAST_ISA
