// The factors of products, in the layouts of matrix.h.
#pragma once

#include "matrix.h"

namespace bhfast::native::BHFAST_ISA {

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

}  // namespace bhfast::native::BHFAST_ISA
