#include "python_resident.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>

#include "cuda/resident.h"
#include "cuda/resident/plan.h"
#include "python_run.h"

namespace bhfast {
namespace {

namespace py = pybind11;

constexpr int64_t kAlignment = 16;  // of what a thread reads or writes at once

bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % kAlignment == 0; }

void require(bool holds, const std::string& message) {
  if (!holds) throw std::invalid_argument(message);
}

// The kernel reads 16 bytes at once, and takes all gradients as one array.
void check_memory(const TrainingRun& run) {
  for (const Parameter& p : run.parameters) {
    require(is_aligned(p.value) && is_aligned(p.grad), "parameters and gradients must be aligned to 16 bytes");
  }
  const char* next = nullptr;
  for (const ParameterGroup& group : run.groups) {
    for (const AdamTensors& t : group.tensors) {
      const auto* const grad = static_cast<const char*>(t.grad);
      require(!next || grad == next, "the gradients must be adjacent, in the order of the groups");
      next = grad + t.numel * sizeof(bfloat16);
      const bool all_aligned = is_aligned(t.param) && is_aligned(t.exp_avg) && is_aligned(t.exp_avg_sq) &&
                               std::all_of(t.rings, t.rings + kFields, is_aligned);
      require(all_aligned, "parameters, their state and their rings must be aligned to 16 bytes");
    }
  }
  require(next, "groups must have parameters");
}

// Return the run and its tables, to be copied to the device; the shared memory of a block; and the workspace, in bytes.
std::tuple<py::bytes, int64_t, int64_t> plan(const PyRun& own, int blocks, int64_t shared_bytes, Address workspace) {
  const std::string reason = cuda::resident::unsupported(own.run.shape, blocks, shared_bytes);
  require(reason.empty(), reason);
  check_memory(own.run);
  const cuda::resident::Plan plan = cuda::resident::make_plan(own.run, blocks, shared_bytes, at<char>(workspace));
  const auto* const bytes = reinterpret_cast<const char*>(plan.run.data());
  return {py::bytes(bytes, plan.run.size()), plan.shared_bytes, plan.workspace_bytes};
}

std::tuple<int64_t, bool> limits() {
  const cuda::ResidentLimits limits = cuda::resident_limits();
  return {limits.shared_bytes, limits.has_clusters};
}

void launch(Address runs, int64_t run_bytes, int64_t count, int blocks, int64_t shared_bytes, int64_t done,
            int64_t steps, Address stream) {
  int blocks_log2 = 0;
  while (1 << blocks_log2 < blocks) ++blocks_log2;
  cuda::run_resident({at<const void>(runs), run_bytes, count, blocks_log2, shared_bytes, done, steps},
                     reinterpret_cast<cudaStream_t>(stream));
}

}  // namespace

void bind_resident(py::module_& m) {
  m.def("resident_limits", &limits, "Return the shared memory of a block of this GPU, and whether it has clusters.");
  m.def("resident_plan", &plan, py::arg("run"), py::kw_only(), py::arg("blocks"), py::arg("shared_bytes"),
        py::arg("workspace"),
        "Return what to copy to the GPU for a run, its shared memory and its workspace in bytes. workspace: its "
        "address; 0 if only the sizes matter.");
  m.def("resident_launch", &launch, py::kw_only(), py::arg("runs"), py::arg("run_bytes"), py::arg("count"),
        py::arg("blocks"), py::arg("shared_bytes"), py::arg("done"), py::arg("steps"), py::arg("stream"),
        py::call_guard<py::gil_scoped_release>(), "Launch steps of several runs of one shape, recording included.");
}

}  // namespace bhfast
