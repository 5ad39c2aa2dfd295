// A GPU with one multiprocessor, emulated by one thread of the CPU.
//
// Each CUDA thread is a fiber that runs until it has to wait for others: at a barrier, or for the values of its warp.
// The blocks of a cluster run together, clusters one after another. The order of the clusters, and of the threads
// between two waits, is random, and some warps fall behind for a while, so that a result that depends on the order
// varies. Shared memory is filled with NaN, and each shared variable has its own heap allocation, so that
// AddressSanitizer checks its bounds.
//
// If threads wait at different barriers, or for a thread that has left, the process ends with a message: on a GPU such
// a kernel could hang or compute nonsense.
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

// Whether kernels get the scalars of a step by value, rather than by address.
extern "C" [[gnu::visibility("default")]] bool scalars_by_value;

// Seed the order in which threads and blocks run.
extern "C" [[gnu::visibility("default")]] void cuda_on_cpu_seed(uint64_t seed);

// The block's number in its cluster.
unsigned rank_in_cluster();

// End the process with a message: the kernel is wrong.
[[noreturn]] void die(const char* what);

// Wait for all threads of the group. All must wait at the same place, unless it is null.
void wait_for(Group group, const void* place);

// The two parts of a cluster barrier.
void cluster_arrive();
void cluster_wait();

// Share `size` bytes with the warp. Return the address of thread 0's; thread 1's are kExchanged further on, and so on.
constexpr size_t kExchanged = 64;
const std::byte* hand_over(const void* from, size_t size);

// Return the value of each thread of the warp.
template <class T>
std::array<T, 32> exchange(const T& value) {
  static_assert(sizeof(T) <= kExchanged && std::is_trivially_copyable_v<T>);
  const std::byte* const all = hand_over(&value, sizeof value);
  std::array<T, 32> values;
  for (int lane = 0; lane < 32; ++lane) std::memcpy(&values[lane], all + lane * kExchanged, sizeof(T));
  wait_for(Group::warp, nullptr);  // until all have read them
  return values;
}

// The block's shared variable number `id`.
void* shared_bytes(int id, size_t size);

template <class T>
T& shared(int id) {
  return *static_cast<T*>(shared_bytes(id, sizeof(T)));
}

// The dynamic shared memory of the block.
void* dynamic_shared();

// The address of the same shared variable in the cluster's block `rank`.
void* of_rank(const void* shared, unsigned rank);

// Run a kernel. cluster: the number of blocks in a cluster.
void launch(dim3 grid, dim3 block, size_t shared, cudaStream_t, const std::function<void()>& kernel,
            unsigned cluster = 1);

}  // namespace cuda_on_cpu
