// The CUDA kernels, as the host calls them. This header and the .cu files do not use torch: nvcc alone compiles them.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

#include "../tensors.h"

namespace bhfast::cuda {

// These throw std::runtime_error with CUDA's message if a launch fails. They neither allocate nor synchronize.

void adam(const std::vector<AdamTensors>&, Dtype, Rounding, const StepScalars&, cudaStream_t);

constexpr int kMaxGrads = 400;  // tensors that grad_norm takes

// The number of floats that grad_norm needs as its workspace.
int64_t norm_workspace(const std::vector<GradTensor>&);
void grad_norm(const std::vector<GradTensor>&, float* workspace, float* norm, float* clip_coef, float max_norm,
               bool to_bfloat16, cudaStream_t);

void record(const std::vector<RecordTensor>&, const StepScalars&, cudaStream_t);

}  // namespace bhfast::cuda
