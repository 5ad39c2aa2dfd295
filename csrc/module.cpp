// The Python module bhfast._C. Loading it registers the kernels of ops.cpp; it says besides what it was built for.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/kernels.h"
#include "native/binding.h"

PYBIND11_MODULE(_C, m) {
  namespace cpu = bhfast::cpu;
  m.def("instruction_sets", &cpu::instruction_sets, "Those the CPU kernels are compiled for and run here, best first.");
  m.def("instruction_set", [] { return cpu::kernels().name; }, "The one in use.");
  m.def("use_instruction_set", &cpu::use_instruction_set, "Choose one; every one gives the same bits.");
  bhfast::native::bind(m);
#ifdef BHFAST_CUDA
  m.attr("cuda_architectures") = BHFAST_CUDA;
#else
  m.attr("cuda_architectures") = pybind11::none();
#endif
}
