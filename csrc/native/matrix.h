// Matrices of bfloat16, in the layouts that products read: two values side by side are multiplied at once.
#pragma once

#include "simd.h"

namespace bhfast::native::BHFAST_ISA {

constexpr int kBlock = 16;  // rows that are worked on together; every matrix has a multiple of it

// Up to three layouts of one matrix [rows][width]; the pointers of those that are not kept are null.
//   rows   [rows][width]: the left factor of a product that sums over its width.
//   pairs  [width / kLanes][rows / 2][kLanes], each lane two values below one another: the right factor of a product
//          that sums over its rows, or the left one, transposed.
//   turned [rows / kLanes][width / 2][kLanes], each lane two values of one row: the right factor, transposed, of a
//          product that sums over its width.
struct Matrix {
  bfloat16* rows = nullptr;
  int64_t width = 0;
  uint32_t* pairs = nullptr;
  int64_t pairs_panel = 0;  // rows / 2 * kLanes
  uint32_t* turned = nullptr;
  int64_t turned_panel = 0;  // width / 2 * kLanes

  // The part that begins at a row divisible by kBlock and a column divisible by 16.
  Matrix at(int64_t row, int64_t column = 0) const {
    Matrix part = *this;
    if (rows) part.rows += row * width + column;
    if (pairs) part.pairs += column / kLanes * pairs_panel + row / 2 * kLanes;
    if (turned) part.turned += row / kLanes * turned_panel + column / 2 * kLanes;
    return part;
  }

  Matrix rows_only() const { return {rows, width}; }

  bfloat16* row(int64_t i) const { return rows + i * width; }

  uint32_t* pair(int64_t row, int64_t column) const { return pairs + column / kLanes * pairs_panel + row / 2 * kLanes; }
};

// Set the pairs of kBlock rows, each at its own place.
BHFAST_INLINE void pair_up(const bfloat16* const (&rows)[kBlock], int64_t width, const Matrix& to) {
  for (int i = 0; i < kBlock; i += 2) {
    for (int64_t c = 0; c < width; c += kLanes) {
      const u32 first = __builtin_convertvector(load_as<u16>(rows[i] + c), u32);
      const u32 second = __builtin_convertvector(load_as<u16>(rows[i + 1] + c), u32);
      store(to.pair(i, c), first | second << 16);
    }
  }
}

// Turn kBlock rows, each at its own place.
BHFAST_INLINE void turn(const bfloat16* const (&rows)[kBlock], int64_t width, const Matrix& to) {
  for (int i = 0; i < kBlock; i += kLanes) {
    for (int64_t c = 0; c < width / 2; c += kLanes) {
      u32 square[kLanes];
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) square[j] = load_as<u32>(rows[i + j] + 2 * c);
      transpose(square);
      uint32_t* const begin = to.turned + i / kLanes * to.turned_panel + c * kLanes;
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) store(begin + j * kLanes, square[j]);
    }
  }
}

}  // namespace bhfast::native::BHFAST_ISA
