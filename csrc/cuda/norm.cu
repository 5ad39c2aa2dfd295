// The gradients' norm in the fixed order of bhfast.ops.arithmetic.grad_norm, and the clip coefficient, in one launch
// per level of sums.
//
// One warp sums a block of kNormBlock values. Of every 256 of them, thread t has the eight from 8 t on: it halves a
// block twice by itself, five times by shuffles, and the last three times by itself again. No thread waits for another
// warp.
#include <algorithm>

#include "kernels.h"
#include "launch.h"

namespace bhfast::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kWarps = 8;                           // per block of threads
constexpr int kRun = 8;                             // values side by side in a thread
constexpr int kRuns = kNormBlock / (kWarp * kRun);  // per thread
constexpr unsigned kEveryone = 0xffffffff;

struct Finish {  // what becomes of the last sum
  float* norm;
  float* clip_coef;
  float max_norm;
  bool to_bfloat16;
};

// The sum of a warp's values, by adding the second half to the first until one is left; right in its first thread.
__device__ float halve(float (&x)[kRuns][kRun]) {
#pragma unroll
  for (int width = kRuns / 2; width > 0; width /= 2) {
#pragma unroll
    for (int run = 0; run < width; ++run) {
#pragma unroll
      for (int i = 0; i < kRun; ++i) x[run][i] += x[run + width][i];
    }
  }
#pragma unroll
  for (int width = kWarp / 2; width > 0; width /= 2) {
#pragma unroll
    for (int i = 0; i < kRun; ++i) x[0][i] += __shfl_down_sync(kEveryone, x[0][i], width);
  }
#pragma unroll
  for (int width = kRun / 2; width > 0; width /= 2) {
#pragma unroll
    for (int i = 0; i < width; ++i) x[0][i] += x[0][i + width];
  }
  return x[0][0];
}

__device__ void put(float sum, int64_t block, int64_t blocks, float* sums, const Finish& finish) {
  if (threadIdx.x % kWarp != 0) return;
  if (blocks > 1) {
    sums[block] = sum;
  } else {
    const float norm = sqrtf(sum);
    *finish.norm = norm;
    *finish.clip_coef = clip_coefficient(norm, finish.max_norm, finish.to_bfloat16);
  }
}

__device__ int64_t own_block() { return static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp; }

// Where a thread's run begins within its block.
__device__ int own_run(int run) { return (run * kWarp + threadIdx.x % kWarp) * kRun; }

__device__ float element(const GradTensor& grad, int64_t i) {
  return grad.dtype == Dtype::bfloat16 ? to_float(static_cast<const bfloat16*>(grad.data)[i])
                                       : static_cast<const float*>(grad.data)[i];
}

template <class T>
__device__ void square_all(const T* block, float (&x)[kRuns][kRun]) {
  const bool aligned = is_aligned(block);
#pragma unroll
  for (int run = 0; run < kRuns; ++run) {
    const T* const from = block + own_run(run);
#pragma unroll
    for (int i = 0; i < kRun; i += Pack<T>::kSize) {
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

template <int N>
__global__ void __launch_bounds__(kWarps* kWarp)
    square_kernel(const __grid_constant__ List<GradTensor, int64_t, N> grads, int64_t blocks, float* sums,
                  const Finish finish) {
  const int64_t block = own_block(), begin = block * kNormBlock;
  if (block >= blocks) return;
  int index = grads.find(begin);
  float x[kRuns][kRun];
  if (begin + kNormBlock <= grads.first[index + 1]) {
    const GradTensor& grad = grads.items[index];
    if (grad.dtype == Dtype::bfloat16) {
      square_all(static_cast<const bfloat16*>(grad.data) + (begin - grads.first[index]), x);
    } else {
      square_all(static_cast<const float*>(grad.data) + (begin - grads.first[index]), x);
    }
  } else {  // values of several tensors, or beyond the last one
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
#pragma unroll
      for (int k = 0; k < kRun; ++k) {
        const int64_t i = begin + own_run(run) + k;
        while (index < grads.count && i >= grads.first[index + 1]) ++index;
        const float value = index < grads.count ? element(grads.items[index], i - grads.first[index]) : 0.0f;
        x[run][k] = value * value;
      }
    }
  }
  put(halve(x), block, blocks, sums, finish);
}

__global__ void __launch_bounds__(kWarps* kWarp)
    sum_kernel(const float* in, int64_t count, int64_t blocks, float* out, const Finish finish) {
  const int64_t block = own_block();
  if (block >= blocks) return;
  float x[kRuns][kRun];
#pragma unroll
  for (int run = 0; run < kRuns; ++run) {
#pragma unroll
    for (int k = 0; k < kRun; ++k) {
      const int64_t i = block * kNormBlock + own_run(run) + k;
      x[run][k] = i < count ? in[i] : 0.0f;
    }
  }
  put(halve(x), block, blocks, out, finish);
}

int64_t blocks_for(int64_t count) { return std::max((count + kNormBlock - 1) / kNormBlock, int64_t{1}); }

unsigned grid_for(int64_t blocks) { return static_cast<unsigned>((blocks + kWarps - 1) / kWarps); }

int64_t total(const std::vector<GradTensor>& grads) {
  int64_t numel = 0;
  for (const GradTensor& grad : grads) numel += grad.numel;
  return numel;
}

template <int N>
void launch_squares(const std::vector<GradTensor>& grads, int64_t blocks, float* sums, const Finish& finish,
                    cudaStream_t stream) {
  List<GradTensor, int64_t, N> list;
  list.count = static_cast<int>(grads.size());
  list.first[0] = 0;
  for (int i = 0; i < list.count; ++i) {
    list.items[i] = grads[i];
    list.first[i + 1] = list.first[i] + grads[i].numel;
  }
  square_kernel<N><<<grid_for(blocks), kWarps * kWarp, 0, stream>>>(list, blocks, sums, finish);
  check("the kernel of the squares");
}

}  // namespace

// The sums of the first level, and beside them those of the second; the levels above go back and forth.
int64_t norm_workspace(const std::vector<GradTensor>& grads) {
  const int64_t blocks = blocks_for(total(grads));
  return blocks + blocks_for(blocks);
}

void grad_norm(const std::vector<GradTensor>& grads, float* workspace, float* norm, float* clip_coef, float max_norm,
               bool to_bfloat16, cudaStream_t stream) {
  if (grads.size() > kMaxGrads) throw std::runtime_error("grad_norm takes at most 400 tensors");
  static_assert(sizeof(List<GradTensor, int64_t, kMaxGrads>) + sizeof(int64_t) + sizeof(float*) + sizeof(Finish) <=
                kMaxArguments);
  const Finish finish{norm, clip_coef, max_norm, to_bfloat16};
  int64_t count = blocks_for(total(grads));
  float* sums = workspace;
  float* next = workspace + count;
  const auto squares = grads.size() <= kShort ? launch_squares<kShort> : launch_squares<kMaxGrads>;
  squares(grads, count, sums, finish, stream);
  while (count > 1) {
    const int64_t blocks = blocks_for(count);
    sum_kernel<<<grid_for(blocks), kWarps * kWarp, 0, stream>>>(sums, count, blocks, next, finish);
    check("the kernel of the sums");
    std::swap(sums, next);
    count = blocks;
  }
}

}  // namespace bhfast::cuda
