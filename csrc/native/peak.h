// The most that products can reach here.
#pragma once

#include "simd.h"

namespace bhfast::native::BHFAST_ISA {

// Floating-point operations per second of one thread whose dot products never wait for memory: the best of ten tries.
inline double peak() {
  constexpr int kChains = 16;  // more than an instruction takes cycles, times two a cycle
  constexpr int64_t kRounds = 100'000;
  f32 sums[kChains];
  volatile float kept = 0;  // what the compiler cannot know, nor leave out
  for (f32& sum : sums) sum = splat(float{kept});
  volatile uint32_t one = kOnes;
  const u32 ones = splat(uint32_t{one});
  double best = 0;
  for (int attempt = 0; attempt < 10; ++attempt) {
    const auto begin = std::chrono::steady_clock::now();
    for (int64_t round = 0; round < kRounds; ++round) {
#pragma GCC unroll 16
      for (int i = 0; i < kChains; ++i) sums[i] = dot(sums[i], ones, ones);
    }
    for (const f32& sum : sums) kept = sum[0];
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
    best = std::max(best, 4.0 * kLanes * kChains * kRounds / seconds.count());
  }
  return best;
}

}  // namespace bhfast::native::BHFAST_ISA
