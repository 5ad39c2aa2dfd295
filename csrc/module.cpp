// The Python module bhfast._C: the instruction sets, and the native engine as a class. Loading it registers the kernels
// of ops.cpp. One file, as pybind11 takes most of the time to compile.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <map>
#include <optional>
#include <string>
#include <tuple>

#include "instruction_sets/dispatch.h"
#include "native/engine.h"

namespace bhfast::native {
namespace {

namespace py = pybind11;
using at::Tensor;
using Tensors = std::vector<Tensor>;
using Sizes = std::vector<int64_t>;

// Parameters that are updated together: params, exp_avgs, exp_avg_sqs, coefficients, rings, ring_of. See
// bhfast.ops.kernels.adam_.
using GroupArgument = std::tuple<Tensors, Tensors, Tensors, Tensor, Tensors, std::vector<int64_t>>;

// Checks tensors, gives out pointers to their memory, and keeps them alive.
class TensorOwner {
 public:
  template <class T>
  T* pointer(const std::string& name, const Tensor& t, at::ScalarType dtype, at::IntArrayRef sizes) {
    TORCH_CHECK_VALUE(t.defined(), name, " must be a tensor, got None");
    TORCH_CHECK_TYPE(t.scalar_type() == dtype, name, " must be ", dtype, ", got ", t.scalar_type());
    TORCH_CHECK_VALUE(t.sizes() == sizes, name, " must have shape ", sizes, ", got ", t.sizes());
    TORCH_CHECK_VALUE(t.is_cpu() && t.is_contiguous(), name, " must be contiguous and on the CPU");
    tensors_.push_back(t);
    return static_cast<T*>(t.data_ptr());
  }

 private:
  Tensors tensors_;
};

struct PyEngine {
  TensorOwner owner;
  std::unique_ptr<Engine> engine;
};

// -------------------------------------------------------------------------------------------------------------------
// The parameters of a TiedGPT, in the order of model.parameters()

constexpr int64_t kParametersPerBlock = 12, kOtherParameters = 4;  // others: wte, wpe, the weight and bias of ln_f
constexpr size_t kFirstMlpWeight = 10;

// The network's sizes, from the parameters' shapes.
Shape shape_of(const Tensors& parameters, int64_t heads, int64_t windows) {
  const auto count = static_cast<int64_t>(parameters.size());
  const int64_t layers = (count - kOtherParameters) / kParametersPerBlock;
  TORCH_CHECK_VALUE(layers >= 1 && count == kOtherParameters + layers * kParametersPerBlock &&
                        parameters[0].dim() == 2 && parameters[1].dim() == 2 && parameters[kFirstMlpWeight].dim() == 2,
                    "parameters must be those of a TiedGPT");
  const int64_t mlp = parameters[kFirstMlpWeight].size(0);
  const Shape shape{parameters[0].size(0), parameters[0].size(1), mlp, layers, heads, parameters[1].size(0), windows};
  const std::string reason = unsupported(shape.hidden, shape.heads, shape.mlp);
  TORCH_CHECK_VALUE(reason.empty(), reason);
  return shape;
}

std::vector<Sizes> parameter_sizes(const Shape& s) {
  const int64_t d = s.hidden;
  std::vector<Sizes> sizes{{s.vocab, d}, {s.context, d}};
  for (int64_t layer = 0; layer < s.layers; ++layer) {
    for (const Sizes& size : std::initializer_list<Sizes>{
             {d}, {d}, {3 * d, d}, {3 * d}, {d, d}, {d}, {d}, {d}, {s.mlp, d}, {s.mlp}, {d, s.mlp}, {d}}) {
      sizes.push_back(size);
    }
  }
  sizes.insert(sizes.end(), 2, {d});
  return sizes;
}

std::vector<Parameter> take_parameters(TensorOwner& owner, const Tensors& parameters, const Shape& shape) {
  const std::vector<Sizes> sizes = parameter_sizes(shape);
  std::vector<Parameter> result;
  for (size_t i = 0; i < parameters.size(); ++i) {
    const std::string name = "parameters[" + std::to_string(i) + "]";
    result.push_back({owner.pointer<bfloat16>(name, parameters[i], at::kBFloat16, sizes[i]),
                      owner.pointer<bfloat16>(name + ".grad", parameters[i].grad(), at::kBFloat16, sizes[i])});
  }
  return result;
}

// -------------------------------------------------------------------------------------------------------------------
// The other arguments

// slots: of the rings; set by the first ring if it is 0.
ParameterGroup take_group(TensorOwner& owner, const GroupArgument& argument, int64_t& slots, int64_t steps) {
  const auto& [params, exp_avgs, exp_avg_sqs, coefficients, rings, ring_of] = argument;
  TORCH_CHECK_VALUE(exp_avgs.size() == params.size() && exp_avg_sqs.size() == params.size(),
                    "exp_avgs and exp_avg_sqs must be as many as params");
  TORCH_CHECK_VALUE(ring_of.size() == rings.size(), "ring_of must be as many as rings");
  ParameterGroup group;
  for (size_t i = 0; i < params.size(); ++i) {
    const at::IntArrayRef sizes = params[i].sizes();
    group.tensors.push_back({owner.pointer<void>("params", params[i], at::kBFloat16, sizes),
                             owner.pointer<void>("grads", params[i].grad(), at::kBFloat16, sizes),
                             owner.pointer<void>("exp_avgs", exp_avgs[i], at::kBFloat16, sizes),
                             owner.pointer<void>("exp_avg_sqs", exp_avg_sqs[i], at::kBFloat16, sizes),
                             {},
                             params[i].numel()});
  }
  for (size_t j = 0; j < rings.size(); ++j) {
    const auto param = static_cast<size_t>(ring_of[j] / kFields);
    TORCH_CHECK_VALUE(ring_of[j] >= 0 && param < params.size(), "ring_of must be fields of the params");
    if (slots == 0) slots = rings[j].size(0);
    Sizes sizes = params[param].sizes().vec();
    sizes.insert(sizes.begin(), slots);
    group.tensors[param].rings[ring_of[j] % kFields] = owner.pointer<void>("rings", rings[j], at::kBFloat16, sizes);
  }
  const auto* table =
      owner.pointer<const Coefficients>("coefficients", coefficients, at::kFloat, {steps, kCoefficientCount});
  group.coefficients.assign(table, table + steps);
  return group;
}

template <class T>
Log<T> take_log(TensorOwner& owner, const std::map<std::string, Tensor>& logs, const char* name, at::ScalarType dtype,
                Sizes sizes) {
  const auto found = logs.find(name);
  if (found == logs.end()) return {};
  const int64_t slots = found->second.size(0);
  sizes.insert(sizes.begin(), slots);
  return {owner.pointer<T>(name, found->second, dtype, sizes), slots};
}

// tensor, rows, ring: see bhfast.recording.slots.RowSlots.
using RowsArgument = std::tuple<Tensor, Tensor, Tensor>;

RecordedRows take_rows(TensorOwner& owner, const RowsArgument& argument) {
  const auto& [tensor, rows, ring] = argument;
  TORCH_CHECK_VALUE(tensor.dim() >= 1 && ring.dim() >= 1, "recorded rows and their rings must have rows");
  const int64_t count = rows.numel(), slots = ring.size(0), length = tensor.size(0);
  Sizes sizes = tensor.sizes().vec();
  sizes[0] = count;
  sizes.insert(sizes.begin(), slots);
  const auto* from = owner.pointer<const char>("the tensor of recorded rows", tensor, at::kBFloat16, tensor.sizes());
  const auto* indices = owner.pointer<const int64_t>("recorded rows", rows, at::kLong, {count});
  TORCH_CHECK_VALUE(std::all_of(indices, indices + count, [&](int64_t row) { return 0 <= row && row < length; }),
                    "recorded rows must be 0 to ", length - 1);
  auto* to = owner.pointer<char>("the ring of recorded rows", ring, at::kBFloat16, sizes);
  const int64_t row_bytes = length ? tensor.numel() / length * tensor.element_size() : 0;
  return {from, row_bytes, indices, count, to, slots};
}

// Check what the steps read: a token or an offset out of range would make them read or write beyond their memory.
void check_corpus(const TrainingRun& run, int64_t tokens, int64_t offsets) {
  TORCH_CHECK_VALUE(std::all_of(run.corpus, run.corpus + tokens,
                                [&](int32_t token) { return 0 <= token && token < run.shape.vocab; }),
                    "corpus must have tokens below ", run.shape.vocab);
  const int64_t last = tokens - run.shape.context - 1;
  TORCH_CHECK_VALUE(
      std::all_of(run.offsets, run.offsets + offsets, [&](int64_t offset) { return 0 <= offset && offset <= last; }),
      "offsets must be 0 to ", last);
}

PyEngine make_engine(const Tensors& parameters, int64_t heads, const std::vector<GroupArgument>& groups,
                     const std::string& rounding, float max_grad_norm, int64_t target_offset, const Tensor& corpus,
                     const Tensor& offsets, const Tensor& learning_rates, int64_t start, int64_t every,
                     const std::vector<RowsArgument>& recorded_rows, const std::optional<Tensor>& frozen,
                     const std::map<std::string, Tensor>& logs, const Tensor& losses, const Tensor& grad_norms,
                     std::optional<int> threads, const std::string& instruction_set) {
  TORCH_CHECK_VALUE(offsets.dim() == 2, "offsets must have shape [steps, windows], got ", offsets.sizes());
  TORCH_CHECK_VALUE(!threads || *threads >= 1, "threads must be at least 1, got ", *threads);
  TORCH_CHECK_VALUE(every >= 1, "every must be at least 1, got ", every);
  const int64_t steps = offsets.size(0), windows = offsets.size(1);
  TORCH_CHECK_VALUE(0 <= start && start <= steps, "start must be 0 to ", steps, ", got ", start);
  PyEngine result;
  TensorOwner& owner = result.owner;

  TrainingRun run{};
  run.shape = shape_of(parameters, heads, windows);
  TORCH_CHECK_VALUE(1 <= target_offset && target_offset <= run.shape.context, "target_offset must be 1 to ",
                    run.shape.context, ", got ", target_offset);
  run.parameters = take_parameters(owner, parameters, run.shape);
  for (const GroupArgument& group : groups) run.groups.push_back(take_group(owner, group, run.slots, steps));
  run.rounding = rounding == "per-op" ? Rounding::per_op : Rounding::opmath;
  run.max_grad_norm = max_grad_norm;
  run.target_offset = target_offset;
  run.corpus = owner.pointer<const int32_t>("corpus", corpus, at::kInt, {corpus.numel()});
  run.offsets = owner.pointer<const int64_t>("offsets", offsets, at::kLong, {steps, windows});
  check_corpus(run, corpus.numel(), offsets.numel());
  run.learning_rates = owner.pointer<const double>("learning_rates", learning_rates, at::kDouble, {steps});
  run.every = every;
  if (frozen) run.frozen = owner.pointer<const bool>("frozen", *frozen, at::kBool, {run.shape.vocab});
  for (const RowsArgument& rows : recorded_rows) run.recorded_rows.push_back(take_rows(owner, rows));
  run.start = start;
  run.losses = take_log<bfloat16>(owner, logs, "losses", at::kBFloat16, {});
  run.logits = take_log<bfloat16>(owner, logs, "logits", at::kBFloat16, {run.shape.vocab});
  run.logged_learning_rates = take_log<double>(owner, logs, "learning_rates", at::kDouble, {});
  run.clip_coefs = take_log<float>(owner, logs, "clip_coefs", at::kFloat, {});
  run.grad_norms = take_log<float>(owner, logs, "grad_norms", at::kFloat, {});
  run.hidden_means = take_log<float>(owner, logs, "hidden_means", at::kFloat, {run.shape.hidden});
  run.hidden_vars = take_log<float>(owner, logs, "hidden_vars", at::kFloat, {run.shape.hidden});
  run.step_losses = owner.pointer<float>("losses", losses, at::kFloat, {steps});
  run.step_grad_norms = owner.pointer<float>("grad_norms", grad_norms, at::kFloat, {steps});

  const auto most = static_cast<int>(std::min<int64_t>(at::get_num_threads(), row_blocks(run.shape)));
  result.engine = std::make_unique<Engine>(std::move(run), threads.value_or(most), instruction_set);
  return result;
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
      .def(py::init(&make_engine), py::kw_only(), py::arg("parameters"), py::arg("heads"), py::arg("groups"),
           py::arg("rounding"), py::arg("max_grad_norm"), py::arg("target_offset"), py::arg("corpus"),
           py::arg("offsets"), py::arg("learning_rates"), py::arg("start"), py::arg("every"), py::arg("recorded_rows"),
           py::arg("frozen"), py::arg("logs"), py::arg("losses"), py::arg("grad_norms"), py::arg("threads"),
           py::arg("instruction_set"))
      .def(
          "run", [](PyEngine& self, int64_t steps) { self.engine->run(steps); }, py::arg("steps"),
          py::call_guard<py::gil_scoped_release>(), "Run and record the next `steps` steps.")
      .def(
          "set_profiling", [](PyEngine& self, bool on) { self.engine->set_profiling(on); }, py::arg("on"),
          "Turn profiling on or off.")
      .def("profile", &profile_of,
           "Return the seconds spent on each activity while profiling was on, summed over threads.");
}

}  // namespace
}  // namespace bhfast::native

PYBIND11_MODULE(_C, m) {
  m.def("instruction_sets", &bhfast::instruction_sets, "Return those that this machine supports, fastest first.");
  m.def("instruction_set", [] { return bhfast::current_instruction_set().name; }, "Return the one the kernels use.");
  m.def("use_instruction_set", &bhfast::use_instruction_set, "Choose the kernels'; their bits do not depend on it.");
  m.attr("norm_block") = bhfast::kNormBlock;
  bhfast::native::bind_engine(m);
#ifdef BHFAST_CUDA
  m.attr("cuda_architectures") = BHFAST_CUDA;
#else
  m.attr("cuda_architectures") = pybind11::none();
#endif
}
