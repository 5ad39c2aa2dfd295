#include "python_run.h"

#include <ATen/ops/max.h>
#include <ATen/ops/min.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <map>
#include <optional>
#include <tuple>

namespace bhfast {
namespace {

namespace py = pybind11;
using at::Tensor;
using Sizes = std::vector<int64_t>;

// Parameters that are updated together: params, exp_avgs, exp_avg_sqs, coefficients, rings, ring_of. See
// bhfast.ops.kernels.adam_.
using GroupArgument = std::tuple<Tensors, Tensors, Tensors, Tensor, Tensors, std::vector<int64_t>>;

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
  return {parameters[0].size(0), parameters[0].size(1), mlp, layers, heads, parameters[1].size(0), windows};
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
  group.coefficients =
      owner.pointer<const Coefficients>("coefficients", coefficients, at::kFloat, {steps, kCoefficientCount});
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

// Check that all values are 0 to `last`: a token or an offset out of range would make the steps read or write beyond
// their memory.
void check_range(const std::string& message, const Tensor& values, int64_t last) {
  if (values.numel() == 0) return;
  TORCH_CHECK_VALUE(values.min().item<int64_t>() >= 0 && values.max().item<int64_t>() <= last, message);
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
  check_range(c10::str("recorded rows must be 0 to ", length - 1), rows, length - 1);
  auto* to = owner.pointer<char>("the ring of recorded rows", ring, at::kBFloat16, sizes);
  const int64_t row_bytes = length ? tensor.numel() / length * tensor.element_size() : 0;
  return {from, row_bytes, indices, count, to, slots};
}

PyRun make_run(const Tensors& parameters, int64_t heads, const std::vector<GroupArgument>& groups,
               const std::string& rounding, float max_grad_norm, int64_t target_offset, const Tensor& corpus,
               const Tensor& offsets, const Tensor& learning_rates, int64_t start, int64_t every,
               const std::vector<RowsArgument>& recorded_rows, const std::optional<Tensor>& frozen,
               const std::map<std::string, Tensor>& logs, const Tensor& losses, const Tensor& grad_norms) {
  TORCH_CHECK_VALUE(offsets.dim() == 2, "offsets must have shape [steps, windows], got ", offsets.sizes());
  TORCH_CHECK_VALUE(every >= 1, "every must be at least 1, got ", every);
  const int64_t steps = offsets.size(0), windows = offsets.size(1);
  TORCH_CHECK_VALUE(0 <= start && start <= steps, "start must be 0 to ", steps, ", got ", start);
  TORCH_CHECK_VALUE(!parameters.empty(), "parameters must be those of a TiedGPT");
  PyRun result{TensorOwner(parameters[0].device()), parameters[0].device(), steps, {}};
  TensorOwner& owner = result.owner;
  TrainingRun& run = result.run;

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
  check_range(c10::str("corpus must have tokens below ", run.shape.vocab), corpus, run.shape.vocab - 1);
  const int64_t last = corpus.numel() - run.shape.context - 1;
  check_range(c10::str("offsets must be 0 to ", last), offsets, last);
  run.learning_rates = owner.pointer<const double>("learning_rates", learning_rates, at::kDouble, {steps});
  run.start = start;
  run.every = every;
  if (frozen) run.frozen = owner.pointer<const bool>("frozen", *frozen, at::kBool, {run.shape.vocab});
  for (const RowsArgument& rows : recorded_rows) run.recorded_rows.push_back(take_rows(owner, rows));
  run.losses = take_log<bfloat16>(owner, logs, "losses", at::kBFloat16, {});
  run.logits = take_log<bfloat16>(owner, logs, "logits", at::kBFloat16, {run.shape.vocab});
  run.logged_learning_rates = take_log<double>(owner, logs, "learning_rates", at::kDouble, {});
  run.clip_coefs = take_log<float>(owner, logs, "clip_coefs", at::kFloat, {});
  run.grad_norms = take_log<float>(owner, logs, "grad_norms", at::kFloat, {});
  run.hidden_means = take_log<float>(owner, logs, "hidden_means", at::kFloat, {run.shape.hidden});
  run.hidden_vars = take_log<float>(owner, logs, "hidden_vars", at::kFloat, {run.shape.hidden});
  run.step_losses = owner.pointer<float>("losses", losses, at::kFloat, {steps});
  run.step_grad_norms = owner.pointer<float>("grad_norms", grad_norms, at::kFloat, {steps});
  return result;
}

}  // namespace

void bind_run(py::module_& m) {
  // module_local: the tests load another module that has the same class.
  py::class_<PyRun, std::shared_ptr<PyRun>>(m, "TrainingRun", py::module_local(),
                                            "What an engine runs: a TiedGPT and the tensors that its steps need.")
      .def(py::init(&make_run), py::kw_only(), py::arg("parameters"), py::arg("heads"), py::arg("groups"),
           py::arg("rounding"), py::arg("max_grad_norm"), py::arg("target_offset"), py::arg("corpus"),
           py::arg("offsets"), py::arg("learning_rates"), py::arg("start"), py::arg("every"), py::arg("recorded_rows"),
           py::arg("frozen"), py::arg("logs"), py::arg("losses"), py::arg("grad_norms"));
}

}  // namespace bhfast
