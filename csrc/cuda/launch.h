// What the kernels share: lists of tensors as kernel arguments, and the scalars of a step.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "../ring.h"
#include "../tensors.h"

namespace bhfast::cuda {

constexpr size_t kMaxArgumentBytes = 32764;  // of a kernel: CUDA's limit

constexpr int kShortList = 40;  // items; a kernel with a short list launches faster

// A list passed to a kernel by value. items[i] has the blocks of the grid, or the elements, [first[i], first[i + 1]).
template <class Item, class Index, int N>
struct List {
  Item items[N];
  Index first[N + 1];
  int count;

  // The item that has this block or element.
  __device__ int find(Index index) const {
    int low = 0, high = count;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (first[middle] <= index ? low : high) = middle;
    }
    return low;
  }
};

__device__ inline int64_t slot_of_step(const StepScalars& s) {
  return s.slots ? slot_of(s.device_step ? *s.device_step : s.step, s.every, s.slots) : -1;
}

constexpr int kAccessBytes = 16;  // what a thread reads or writes at once

template <class T>
struct alignas(kAccessBytes) Pack {
  static constexpr int kSize = kAccessBytes / sizeof(T);
  T x[kSize];
};

__host__ __device__ inline bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % kAccessBytes == 0; }

// Throw if the last launch failed.
inline void check_launch(const char* what) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

}  // namespace bhfast::cuda
