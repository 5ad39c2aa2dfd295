// What the CUDA kernels offer to the host. No torch here or in the .cu files: nvcc alone compiles and links them.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

#include "../tensors.h"

namespace bhfast::cuda {

// All throw std::runtime_error with CUDA's message if a launch fails. None allocates, none waits.

void adam(const std::vector<AdamTensors>&, Dtype, Rounding, const StepNumbers&, cudaStream_t);

// How many tensors grad_norm takes.
constexpr int kMaxGrads = 400;
// The number of floats that grad_norm needs to work in.
int64_t norm_workspace(const std::vector<GradTensor>&);
void grad_norm(const std::vector<GradTensor>&, float* workspace, float* norm, float* clip_coef, float max_norm,
               bool to_bfloat16, cudaStream_t);

void record(const std::vector<RecordTensor>&, const StepNumbers&, cudaStream_t);

}  // namespace bhfast::cuda
