// A GPU of one multiprocessor, played by one thread of the CPU.
//
// Each thread of a block is a fiber that runs until it has to wait for others: at a barrier, or for the values of its
// warp. The blocks of a cluster run together, clusters one after the other; the order of clusters, and of the threads
// in every round, is drawn at random, so that what depends on the order comes out differently from time to time. Shared
// memory is filled with NaN, and each variable is a block of the heap, so that AddressSanitizer watches its bounds.
//
// A kernel that could hang or go wrong on a GPU ends the process with a message: threads that wait at different
// barriers, or for a thread that has left.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#include "cuda_runtime_api.h"

struct uint3 {
  unsigned x = 0, y = 0, z = 0;
};

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace cuda_on_cpu {

enum class Group { warp, block, cluster };

extern cudaError_t last_error;

// Whether kernels are handed the numbers of a step themselves, rather than their addresses.
extern "C" bool numbers_by_value;

// Seed the order that threads and blocks run in.
extern "C" void cuda_on_cpu_seed(uint64_t seed);

// The block's number in its cluster.
unsigned rank_in_cluster();

// End the process: the kernel is wrong.
[[noreturn]] void die(const char* what);

// Wait for all threads of the group, which must come to the same place; null: to any place.
void wait_for(Group group, const void* place);

// A barrier of the cluster in two parts.
void cluster_arrive();
void cluster_wait();

// Hand `size` bytes to the other threads of the warp; return where those of thread 0 lie, `stride` before thread 1's.
constexpr size_t kExchanged = 64;
const std::byte* hand_over(const void* from, size_t size);

// Each thread of the warp's value.
template <class T>
std::array<T, 32> exchange(const T& value) {
  static_assert(sizeof(T) <= kExchanged && std::is_trivially_copyable_v<T>);
  const std::byte* const all = hand_over(&value, sizeof value);
  std::array<T, 32> values;
  for (int lane = 0; lane < 32; ++lane) std::memcpy(&values[lane], all + lane * kExchanged, sizeof(T));
  wait_for(Group::warp, nullptr);  // before the next one overwrites them
  return values;
}

// The block's shared variable number `id`.
void* shared_bytes(int id, size_t size);

template <class T>
T& shared(int id) {
  return *static_cast<T*>(shared_bytes(id, sizeof(T)));
}

// What the launch asked for besides.
void* dynamic_shared();

// Where a shared variable of this block lies in the cluster's block `rank`.
void* of_rank(const void* shared, unsigned rank);

// Run a kernel. cluster: blocks of a cluster.
void launch(dim3 grid, dim3 block, size_t shared, cudaStream_t, const std::function<void()>& kernel,
            unsigned cluster = 1);

}  // namespace cuda_on_cpu
