// The gradient norm, summed in the fixed order of bhfast.ops.arithmetic.grad_norm, and the clip coefficient. One launch
// for each level of sums.
#include <algorithm>

#include "halving.h"
#include "kernels.h"
#include "launch.h"

namespace bhfast::cuda {
namespace {

constexpr int kWarps = 8;  // per block of threads

// Where the results go, and what the clip coefficient depends on.
struct Result {
  float* norm;
  float* clip_coef;
  float max_norm;
  bool to_bfloat16;
};

// Write the sum of a block; if it is the only one, the norm and the coefficient instead.
__device__ void write_sum(float sum, int64_t block, int64_t blocks, float* sums, const Result& result) {
  if (threadIdx.x % kWarp != 0) return;
  if (blocks > 1) {
    sums[block] = sum;
  } else {
    const float norm = sqrtf(sum);
    *result.norm = norm;
    *result.clip_coef = clip_coefficient(norm, result.max_norm, result.to_bfloat16);
  }
}

// The block of values that this warp sums.
__device__ int64_t block_of_warp() { return static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp; }

__device__ float element(const GradTensor& grad, int64_t i) {
  return grad.dtype == Dtype::bfloat16 ? to_float(static_cast<const bfloat16*>(grad.data)[i])
                                       : static_cast<const float*>(grad.data)[i];
}

template <int N>
__global__ void __launch_bounds__(kWarps* kWarp)
    square_kernel(const __grid_constant__ List<GradTensor, int64_t, N> grads, int64_t blocks, float* sums,
                  const Result result) {
  const int64_t block = block_of_warp(), begin = block * kNormBlock;
  if (block >= blocks) return;
  int index = grads.find(begin);
  float x[kRuns][kRunLength];
  if (begin + kNormBlock <= grads.first[index + 1]) {
    const GradTensor& grad = grads.items[index];
    if (grad.dtype == Dtype::bfloat16) {
      load_squares(static_cast<const bfloat16*>(grad.data) + (begin - grads.first[index]), x);
    } else {
      load_squares(static_cast<const float*>(grad.data) + (begin - grads.first[index]), x);
    }
  } else {  // the block has values of several tensors, or ends after the last one
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
#pragma unroll
      for (int k = 0; k < kRunLength; ++k) {
        const int64_t i = begin + run_begin(run) + k;
        while (index < grads.count && i >= grads.first[index + 1]) ++index;
        const float value = index < grads.count ? element(grads.items[index], i - grads.first[index]) : 0.0f;
        x[run][k] = value * value;
      }
    }
  }
  write_sum(sum_by_halving(x), block, blocks, sums, result);
}

__global__ void __launch_bounds__(kWarps* kWarp)
    sum_kernel(const float* in, int64_t count, int64_t blocks, float* out, const Result result) {
  const int64_t block = block_of_warp();
  if (block >= blocks) return;
  float x[kRuns][kRunLength];
  const int64_t begin = block * kNormBlock;
  load_block(x, count - begin, [&](int64_t i) { return in[begin + i]; });
  write_sum(sum_by_halving(x), block, blocks, out, result);
}

int64_t blocks_for(int64_t count) { return std::max((count + kNormBlock - 1) / kNormBlock, int64_t{1}); }

unsigned grid_for(int64_t blocks) { return static_cast<unsigned>((blocks + kWarps - 1) / kWarps); }

int64_t total(const std::vector<GradTensor>& grads) {
  int64_t numel = 0;
  for (const GradTensor& grad : grads) numel += grad.numel;
  return numel;
}

template <int N>
void launch_squares(const std::vector<GradTensor>& grads, int64_t blocks, float* sums, const Result& result,
                    cudaStream_t stream) {
  List<GradTensor, int64_t, N> list;
  list.count = static_cast<int>(grads.size());
  list.first[0] = 0;
  for (int i = 0; i < list.count; ++i) {
    list.items[i] = grads[i];
    list.first[i + 1] = list.first[i] + grads[i].numel;
  }
  square_kernel<N><<<grid_for(blocks), kWarps * kWarp, 0, stream>>>(list, blocks, sums, result);
  check_launch("the kernel of squares");
}

}  // namespace

// Two buffers: the sums of the first level and those of the second. Further levels alternate between them.
int64_t norm_workspace(const std::vector<GradTensor>& grads) {
  const int64_t blocks = blocks_for(total(grads));
  return blocks + blocks_for(blocks);
}

void grad_norm(const std::vector<GradTensor>& grads, float* workspace, float* norm, float* clip_coef, float max_norm,
               bool to_bfloat16, cudaStream_t stream) {
  if (grads.size() > kMaxGrads) {
    throw std::runtime_error("grad_norm takes at most " + std::to_string(kMaxGrads) + " tensors");
  }
  static_assert(sizeof(List<GradTensor, int64_t, kMaxGrads>) + sizeof(int64_t) + sizeof(float*) + sizeof(Result) <=
                kMaxArgumentBytes);
  const Result result{norm, clip_coef, max_norm, to_bfloat16};
  int64_t count = blocks_for(total(grads));
  float* sums = workspace;
  float* next = workspace + count;
  const auto squares = grads.size() <= kShortList ? launch_squares<kShortList> : launch_squares<kMaxGrads>;
  squares(grads, count, sums, result, stream);
  while (count > 1) {
    const int64_t blocks = blocks_for(count);
    sum_kernel<<<grid_for(blocks), kWarps * kWarp, 0, stream>>>(sums, count, blocks, next, result);
    check_launch("the kernel of sums");
    std::swap(sums, next);
    count = blocks;
  }
}

}  // namespace bhfast::cuda
