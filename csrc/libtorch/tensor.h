// A tensor of torch, and the calls to torch that the extension makes.
#pragma once

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#include "abi.h"

namespace bhfast {

// Throw if a call to torch failed. Torch has then written the reason to stderr.
inline void check_torch(AOTITorchError error) {
  if (error) throw std::runtime_error("a call to torch failed; its message is above");
}

// Call a function of the ABI that returns a value through its last argument.
template <class Result, class... Parameters, class... Arguments>
Result ask_torch(AOTITorchError (*function)(Parameters...), Arguments... arguments) {
  Result result{};
  check_torch(function(arguments..., &result));
  return result;
}

// Owns a handle.
class Tensor {
 public:
  explicit Tensor(AtenTensorHandle handle) : handle_(handle) {}

  AtenTensorHandle get() const { return handle_.get(); }
  int64_t dim() const { return ask_torch<int64_t>(aoti_torch_get_dim, get()); }
  int64_t numel() const { return ask_torch<int64_t>(aoti_torch_get_numel, get()); }
  const int64_t* sizes() const { return ask_torch<int64_t*>(aoti_torch_get_sizes, get()); }
  const int64_t* strides() const { return ask_torch<int64_t*>(aoti_torch_get_strides, get()); }
  int32_t dtype() const { return ask_torch<int32_t>(aoti_torch_get_dtype, get()); }
  int32_t device_type() const { return ask_torch<int32_t>(aoti_torch_get_device_type, get()); }
  int32_t device_index() const { return ask_torch<int32_t>(aoti_torch_get_device_index, get()); }
  int64_t itemsize() const { return static_cast<int64_t>(aoti_torch_dtype_element_size(dtype())); }
  bool is_contiguous() const { return ask_torch<bool>(aoti_torch_is_contiguous, get()); }
  bool is_cpu() const { return device_type() == aoti_torch_device_type_cpu(); }
  bool is_cuda() const { return device_type() == aoti_torch_device_type_cuda(); }
  const void* data() const { return ask_torch<const void*>(torch_get_const_data_ptr, get()); }
  void* mutable_data() const { return ask_torch<void*>(torch_get_mutable_data_ptr, get()); }

  bool is_on_device_of(const Tensor& other) const {
    return device_type() == other.device_type() && device_index() == other.device_index();
  }

  void copy_from(const Tensor& source) const { check_torch(aoti_torch_copy_(get(), source.get(), 0)); }

  AtenTensorHandle release() { return handle_.release(); }

 private:
  struct Delete {
    void operator()(AtenTensorHandle handle) const { aoti_torch_delete_tensor_object(handle); }
  };
  std::unique_ptr<AtenTensorOpaque, Delete> handle_;
};

using Tensors = std::vector<Tensor>;

inline std::vector<int64_t> contiguous_strides(int64_t dim, const int64_t* sizes) {
  std::vector<int64_t> strides(dim, 1);
  for (int64_t i = dim - 1; i > 0; --i) strides[i - 1] = strides[i] * (sizes[i] > 1 ? sizes[i] : 1);
  return strides;
}

// A new tensor on the device of another one.
inline Tensor new_empty(const Tensor& on, int32_t dtype, int64_t dim, const int64_t* sizes) {
  return Tensor(ask_torch<AtenTensorHandle>(aoti_torch_empty_strided, dim, sizes, contiguous_strides(dim, sizes).data(),
                                            dtype, on.device_type(), on.device_index()));
}

// Makes the device of a CUDA tensor the current one.
class DeviceGuard {
 public:
  explicit DeviceGuard(const Tensor& t) {
    if (t.is_cuda()) guard_ = ask_torch<DeviceGuardHandle>(aoti_torch_create_device_guard, t.device_index());
  }
  ~DeviceGuard() {
    if (guard_) aoti_torch_delete_device_guard(guard_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  DeviceGuardHandle guard_ = nullptr;
};

}  // namespace bhfast
