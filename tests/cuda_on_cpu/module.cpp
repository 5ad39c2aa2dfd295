// The resident engine, executed by the CPU, as a Python module.
#include <pybind11/pybind11.h>

#include "python_resident.h"
#include "python_run.h"

PYBIND11_MODULE(kernels, m) {
  bhfast::bind_run(m);
  bhfast::bind_resident(m);
}
