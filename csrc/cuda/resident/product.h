// Products of matrices: bfloat16 factors, float32 sums. A warp computes a tile of 16 by 16 results; each sum adds its
// terms in order, 16 at a time.
#pragma once

#include "pass.h"

namespace bhfast::cuda::resident {

constexpr int kTile = kRowBlock;

// A factor of a product: tiles of 16 by 16 values, one for each step of the sum.
struct Factor {
  const bfloat16* at;  // of the first tile
  int64_t step;        // elements from one tile to the next
  int stride;          // elements from row to row
  int rows, fewer;     // a tile's rows from `rows` on count as zeros; each tile has `fewer` than the one before
  int row_block;       // negative, or the first of a series of row blocks of which each belongs to another block: then
                       // `at` is where this block keeps its first one
  bool is_near;        // in the block's own shared memory
};

// Tiles side by side, in a block of rows.
template <bool kClustered>
__device__ Factor across(const Pass<kClustered>& pass, const Matrix& m, int row_block, int column) {
  return {pass.rows(m, row_block) + column, kTile, m.stride, kTile, 0, -1, pass.is_near(m, row_block)};
}

// Tiles one below the other, from a block of rows on.
template <bool kClustered>
__device__ Factor down(const Pass<kClustered>& pass, const Matrix& m, int row_block, int column) {
  const bool is_spread = kClustered && m.in_shared;
  return {pass.at(m, is_spread ? 0 : row_block) + column,
          int64_t{kTile} * m.stride,
          m.stride,
          kTile,
          0,
          is_spread ? row_block : -1,
          m.in_shared != 0};
}

__device__ inline Factor weights_across(const Linear& layer, int output) {
  const int rows = layer.outputs - output;
  return {layer.weight.value + int64_t{output} * layer.inputs, kTile, layer.inputs, rows, 0, -1, false};
}

__device__ inline Factor weights_down(const Linear& layer, int input) {
  return {layer.weight.value + input, int64_t{kTile} * layer.inputs, layer.inputs, layer.outputs, kTile, -1, false};
}

// Where a warp computes.
struct Place {
  uint4* staged;
  int lane, rank, blocks_log2;
};

struct Tile {
  const bfloat16* at;
  int rows;
  bool is_near;
};

template <bool kClustered>
__device__ Tile tile(const Place& place, const Factor& f, int k) {
  if (kClustered && f.row_block >= 0) {
    const int row_block = f.row_block + k, owner = row_block & ((1 << place.blocks_log2) - 1);
    const bfloat16* const own = f.at + (row_block >> place.blocks_log2) * f.step;
    return {owner == place.rank ? own : of_rank(own, owner), kTile, owner == place.rank};
  }
  return {f.at + k * f.step, f.rows - k * f.fewer, f.is_near};
}

// The thread's part of a tile that is not near: half a row.
__device__ inline uint4 fetch(const Tile& t, int stride, int lane) {
  if (t.is_near || lane / 2 >= t.rows) return {0, 0, 0, 0};
  return *reinterpret_cast<const uint4*>(t.at + int64_t{lane / 2} * stride + lane % 2 * 8);
}

// Where a thread's part of a staged tile lies, without bank conflicts. half: of the row.
__device__ inline int staged_at(int row, int half) { return 2 * row + (half ^ (row / 4 % 2)); }

__device__ inline void stage(const Tile& t, uint4* staged, uint4 part, int lane) {
  if (!t.is_near) staged[staged_at(lane / 2, lane % 2)] = part;
}

// The four 8 by 8 quarters of a tile, as ldmatrix distributes them: upper left, lower left, upper right, lower right.
template <bool kTransposed>
__device__ void load_quarters(const Tile& t, int stride, const uint4* staged, int lane, uint32_t (&quarters)[4]) {
  const int row = lane % kTile, half = lane / kTile;
  if (t.is_near) {
    ldmatrix_x4<kTransposed>(quarters, t.at + row * stride + half * 8);
  } else {
    ldmatrix_x4<kTransposed>(quarters, staged + staged_at(row, half));
  }
}

struct Sums {
  float tile[2][4];  // of columns 0 to 7, and 8 to 15
  float rows[4];     // of the left factor, alone: all columns are the same
};

constexpr uint32_t kPairOfOnes = 0x3f803f80;

// The sum of `steps` products of tiles. A tile of the left factor has the sum's index as its columns, or, transposed,
// as its rows; one of the right factor the other way around. Not inlined: it is most of the code.
template <bool kTransposeLeft, bool kTransposeRight, bool kClustered>
__device__ __attribute__((noinline)) Sums multiply(Place place, int steps, Factor left, Factor right) {
  Sums sums{};
  uint4* const staged_right = place.staged + kAhead * kWarp;
  uint4 a[kAhead], b[kAhead];
  const auto fetch_from = [&](int first) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (first + i >= steps) continue;
      a[i] = fetch(tile<kClustered>(place, left, first + i), left.stride, place.lane);
      b[i] = fetch(tile<kClustered>(place, right, first + i), right.stride, place.lane);
    }
  };
  fetch_from(0);
  for (int first = 0; first < steps; first += kAhead) {
    __syncwarp();  // all have read what was staged before
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (first + i >= steps) continue;
      stage(tile<kClustered>(place, left, first + i), place.staged + i * kWarp, a[i], place.lane);
      stage(tile<kClustered>(place, right, first + i), staged_right + i * kWarp, b[i], place.lane);
    }
    fetch_from(first + kAhead);  // while the warp computes
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (first + i >= steps) continue;
      const Tile l_tile = tile<kClustered>(place, left, first + i), r_tile = tile<kClustered>(place, right, first + i);
      uint32_t l[4], r[4];
      load_quarters<kTransposeLeft>(l_tile, left.stride, place.staged + i * kWarp, place.lane, l);
      load_quarters<!kTransposeRight>(r_tile, right.stride, staged_right + i * kWarp, place.lane, r);
      const uint32_t factor[4] = {l[0], l[kTransposeLeft ? 2 : 1], l[kTransposeLeft ? 1 : 2], l[3]};
      mma_m16n8k16(sums.tile[0], factor, {r[0], r[kTransposeRight ? 2 : 1]});
      mma_m16n8k16(sums.tile[1], factor, {r[kTransposeRight ? 1 : 2], r[3]});
      if (kTransposeLeft) mma_m16n8k16(sums.rows, factor, {kPairOfOnes, kPairOfOnes});
    }
  }
  return sums;
}

template <bool kTransposeLeft, bool kTransposeRight, bool kClustered>
__device__ Sums multiply(const Pass<kClustered>& pass, int steps, const Factor& left, const Factor& right) {
  const Place place{pass.staged, pass.lane, pass.rank, pass.blocks_log2};
  return multiply<kTransposeLeft, kTransposeRight, kClustered>(place, steps, left, right);
}

// Call emit(row, column, first, second) for the thread's results: those of a column and the next.
template <class Emit>
__device__ void each_result(const Sums& sums, int lane, Emit emit) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int right = 0; right < 2; ++right) {
      emit(lane / 4 + half * 8, right * 8 + lane % 4 * 2, sums.tile[right][2 * half], sums.tile[right][2 * half + 1]);
    }
  }
}

// x times the transposed weight, plus the bias: emit(row block, row, column, first, second).
template <bool kClustered, class Emit>
__device__ void linear(const Pass<kClustered>& pass, const Linear& layer, const Matrix& x, int columns, Emit emit) {
  pass.each_tile(columns, [&](int row_block, int column) {
    const Sums sums =
        multiply<false, true>(pass, layer.inputs / kTile, across(pass, x, row_block, 0), weights_across(layer, column));
    each_result(sums, pass.lane, [&](int i, int c, float first, float second) {
      const Pair bias = layer.bias.value ? load_pair(layer.bias.value + column + c) : Pair{0, 0};
      emit(row_block, i, column + c, first + bias.first, second + bias.second);
    });
  });
}

// d_y times the weight: emit as above.
template <bool kClustered, class Emit>
__device__ void linear_backward(const Pass<kClustered>& pass, const Linear& layer, const Matrix& d_y, Emit emit) {
  pass.each_tile(layer.inputs, [&](int row_block, int column) {
    const Sums sums = multiply<false, false>(pass, (layer.outputs + kTile - 1) / kTile, across(pass, d_y, row_block, 0),
                                             weights_down(layer, column));
    each_result(sums, pass.lane,
                [&](int i, int c, float first, float second) { emit(row_block, i, column + c, first, second); });
  });
}

// An `emit` that stores the results.
template <bool kClustered>
__device__ auto store_in(const Pass<kClustered>& pass, const Matrix& to) {
  return [&pass, &to](int row_block, int i, int column, float first, float second) {
    store_pair(pass.row(to, row_block, i) + column, first, second);
  };
}

}  // namespace bhfast::cuda::resident
