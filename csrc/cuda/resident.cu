// The resident engine's kernel: it runs many training steps of many runs, each on a cluster of blocks.
#include "launch.h"
#include "resident.h"
#include "resident/step.h"

namespace bhfast::cuda {
namespace {

using namespace resident;

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kHasClusters = false;
#else
constexpr bool kHasClusters = true;
#endif

struct Arguments {
  const uint4* runs;  // one after the other, run_bytes each
  int64_t run_bytes;
  int blocks_log2;
  int64_t done, steps;
};

template <bool kClustered>
__device__ __forceinline__ void run_steps(const Arguments& a, uint4* memory) {
  const int64_t words = a.run_bytes / sizeof(uint4);
  const uint4* const own = a.runs + (blockIdx.x >> a.blocks_log2) * words;
  for (int64_t i = threadIdx.x; i < words; i += kThreads) memory[i] = own[i];
  __syncthreads();

  const Run& run = *reinterpret_cast<const Run*>(memory);
  const auto* const blocks = reinterpret_cast<const Block*>(&run + 1);
  const auto* const updates = reinterpret_cast<const Update*>(blocks + run.layers);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  uint4* const staged = memory + words;
  int rank = 0;
  if constexpr (kClustered) rank = cluster_rank();
  const Pass<kClustered> pass{run,
                              blocks,
                              updates,
                              reinterpret_cast<const RecordedRows*>(updates + run.update_count),
                              reinterpret_cast<char*>(memory),
                              staged + warp * kStaged,
                              reinterpret_cast<float*>(staged + kWarps * kStaged),
                              warp,
                              lane,
                              rank,
                              a.blocks_log2};
  const int64_t done = run.start + a.done;
  for (int64_t step = done + 1; step <= done + a.steps; ++step) run_step(pass, step);
}

template <bool kClustered>
__global__ void __launch_bounds__(kThreads, 1) resident_kernel(const __grid_constant__ Arguments arguments) {
  extern __shared__ uint4 memory[];
  if constexpr (!kClustered || kHasClusters) run_steps<kClustered>(arguments, memory);
}

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("the resident kernel: ") + cudaGetErrorString(error));
}

}  // namespace

ResidentLimits resident_limits() {
  int device, shared_bytes, clusters;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  check(cudaDeviceGetAttribute(&clusters, cudaDevAttrClusterLaunch, device));
  return {shared_bytes, clusters != 0};
}

void run_resident(const ResidentLaunch& l, cudaStream_t stream) {
  const auto kernel = l.blocks_log2 ? resident_kernel<true> : resident_kernel<false>;
  const unsigned blocks = 1u << l.blocks_log2;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(l.shared_bytes)));
  constexpr unsigned kPortable = 8;  // blocks that a cluster may have on every GPU with clusters
  if (blocks > kPortable) check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {blocks, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(l.count) * blocks);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = l.shared_bytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = l.blocks_log2 ? 1 : 0;  // older GPUs have no clusters
  const Arguments arguments{static_cast<const uint4*>(l.runs), l.run_bytes, l.blocks_log2, l.done, l.steps};
  check(cudaLaunchKernelEx(&config, kernel, arguments));
}

}  // namespace bhfast::cuda
