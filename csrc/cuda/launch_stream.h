// The stream to launch on, for the kernels' callers that know torch.
#pragma once

#include <cuda_runtime_api.h>

#include "../libtorch/tensor.h"

namespace bhfast::cuda {

inline cudaStream_t stream_of([[maybe_unused]] const Tensor& t) {
#ifdef BHFAST_CUDA_ON_CPU
  return nullptr;
#else
  if (!aoti_torch_get_current_cuda_stream) throw std::runtime_error("this torch has no CUDA");
  return static_cast<cudaStream_t>(ask_torch<void*>(aoti_torch_get_current_cuda_stream, t.device_index()));
#endif
}

}  // namespace bhfast::cuda
