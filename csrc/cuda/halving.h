// Sums in the fixed order of bhfast.ops.arithmetic.grad_norm.
//
// A warp sums a block of kNormBlock values: it adds the second half to the first until one value is left. Of every
// 256 values, thread t has eight, starting at 8 t. So the first two halvings and the last three stay within a thread,
// and the five between them are warp shuffles. No warp waits for another.
#pragma once

#include "launch.h"
#include "warp.h"

namespace bhfast::cuda {

constexpr int kRunLength = 8;                             // adjacent values of one thread
constexpr int kRuns = kNormBlock / (kWarp * kRunLength);  // per thread

// The sum of a warp's values, valid in its first thread.
__device__ inline float sum_by_halving(float (&x)[kRuns][kRunLength]) {
#pragma unroll
  for (int width = kRuns / 2; width > 0; width /= 2) {
#pragma unroll
    for (int run = 0; run < width; ++run) {
#pragma unroll
      for (int i = 0; i < kRunLength; ++i) x[run][i] += x[run + width][i];
    }
  }
#pragma unroll
  for (int width = kWarp / 2; width > 0; width /= 2) {
#pragma unroll
    for (int i = 0; i < kRunLength; ++i) x[0][i] += __shfl_down_sync(kAllLanes, x[0][i], width);
  }
#pragma unroll
  for (int width = kRunLength / 2; width > 0; width /= 2) {
#pragma unroll
    for (int i = 0; i < width; ++i) x[0][i] += x[0][i + width];
  }
  return x[0][0];
}

// Where one of this thread's runs begins in its block.
__device__ inline int run_begin(int run) { return (run * kWarp + threadIdx.x % kWarp) * kRunLength; }

// Set x to the squares of the values of a block.
template <class T>
__device__ void load_squares(const T* block, float (&x)[kRuns][kRunLength]) {
  const bool aligned = is_aligned(block);
#pragma unroll
  for (int run = 0; run < kRuns; ++run) {
    const T* const from = block + run_begin(run);
#pragma unroll
    for (int i = 0; i < kRunLength; i += Pack<T>::kSize) {
      Pack<T> pack;
      if (aligned) {
        pack = *reinterpret_cast<const Pack<T>*>(from + i);
      } else {
        for (int k = 0; k < Pack<T>::kSize; ++k) pack.x[k] = from[i + k];
      }
#pragma unroll
      for (int k = 0; k < Pack<T>::kSize; ++k) x[run][i + k] = to_float(pack.x[k]) * to_float(pack.x[k]);
    }
  }
}

// Set x to value(i) for each i of a block, and to 0 from `count` on.
template <class Value>
__device__ void load_block(float (&x)[kRuns][kRunLength], int64_t count, Value value) {
#pragma unroll
  for (int run = 0; run < kRuns; ++run) {
#pragma unroll
    for (int k = 0; k < kRunLength; ++k) {
      const int64_t i = run_begin(run) + k;
      x[run][k] = i < count ? value(i) : 0.0f;
    }
  }
}

}  // namespace bhfast::cuda
