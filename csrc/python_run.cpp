#include "python_run.h"

#include <pybind11/stl.h>

#include <array>
#include <map>
#include <tuple>

namespace bhfast {
namespace {

namespace py = pybind11;

// param, grad, exp_avg, exp_avg_sq, rings, numel: see AdamTensors.
using TensorsArgument = std::tuple<Address, Address, Address, Address, std::array<Address, kFields>, int64_t>;
// tensors, coefficients: see ParameterGroup.
using GroupArgument = std::tuple<std::vector<TensorsArgument>, Address>;
// tensor, row_bytes, rows, count, ring, slots: see RecordedRows.
using RowsArgument = std::tuple<Address, int64_t, Address, int64_t, Address, int64_t>;
// ring and slots of each name.
using LogsArgument = std::map<std::string, std::tuple<Address, int64_t>>;

ParameterGroup take_group(const GroupArgument& argument) {
  const auto& [tensors, coefficients] = argument;
  ParameterGroup group{{}, at<const Coefficients>(coefficients)};
  for (const auto& [param, grad, exp_avg, exp_avg_sq, rings, numel] : tensors) {
    AdamTensors t{at<void>(param), at<void>(grad), at<void>(exp_avg), at<void>(exp_avg_sq), {}, numel};
    for (int field = 0; field < kFields; ++field) t.rings[field] = at<void>(rings[field]);
    group.tensors.push_back(t);
  }
  return group;
}

template <class T>
Log<T> take_log(const LogsArgument& logs, const char* name) {
  const auto found = logs.find(name);
  if (found == logs.end()) return {};
  const auto& [ring, slots] = found->second;
  return {at<T>(ring), slots};
}

PyRun make_run(const std::array<int64_t, 7>& shape, const std::vector<std::tuple<Address, Address>>& parameters,
               const std::vector<GroupArgument>& groups, const std::string& rounding, float max_grad_norm,
               int64_t target_offset, Address corpus, Address offsets, Address frozen, Address learning_rates,
               int64_t start, int64_t every, int64_t slots, const std::vector<RowsArgument>& recorded_rows,
               const LogsArgument& logs, Address losses, Address grad_norms, py::object tensors) {
  PyRun result{{}, std::move(tensors)};
  TrainingRun& run = result.run;
  run.shape = {shape[0], shape[1], shape[2], shape[3], shape[4], shape[5], shape[6]};
  for (const auto& [value, grad] : parameters) run.parameters.push_back({at<bfloat16>(value), at<bfloat16>(grad)});
  for (const GroupArgument& group : groups) run.groups.push_back(take_group(group));
  run.rounding = rounding == "per-op" ? Rounding::per_op : Rounding::opmath;
  run.max_grad_norm = max_grad_norm;
  run.target_offset = target_offset;
  run.corpus = at<const int32_t>(corpus);
  run.offsets = at<const int64_t>(offsets);
  run.frozen = at<const bool>(frozen);
  run.learning_rates = at<const double>(learning_rates);
  run.start = start;
  run.every = every;
  run.slots = slots;
  for (const auto& [tensor, row_bytes, rows, count, ring, row_slots] : recorded_rows) {
    run.recorded_rows.push_back(
        {at<const char>(tensor), row_bytes, at<const int64_t>(rows), count, at<char>(ring), row_slots});
  }
  run.losses = take_log<bfloat16>(logs, "losses");
  run.logits = take_log<bfloat16>(logs, "logits");
  run.logged_learning_rates = take_log<double>(logs, "learning_rates");
  run.clip_coefs = take_log<float>(logs, "clip_coefs");
  run.grad_norms = take_log<float>(logs, "grad_norms");
  run.hidden_means = take_log<float>(logs, "hidden_means");
  run.hidden_vars = take_log<float>(logs, "hidden_vars");
  run.step_losses = at<float>(losses);
  run.step_grad_norms = at<float>(grad_norms);
  return result;
}

}  // namespace

void bind_run(py::module_& m) {
  // module_local: the tests load another module that has the same class.
  py::class_<PyRun, std::shared_ptr<PyRun>>(m, "TrainingRun", py::module_local(),
                                            "What an engine runs: a TiedGPT and the tensors that its steps need.")
      .def(py::init(&make_run), py::kw_only(), py::arg("shape"), py::arg("parameters"), py::arg("groups"),
           py::arg("rounding"), py::arg("max_grad_norm"), py::arg("target_offset"), py::arg("corpus"),
           py::arg("offsets"), py::arg("frozen"), py::arg("learning_rates"), py::arg("start"), py::arg("every"),
           py::arg("slots"), py::arg("recorded_rows"), py::arg("logs"), py::arg("losses"), py::arg("grad_norms"),
           py::arg("tensors"));
}

}  // namespace bhfast
