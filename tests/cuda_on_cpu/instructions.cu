// A kernel that uses everything in ptx.h: a matrix product by a cluster of two blocks.
#include "cuda/ptx.h"
#include "instructions.h"

namespace bhfast::cuda {
namespace {

// c = a b, with a [16][32], b [32][8], c [16][8]. Each block sums over half of the inner dimension; the first block
// adds the two sums.
__global__ void product_kernel(const uint16_t* a, const uint16_t* b, float* c) {
  extern __shared__ uint4 staged[];
  __shared__ float partial[16][8];
  const unsigned half = cluster_rank(), lane = threadIdx.x;
  uint16_t* const own_a = reinterpret_cast<uint16_t*>(staged);  // [16][16]
  uint16_t* const own_b = own_a + 16 * 16;                      // [16][8]
  for (unsigned i = lane; i < 16 * 16; i += 32) own_a[i] = a[i / 16 * 32 + half * 16 + i % 16];
  for (unsigned i = lane; i < 16 * 8; i += 32) own_b[i] = b[half * 16 * 8 + i];
  __syncthreads();

  uint32_t of_a[4], of_b[4];
  ldmatrix_x4<false>(of_a, own_a + lane % 16 * 16 + lane / 16 * 8);
  ldmatrix_x4<true>(of_b, own_b + lane % 16 * 8);  // the last two are the first two again
  float sums[4] = {0, 0, 0, 0};
  mma_m16n8k16(sums, of_a, {of_b[0], of_b[1]});
  for (int i = 0; i < 4; ++i) partial[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2] = sums[i];

  cluster_arrive();
  cluster_wait();
  if (half == 0) {
    const float* const other = of_rank(&partial[0][0], 1);
    for (unsigned i = lane; i < 16 * 8; i += 32) c[i] = partial[i / 8][i % 8] + other[i];
  }
  cluster_arrive();
  cluster_wait();  // no block leaves while another reads its memory
}

}  // namespace

void product(const uint16_t* a, const uint16_t* b, float* c) {
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {2, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(2);
  config.blockDim = dim3(32);
  config.dynamicSmemBytes = (16 * 16 + 16 * 8) * sizeof(uint16_t);
  config.attrs = &cluster;
  config.numAttrs = 1;
  cudaLaunchKernelEx(&config, product_kernel, a, b, c);
}

}  // namespace bhfast::cuda
