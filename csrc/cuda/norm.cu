// The gradients' norm in the fixed order of _ops.grad_norm, and the clip coefficient, in one launch per level of sums.
#include <algorithm>

#include "kernels.h"
#include "launch.h"

namespace bhfast::cuda {
namespace {

constexpr int kBlock = 1024;  // _ops.NORM_BLOCK

struct Finish {  // what becomes of the last sum
  float* norm;
  float* clip_coef;
  float max_norm;
  bool to_bfloat16;
};

// Sum 2 * blockDim.x values, each thread coming with two, by adding the second half to the first until one is left.
__device__ void halve(float first, float second, float* sums, const Finish& finish) {
  __shared__ float x[kBlock / 2];
  float sum = first + second;
  for (int width = blockDim.x / 2; width > 0; width /= 2) {
    x[threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.x < width) sum += x[threadIdx.x + width];
    __syncthreads();
  }
  if (threadIdx.x != 0) return;
  if (gridDim.x > 1) {
    sums[blockIdx.x] = sum;
  } else {
    const float norm = sqrtf(sum);
    *finish.norm = norm;
    *finish.clip_coef = clip_coefficient(norm, finish.max_norm, finish.to_bfloat16);
  }
}

template <int N>
__global__ void __launch_bounds__(kBlock / 2)
    square_kernel(const __grid_constant__ List<GradTensor, int64_t, N> grads, float* sums, const Finish finish) {
  const auto square = [&](int64_t i) {
    if (i >= grads.first[grads.count]) return 0.0f;
    const int index = grads.find(i);
    const GradTensor& grad = grads.items[index];
    i -= grads.first[index];
    const float x = grad.dtype == Dtype::bfloat16 ? to_float(static_cast<const bfloat16*>(grad.data)[i])
                                                  : static_cast<const float*>(grad.data)[i];
    return x * x;
  };
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x;
  halve(square(i), square(i + kBlock / 2), sums, finish);
}

__global__ void __launch_bounds__(kBlock / 2)
    sum_kernel(const float* in, int64_t count, float* out, const Finish finish) {
  const int64_t i = 2 * static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const auto value = [&](int64_t at) { return at < count ? in[at] : 0.0f; };
  halve(value(i), value(i + blockDim.x), out, finish);
}

int64_t blocks_for(int64_t count, int64_t width) { return (count + width - 1) / width; }

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
  square_kernel<N><<<static_cast<unsigned>(blocks), kBlock / 2, 0, stream>>>(list, sums, finish);
  check("the kernel of the squares");
}

}  // namespace

// The sums of the first level, and beside them those of the second; the levels above go back and forth.
int64_t norm_workspace(const std::vector<GradTensor>& grads) {
  const int64_t blocks = blocks_for(total(grads), kBlock);
  return blocks + blocks_for(blocks, kBlock);
}

void grad_norm(const std::vector<GradTensor>& grads, float* workspace, float* norm, float* clip_coef, float max_norm,
               bool to_bfloat16, cudaStream_t stream) {
  if (grads.size() > kMaxGrads) throw std::runtime_error("grad_norm takes at most 400 tensors");
  static_assert(sizeof(List<GradTensor, int64_t, kMaxGrads>) + sizeof(Finish) + sizeof(float*) <= 32764);
  const Finish finish{norm, clip_coef, max_norm, to_bfloat16};
  int64_t count = std::max(blocks_for(total(grads), kBlock), int64_t{1});
  float* sums = workspace;
  float* next = workspace + count;
  const auto squares = grads.size() <= kShort ? launch_squares<kShort> : launch_squares<kMaxGrads>;
  squares(grads, count, sums, finish, stream);
  while (count > 1) {
    int width = 2;
    while (width < kBlock && width < count) width *= 2;
    const int64_t blocks = blocks_for(count, width);
    sum_kernel<<<static_cast<unsigned>(blocks), width / 2, 0, stream>>>(sums, count, next, finish);
    check("the kernel of the sums");
    std::swap(sums, next);
    count = blocks;
  }
}

}  // namespace bhfast::cuda
