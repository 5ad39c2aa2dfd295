// The Python module bhfast._C. Loading it registers the kernels of ops.cpp.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "instruction_sets/dispatch.h"
#include "native/binding.h"

PYBIND11_MODULE(_C, m) {
  m.def("instruction_sets", &bhfast::instruction_sets, "Return those that this machine supports, fastest first.");
  m.def("instruction_set", [] { return bhfast::current_instruction_set().name; }, "Return the one the kernels use.");
  m.def("use_instruction_set", &bhfast::use_instruction_set, "Choose the kernels'; their bits do not depend on it.");
  m.attr("norm_block") = bhfast::kNormBlock;
  bhfast::native::bind(m);
#ifdef BHFAST_CUDA
  m.attr("cuda_architectures") = BHFAST_CUDA;
#else
  m.attr("cuda_architectures") = pybind11::none();
#endif
}
