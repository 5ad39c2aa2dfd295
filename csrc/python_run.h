// What an engine runs, as a class of Python. bhfast/ops/compiled_run.py has checked the tensors; here they are
// addresses.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "training_run.h"

namespace bhfast {

using Address = uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

struct PyRun {
  TrainingRun run;
  pybind11::object tensors;  // own the memory
};

void bind_run(pybind11::module_&);

}  // namespace bhfast
