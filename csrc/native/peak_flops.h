// The upper bound on the speed of matrix products on this machine.
#pragma once

#include "simd.h"

namespace bhfast::native::BHFAST_ISA {

// The floating-point operations per second of one thread whose dot products stay in registers: the best of ten tries.
inline double peak_flops() {
  constexpr int kTries = 10;
  constexpr int kChains = 16;  // independent sums: enough to hide the latency of two dot products a cycle
  constexpr int64_t kRounds = 100'000;
  constexpr double kFlopsPerLane = 4;  // two products, two sums
  f32 sums[kChains];
  volatile float sink = 0;  // volatile, so that the compiler can neither precompute nor drop the loop
  for (f32& sum : sums) sum = splat(float{sink});
  volatile uint32_t one = kPairOfOnes;
  const u32 ones = splat(uint32_t{one});
  double best = 0;
  for (int attempt = 0; attempt < kTries; ++attempt) {
    const auto begin = std::chrono::steady_clock::now();
    for (int64_t round = 0; round < kRounds; ++round) {
#pragma GCC unroll 16
      for (int i = 0; i < kChains; ++i) sums[i] = dot(sums[i], ones, ones);
    }
    for (const f32& sum : sums) sink = sum[0];
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
    best = std::max(best, kFlopsPerLane * kLanes * kChains * kRounds / seconds.count());
  }
  return best;
}

}  // namespace bhfast::native::BHFAST_ISA
