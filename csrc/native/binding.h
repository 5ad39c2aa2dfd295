// The native engine as a Python class of the module bhfast._C.
#pragma once

#include <pybind11/pybind11.h>

namespace bhfast::native {

void bind(pybind11::module_& m);

}  // namespace bhfast::native
