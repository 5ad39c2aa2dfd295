// The resident engine as a class of Python.
#pragma once

#include <pybind11/pybind11.h>

namespace bhfast {

void bind_resident(pybind11::module_&);

}  // namespace bhfast
