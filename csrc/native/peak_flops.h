// The upper bound on the speed of matrix products on this machine.
#pragma once

#include "product.h"

namespace bhfast::native::BHFAST_ISA {

constexpr double kFlopsPerPair = 4;  // two products, two sums

// Add up products of values that stay in registers; return how many floating-point operations that took.
inline double multiply_in_registers() {
  constexpr int64_t kRounds = 100'000;
#ifdef BHFAST_TILES
  const TileScope tiles;
  for (int64_t round = 0; round < kRounds; ++round) {
    [&]<int... j>(std::integer_sequence<int, j...>) {
      (tile_dot<j, kLeftTile, kRightTile>(), ...);
    }(std::make_integer_sequence<int, kTileSums>{});
  }
  return kFlopsPerPair * kLanes * kTileRows * kTileRows * kTileSums * kRounds;
#else
  constexpr int kChains = 16;  // independent sums: enough to hide the latency of two dot products a cycle
  f32 sums[kChains];
  volatile float sink = 0;  // volatile, so that the compiler can neither precompute nor drop the loop
  for (f32& sum : sums) sum = splat(float{sink});
  volatile uint32_t one = kPairOfOnes;
  const u32 ones = splat(uint32_t{one});
  for (int64_t round = 0; round < kRounds; ++round) {
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) sums[i] = dot(sums[i], ones, ones);
  }
  for (const f32& sum : sums) sink = sum[0];
  return kFlopsPerPair * kLanes * kChains * kRounds;
#endif
}

// The floating-point operations per second of one thread that waits for no memory: the best of ten tries.
inline double peak_flops() {
  constexpr int kTries = 10;
  double best = 0;
  for (int attempt = 0; attempt < kTries; ++attempt) {
    const auto begin = std::chrono::steady_clock::now();
    const double flops = multiply_in_registers();
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
    best = std::max(best, flops / seconds.count());
  }
  return best;
}

}  // namespace bhfast::native::BHFAST_ISA
