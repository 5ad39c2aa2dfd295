// What an engine runs, made from tensors of Python: checked, and kept alive.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <memory>
#include <string>
#include <vector>

#include "training_run.h"

namespace bhfast {

using Tensors = std::vector<at::Tensor>;

// Checks tensors, gives out pointers to their memory, and keeps them alive.
class TensorOwner {
 public:
  explicit TensorOwner(at::Device device) : device_(device) {}

  template <class T>
  T* pointer(const std::string& name, const at::Tensor& t, at::ScalarType dtype, at::IntArrayRef sizes) {
    TORCH_CHECK_VALUE(t.defined(), name, " must be a tensor, got None");
    TORCH_CHECK_TYPE(t.scalar_type() == dtype, name, " must be ", dtype, ", got ", t.scalar_type());
    TORCH_CHECK_VALUE(t.sizes() == sizes, name, " must have shape ", sizes, ", got ", t.sizes());
    TORCH_CHECK_VALUE(t.device() == device_ && t.is_contiguous(), name, " must be contiguous and on ", device_);
    tensors_.push_back(t);
    return static_cast<T*>(t.data_ptr());
  }

 private:
  at::Device device_;
  Tensors tensors_;
};

struct PyRun {
  TensorOwner owner;
  at::Device device;
  int64_t steps;
  TrainingRun run;
};

void bind_run(pybind11::module_&);

}  // namespace bhfast
