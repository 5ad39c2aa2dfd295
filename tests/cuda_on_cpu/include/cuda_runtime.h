// Replaces CUDA's header of the same name, so that a C++ compiler accepts the .cu files. See machine.h for how kernels
// run, and ../build.py for what has to be rewritten in them (launches and shared memory).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#include "cuda_runtime_api.h"
#include "machine.h"

#define __host__
#define __device__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __cluster_dims__(...)

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) int4 {
  int x, y, z, w;
};

[[gnu::noinline]] inline void __syncthreads() {
  cuda_on_cpu::wait_for(cuda_on_cpu::Group::block, __builtin_return_address(0));
}

inline void __syncwarp(unsigned = ~0u) { cuda_on_cpu::wait_for(cuda_on_cpu::Group::warp, nullptr); }

template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return cuda_on_cpu::exchange(value)[lane & 31];
}

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return cuda_on_cpu::exchange(value)[(threadIdx.x & 31) ^ mask];
}

template <class T>
T __shfl_down_sync(unsigned, T value, unsigned by) {
  const unsigned lane = threadIdx.x & 31;
  return cuda_on_cpu::exchange(value)[lane + by < 32 ? lane + by : lane];
}

inline unsigned __ballot_sync(unsigned, int predicate) {
  const auto predicates = cuda_on_cpu::exchange(predicate != 0);
  unsigned result = 0;
  for (int lane = 0; lane < 32; ++lane) result |= unsigned{predicates[lane]} << lane;
  return result;
}

inline int __ffs(int x) { return __builtin_ffs(x); }

// Threads take turns, so nothing comes between a read and a write.
template <class T>
T atomicAdd(T* at, T x) {
  return std::exchange(*at, *at + x);
}

template <class T>
void __stcs(T* at, T x) {
  *at = x;
}

using std::max;
using std::min;

union cudaLaunchAttributeValue {
  struct {
    unsigned x, y, z;
  } clusterDim;
};
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const unsigned cluster = config->numAttrs ? config->attrs[0].val.clusterDim.x : 1;
  cuda_on_cpu::launch(
      config->gridDim, config->blockDim, config->dynamicSmemBytes, config->stream, [&] { kernel(arguments...); },
      cluster);
  return std::exchange(cuda_on_cpu::last_error, cudaSuccess);
}

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributeNonPortableClusterSizeAllowed };
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) {
  return cudaSuccess;
}

enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaDevAttrClusterLaunch };
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrClusterLaunch ? 1 : 227 << 10;
  return cudaSuccess;
}

inline cudaError_t cudaGetLastError() { return std::exchange(cuda_on_cpu::last_error, cudaSuccess); }
inline const char* cudaGetErrorString(cudaError_t) { return "invalid configuration argument"; }
