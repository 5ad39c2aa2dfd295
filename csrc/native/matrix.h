// Matrices of bfloat16, in the layouts that products read. A dot-product instruction takes pairs of values, so the
// packed layouts keep the two values of a pair side by side (Intel calls this VNNI).
#pragma once

#include "simd.h"

namespace bhfast::native::BHFAST_ISA {

// One matrix [rows][width] in up to three layouts; the pointer of a layout that is not kept is null.
//   rows        [rows][width]. The left factor of a product that sums over the width.
//   pairs       [width / kLanes][rows / 2][kLanes], each lane two values of one column. The right factor of a product
//               that sums over the rows, or its left factor, transposed.
//   transposed  [rows / kLanes][width / 2][kLanes], each lane two values of one row. The right factor, transposed, of a
//               product that sums over the width.
// The number of rows is a multiple of kRowBlock. A panel is what lies between two values of the first index.
struct Matrix {
  bfloat16* rows = nullptr;
  int64_t width = 0;
  uint32_t* pairs = nullptr;
  int64_t pairs_panel = 0;  // rows / 2 * kLanes
  uint32_t* transposed = nullptr;
  int64_t transposed_panel = 0;  // width / 2 * kLanes

  // The part that begins at a row divisible by kRowBlock and a column divisible by kMaxLanes.
  Matrix at(int64_t row, int64_t column = 0) const {
    Matrix part = *this;
    if (rows) part.rows += row * width + column;
    if (pairs) part.pairs += column / kLanes * pairs_panel + row / 2 * kLanes;
    if (transposed) part.transposed += row / kLanes * transposed_panel + column / 2 * kLanes;
    return part;
  }

  Matrix rows_only() const { return {rows, width}; }

  bfloat16* row(int64_t i) const { return rows + i * width; }

  // Of rows `row` and `row` + 1, from `column` on.
  uint32_t* pair(int64_t row, int64_t column) const { return pairs + column / kLanes * pairs_panel + row / 2 * kLanes; }
};

// Set kLanes columns of two rows, from an even row on, in `rows` and, if they are kept, in `pairs`.
BHFAST_INLINE void store_two_rows(const Matrix& to, int64_t row, int64_t column, f32 first, f32 second) {
  store(to.row(row) + column, first);
  store(to.row(row + 1) + column, second);
  if (to.pairs) store(to.pair(row, column), pack(first, second));
}

// Set one value of a matrix that keeps its rows and pairs.
BHFAST_INLINE void store_element(const Matrix& to, int64_t row, int64_t column, float value) {
  bfloat16 own;
  bhfast::store(own, bhfast::rounded<bfloat16>(value));
  to.row(row)[column] = own;
  __builtin_memcpy(
      reinterpret_cast<char*>(to.pair(row & ~1, column - column % kLanes) + column % kLanes) + 2 * (row & 1), &own,
      sizeof own);
}

// Set the first `width` columns of a block of rows to value(row, column), a vector of kLanes columns.
template <class Value>
BHFAST_INLINE void fill_block(const Matrix& to, int64_t width, Value value) {
  for (int i = 0; i < kRowBlock; i += 2) {
    for (int64_t c = 0; c < width; c += kLanes) store_two_rows(to, i, c, value(i, c), value(i + 1, c));
  }
}

// Set the pairs of a block of rows, each given by its own pointer.
BHFAST_INLINE void pack_pairs(const bfloat16* const (&rows)[kRowBlock], int64_t width, const Matrix& to) {
  for (int i = 0; i < kRowBlock; i += 2) {
    for (int64_t c = 0; c < width; c += kLanes) {
      const u32 first = widened(load_as<u16>(rows[i] + c));
      const u32 second = widened(load_as<u16>(rows[i + 1] + c));
      store(to.pair(i, c), first | second << 16);
    }
  }
}

// Set the transposed layout of a block of rows, each given by its own pointer.
BHFAST_INLINE void pack_transposed(const bfloat16* const (&rows)[kRowBlock], int64_t width, const Matrix& to) {
  for (int i = 0; i < kRowBlock; i += kLanes) {
    for (int64_t c = 0; c < width / 2; c += kLanes) {
      u32 square[kLanes];
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) square[j] = load_as<u32>(rows[i + j] + 2 * c);
      transpose(square);
      uint32_t* const begin = to.transposed + i / kLanes * to.transposed_panel + c * kLanes;
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) store(begin + j * kLanes, square[j]);
    }
  }
}

}  // namespace bhfast::native::BHFAST_ISA
