// The stream to launch on, for the kernels' callers that know torch.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <cuda_runtime_api.h>

namespace bhfast::cuda {

inline cudaStream_t stream_of([[maybe_unused]] const at::Tensor& t) {
#ifdef BHFAST_CUDA_ON_CPU
  return nullptr;
#else
  const c10::impl::VirtualGuardImpl guard(t.device().type());
  return static_cast<cudaStream_t>(guard.getStream(t.device()).native_handle());
#endif
}

}  // namespace bhfast::cuda
