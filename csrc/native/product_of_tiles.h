// Intel's Advanced Matrix Extensions (AMX): products of tiles, eight registers of up to 16 rows of 64 bytes. See
// chapter "Intel AMX" of Intel's Architecture Instruction Set Extensions reference.
//
// GCC's own intrinsics do not tell the compiler that they read and write memory; these do.
#pragma once

#include "factors.h"

namespace bhfast::native::BHFAST_ISA {

constexpr int kTileRows = 16;   // of a sum, and pairs of a factor
constexpr int kTileBytes = 64;  // of a row
constexpr int kTileSums = 4;    // tiles 0 to 3

// Tiles of factors. A half has half the pairs.
constexpr int kLeftTile = 4, kRightTile = 5, kLeftHalf = 6, kRightHalf = 7;

// This thread may use tiles while one of these exists. Whoever used them before finds them configured as they were.
class TileScope {
 public:
  TileScope() {
    asm volatile("sttilecfg %0" : "=m"(before_));
    Configuration own;
    own.palette = 1;
    for (int tile = 0; tile < 8; ++tile) {
      own.row_bytes[tile] = tile == kLeftHalf ? kTileBytes / 2 : kTileBytes;
      own.rows[tile] = tile == kRightHalf ? kTileRows / 2 : kTileRows;
    }
    asm volatile("ldtilecfg %0" : : "m"(own));
  }
  ~TileScope() { asm volatile("ldtilecfg %0" : : "m"(before_)); }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;

 private:
  struct alignas(64) Configuration {
    uint8_t palette = 0, start_row = 0, reserved[14] = {};  // palette 0: no tiles
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  };
  Configuration before_;
};

template <int kTile>
BHFAST_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
}

// stride: in bytes, from one row to the next.
template <int kTile>
BHFAST_INLINE void tile_load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(kTile) : "memory");
}

template <int kTile>
BHFAST_INLINE void tile_store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(kTile) : "memory");
}

// Add the product of two tiles: see dot() in simd.h.
template <int kSum, int kLeft, int kRight>
BHFAST_INLINE void tile_dot() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kLeft), "i"(kRight));
}

// -------------------------------------------------------------------------------------------------------------------
// Products

// Set kVectors * kLanes columns of the product of a block of rows.
template <int kVectors>
BHFAST_INLINE void multiply_columns(LeftFactor a, RightFactor b, int64_t pairs, f32 (&sums)[kRowBlock][kVectors]) {
  [&]<int... j>(std::integer_sequence<int, j...>) {
    (tile_zero<j>(), ...);
    const auto left_at = [&](int64_t k) { return a.first + k * a.step; };
    const auto right_at = [&](int64_t column, int64_t k) { return b.first + column * b.panel + k * kLanes; };
    const int64_t row = a.row * sizeof *a.first;
    int64_t k = 0;
    for (; k + kTileRows <= pairs; k += kTileRows) {
      tile_load<kLeftTile>(left_at(k), row);
      ((tile_load<kRightTile>(right_at(j, k), kTileBytes), tile_dot<j, kLeftTile, kRightTile>()), ...);
    }
    if (k < pairs) {
      tile_load<kLeftHalf>(left_at(k), row);
      ((tile_load<kRightHalf>(right_at(j, k), kTileBytes), tile_dot<j, kLeftHalf, kRightHalf>()), ...);
    }
    (tile_store<j>(&sums[0][j], sizeof sums[0]), ...);
  }(std::make_integer_sequence<int, kVectors>{});
}

// A transposed factor, with the pairs of each row side by side as a tile needs them, in memory that this thread keeps.
inline LeftFactor arranged(LeftFactor a, int64_t pairs) {
  struct alignas(kTileBytes) Row {
    uint32_t pairs[kLanes];
  };
  thread_local std::vector<Row> memory;
  const int64_t tiles = (pairs + kTileRows - 1) / kTileRows;
  if (std::ssize(memory) < tiles * kTileRows) memory.resize(tiles * kTileRows);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    u32 square[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      const int64_t k = tile * kTileRows + i;
      square[i] = k < pairs ? load(a.first + k * a.step) : u32{};
    }
    transpose(square);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) store(memory[tile * kTileRows + i].pairs, square[i]);
  }
  return {memory[0].pairs, kLanes, 0, kLanes};
}

template <class Emit>
BHFAST_INLINE void multiply_block(LeftFactor a, RightFactor b, int64_t vectors, int64_t pairs, Emit emit) {
  if (a.step != 1) a = arranged(a, pairs);
  const auto columns = [&]<int kVectors>(int64_t v) {
    f32 sums[kRowBlock][kVectors];
    multiply_columns(a, {b.first + v * b.panel, b.panel}, pairs, sums);
    emit(0, v * kLanes, sums);
  };
  int64_t v = 0;
  for (; v + kTileSums <= vectors; v += kTileSums) columns.template operator()<kTileSums>(v);
  if (vectors - v == 3) columns.template operator()<3>(v);
  if (vectors - v == 2) columns.template operator()<2>(v);
  if (vectors - v == 1) columns.template operator()<1>(v);
}

}  // namespace bhfast::native::BHFAST_ISA
