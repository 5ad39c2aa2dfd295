// The resident engine's kernel: it runs many training steps of many runs, each on a cluster of blocks.
#include "launch.h"
#include "resident.h"
#include "resident/step.h"

namespace bhfast::cuda {
namespace {

using namespace resident;

// runs: one after the other, run_bytes each.
template <bool kClustered>
__global__ void __launch_bounds__(kThreads, 1)
    resident_kernel(const uint4* runs, int64_t run_bytes, int blocks_log2, int64_t first_step, int64_t steps) {
  extern __shared__ uint4 memory[];
  const int64_t words = run_bytes / sizeof(uint4);
  const uint4* const own = runs + (blockIdx.x >> blocks_log2) * words;
  for (int64_t i = threadIdx.x; i < words; i += kThreads) memory[i] = own[i];
  __syncthreads();

  const Run& run = *reinterpret_cast<const Run*>(memory);
  const auto* const blocks = reinterpret_cast<const Block*>(&run + 1);
  const auto* const updates = reinterpret_cast<const Update*>(blocks + run.layers);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  uint4* const staged = memory + words;
  auto* const sums = reinterpret_cast<float*>(staged + kWarps * kWarp);
  int rank = 0;
  if constexpr (kClustered) rank = cluster_rank();
  const Pass<kClustered> pass{run,
                              blocks,
                              updates,
                              reinterpret_cast<const RecordedRows*>(updates + run.update_count),
                              reinterpret_cast<char*>(memory),
                              staged + warp * kWarp,
                              sums,
                              warp,
                              lane,
                              rank,
                              blocks_log2};
  for (int64_t step = first_step; step < first_step + steps; ++step) run_step(pass, step);
}

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("the resident kernel: ") + cudaGetErrorString(error));
}

}  // namespace

int64_t resident_shared_bytes() {
  int device, bytes;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return bytes;
}

void run_resident(const ResidentLaunch& l, cudaStream_t stream) {
  const auto kernel = l.blocks_log2 ? resident_kernel<true> : resident_kernel<false>;
  const unsigned blocks = 1u << l.blocks_log2;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(l.shared_bytes)));
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
  check(cudaLaunchKernelEx(&config, kernel, static_cast<const uint4*>(l.runs), l.run_bytes, l.blocks_log2, l.first_step,
                           l.steps));
}

}  // namespace bhfast::cuda
