// What the kernels share: lists of tensors as kernel arguments, and the numbers of a step.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "../ring.h"
#include "../tensors.h"

namespace bhfast::cuda {

constexpr size_t kMaxArguments = 32764;  // bytes of a kernel's arguments

// Items of a short list, which launches faster.
constexpr int kShort = 40;

// A list handed over by value. Blocks [first[i], first[i + 1]) of the grid, or elements, are those of items[i].
template <class Item, class Index, int N>
struct List {
  Item items[N];
  Index first[N + 1];
  int count;

  __device__ int find(Index index) const {
    int low = 0, high = count;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (first[middle] <= index ? low : high) = middle;
    }
    return low;
  }
};

__device__ inline int64_t slot_of_step(const StepNumbers& n) {
  return n.slots ? slot_of(n.step_at ? *n.step_at : n.step, n.every, n.slots) : -1;
}

constexpr int kBytes = 16;  // that a thread reads at once

template <class T>
struct alignas(kBytes) Pack {
  static constexpr int kSize = kBytes / sizeof(T);
  T x[kSize];
};

__host__ __device__ inline bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % kBytes == 0; }

inline void check(const char* what) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

}  // namespace bhfast::cuda
