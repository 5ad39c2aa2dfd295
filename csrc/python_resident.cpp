#include "python_resident.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/stack.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>

#include "cuda/launch_stream.h"
#include "cuda/resident.h"
#include "cuda/resident/plan.h"
#include "python_run.h"

namespace bhfast {
namespace {

namespace py = pybind11;
using at::Tensor;
using cuda::resident::Plan;

constexpr int64_t kAlignment = 16;  // of what a thread reads or writes at once

bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % kAlignment == 0; }

// The kernel reads 16 bytes at once, and takes all gradients as one array.
void check_memory(const TrainingRun& run) {
  for (const Parameter& p : run.parameters) {
    TORCH_CHECK_VALUE(is_aligned(p.value) && is_aligned(p.grad),
                      "parameters and gradients must be aligned to 16 bytes");
  }
  const char* next = nullptr;
  for (const ParameterGroup& group : run.groups) {
    for (const AdamTensors& t : group.tensors) {
      const auto* const grad = static_cast<const char*>(t.grad);
      TORCH_CHECK_VALUE(!next || grad == next, "the gradients must be adjacent, in the order of the groups");
      next = grad + t.numel * sizeof(bfloat16);
      const bool all_aligned = is_aligned(t.param) && is_aligned(t.exp_avg) && is_aligned(t.exp_avg_sq) &&
                               std::all_of(t.rings, t.rings + kFields, is_aligned);
      TORCH_CHECK_VALUE(all_aligned, "parameters, their state and their rings must be aligned to 16 bytes");
    }
  }
  TORCH_CHECK_VALUE(next, "groups must have parameters");
}

// Runs of one shape, each on a cluster of blocks of its own.
class ResidentEngine {
 public:
  ResidentEngine(std::vector<std::shared_ptr<PyRun>> runs, int blocks, int64_t shared_bytes) : runs_(std::move(runs)) {
    TORCH_CHECK_VALUE(!runs_.empty(), "runs must be at least one, got none");
    const at::Device device = runs_[0]->device;
    const c10::DeviceGuard guard(device);
    const cuda::ResidentLimits limits = cuda::resident_limits();
    TORCH_CHECK_VALUE(blocks == 1 || limits.has_clusters, "this GPU has no clusters: blocks must be 1, got ", blocks);
    if (shared_bytes == 0) shared_bytes = limits.shared_bytes;
    std::vector<Tensor> tables;
    for (const auto& own : runs_) {
      TORCH_CHECK_VALUE(own->device == device, "all runs must be on ", device, ", got one on ", own->device);
      tables.push_back(add(own->run, blocks, shared_bytes, device));
    }
    table_ = at::stack(tables).to(device);
    while (1 << launch_.blocks_log2 < blocks) ++launch_.blocks_log2;
    launch_.runs = table_.const_data_ptr();
    launch_.count = static_cast<int64_t>(runs_.size());
  }

  void run(int64_t steps) {
    for (const auto& own : runs_) {
      const int64_t left = own->steps - own->run.start - launch_.done;
      TORCH_CHECK_VALUE(steps <= left, "steps must be at most the ", left, " that a run has left, got ", steps);
    }
    const c10::DeviceGuard guard(table_.device());
    launch_.steps = steps;
    cuda::run_resident(launch_, cuda::stream_of(table_));
    launch_.done += steps;
  }

  int64_t shared_bytes() const { return launch_.shared_bytes; }
  int64_t workspace_bytes() const { return workspaces_[0].numel(); }

 private:
  // Plan a run; return its tables, on the CPU.
  Tensor add(const TrainingRun& run, int blocks, int64_t shared_bytes, at::Device device) {
    const std::string reason = cuda::resident::unsupported(run.shape, blocks, shared_bytes);
    TORCH_CHECK_VALUE(reason.empty(), reason);
    check_memory(run);
    const auto bytes = at::TensorOptions().dtype(at::kByte);
    const int64_t size = cuda::resident::make_plan(run, blocks, shared_bytes, nullptr).workspace_bytes;
    const Tensor& workspace = workspaces_.emplace_back(at::empty({size}, bytes.device(device)));
    const Plan plan = cuda::resident::make_plan(run, blocks, shared_bytes, static_cast<char*>(workspace.data_ptr()));
    const auto run_bytes = static_cast<int64_t>(plan.run.size());
    TORCH_CHECK_VALUE(
        !launch_.run_bytes || (launch_.run_bytes == run_bytes && launch_.shared_bytes == plan.shared_bytes),
        "all runs must have the same sizes");
    launch_.run_bytes = run_bytes;
    launch_.shared_bytes = plan.shared_bytes;
    const Tensor table = at::empty({run_bytes}, bytes);
    std::copy(plan.run.begin(), plan.run.end(), static_cast<std::byte*>(table.data_ptr()));
    return table;
  }

  std::vector<std::shared_ptr<PyRun>> runs_;
  std::vector<Tensor> workspaces_;
  Tensor table_;
  cuda::ResidentLaunch launch_{};
};

}  // namespace

void bind_resident(py::module_& m) {
  py::class_<ResidentEngine>(m, "ResidentEngine", "Runs the training steps of several runs at once, on a GPU.")
      .def(py::init<std::vector<std::shared_ptr<PyRun>>, int, int64_t>(), py::arg("runs"), py::kw_only(),
           py::arg("blocks"), py::arg("shared_bytes"))
      .def("run", &ResidentEngine::run, py::arg("steps"), py::call_guard<py::gil_scoped_release>(),
           "Launch the next `steps` steps of every run, recording included.")
      .def_property_readonly("shared_bytes", &ResidentEngine::shared_bytes, "Shared memory of each block, in bytes.")
      .def_property_readonly("workspace_bytes", &ResidentEngine::workspace_bytes,
                             "Memory of each run besides, in bytes.");
}

}  // namespace bhfast
