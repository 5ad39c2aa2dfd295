// The Python module bhfast._C: the instruction sets, and the engines as classes. Loading it registers the kernels of
// ops.cpp.
#include <pybind11/stl.h>

#include <algorithm>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>

#include "cuda/resident/plan.h"
#include "instruction_sets/dispatch.h"
#include "libtorch/tensor.h"
#include "native/engine.h"
#include "python_run.h"
#ifdef BHFAST_CUDA
#include "python_resident.h"
#endif

namespace bhfast::native {
namespace {

namespace py = pybind11;

struct PyEngine {
  std::shared_ptr<PyRun> run;
  std::unique_ptr<Engine> engine;
};

PyEngine make_engine(std::shared_ptr<PyRun> run, std::optional<int> threads, const std::string& instruction_set) {
  if (threads && *threads < 1) {
    throw std::invalid_argument("threads must be at least 1, got " + std::to_string(*threads));
  }
  const Shape& shape = run->run.shape;
  const std::string reason = unsupported(shape.hidden, shape.heads, shape.mlp);
  if (!reason.empty()) throw std::invalid_argument(reason);
  const auto torch_threads = static_cast<int64_t>(ask_torch<uint32_t>(torch_get_num_threads));
  const auto most = static_cast<int>(std::min(torch_threads, row_blocks(shape)));
  return {run, std::make_unique<Engine>(run->run, threads.value_or(most), instruction_set)};
}

std::map<std::string, double> profile_of(const PyEngine& self) {
  const std::vector<double> times = self.engine->profile();
  std::map<std::string, double> seconds;
  for (int i = 0; i < kActivityCount; ++i) seconds[kActivities[i]] = times[i];
  return seconds;
}

void bind_engine(py::module_& m) {
  m.def("native_unsupported", &unsupported, py::arg("hidden_dim"), py::arg("heads"), py::arg("mlp_dim"),
        "Return why the native engine cannot run a network of these sizes; empty if it can.");
  m.def("native_peak", &peak_flops, py::arg("instruction_set"), py::arg("threads"),
        py::call_guard<py::gil_scoped_release>(),
        "Return the floating-point operations per second that these threads reach if they never wait for memory.");
  py::class_<PyEngine>(m, "NativeEngine", "Runs the training steps of a TiedGPT, on the tensors it is given.")
      .def(py::init(&make_engine), py::arg("run"), py::kw_only(), py::arg("threads"), py::arg("instruction_set"))
      .def(
          "run", [](PyEngine& self, int64_t steps) { self.engine->run(steps); }, py::arg("steps"),
          py::call_guard<py::gil_scoped_release>(), "Run and record the next `steps` steps.")
      .def(
          "set_profiling", [](PyEngine& self, bool on) { self.engine->set_profiling(on); }, py::arg("on"),
          "Turn profiling on or off.")
      .def("profile", &profile_of,
           "Return the seconds spent on each activity while profiling was on, summed over threads.");
}

std::string resident_unsupported(int64_t vocab, int64_t hidden, int64_t mlp, int64_t layers, int64_t heads,
                                 int64_t context, int blocks, int64_t shared_bytes) {
  return cuda::resident::unsupported({vocab, hidden, mlp, layers, heads, context, 1}, blocks, shared_bytes);
}

void bind_resident_unsupported(py::module_& m) {
  m.def("resident_unsupported", &resident_unsupported, py::kw_only(), py::arg("vocab_size"), py::arg("hidden_dim"),
        py::arg("mlp_dim"), py::arg("layers"), py::arg("heads"), py::arg("context"), py::arg("blocks"),
        py::arg("shared_bytes"),
        "Return why the resident engine cannot run a network of these sizes; empty if it can.");
}

}  // namespace
}  // namespace bhfast::native

PYBIND11_MODULE(_C, m) {
  m.def("instruction_sets", &bhfast::instruction_sets, "Return those that this machine supports, fastest first.");
  m.def("instruction_set", [] { return bhfast::current_instruction_set().name; }, "Return the one the kernels use.");
  m.def("use_instruction_set", &bhfast::use_instruction_set, "Choose the kernels'; their bits do not depend on it.");
  m.attr("norm_block") = bhfast::kNormBlock;
  bhfast::bind_run(m);
  bhfast::native::bind_engine(m);
  bhfast::native::bind_resident_unsupported(m);
#ifdef BHFAST_CUDA
  bhfast::bind_resident(m);
  m.attr("cuda_architectures") = BHFAST_CUDA;
#else
  m.attr("cuda_architectures") = pybind11::none();
#endif
}
