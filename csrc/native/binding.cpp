#include "binding.h"

#include <ATen/core/Tensor.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <map>
#include <string>
#include <tuple>

#include "engine.h"

namespace bhfast::native {
namespace {

namespace py = pybind11;
using at::Tensor;
using Tensors = std::vector<Tensor>;
using Sizes = std::vector<int64_t>;

// Parameters that are updated as one: params, exp_avgs, exp_avg_sqs, coefficients, rings, ring_of; see
// bhfast.ops.kernels.adam_.
using GroupOfTensors = std::tuple<Tensors, Tensors, Tensors, Tensor, Tensors, std::vector<int64_t>>;

// Checks tensors, keeps them alive, and hands out where their memory is.
class Keeper {
 public:
  template <class T>
  T* take(const std::string& name, const Tensor& t, at::ScalarType dtype, at::IntArrayRef sizes) {
    TORCH_CHECK_VALUE(t.defined(), name, " must be a tensor, got None");
    TORCH_CHECK_TYPE(t.scalar_type() == dtype, name, " must be ", dtype, ", got ", t.scalar_type());
    TORCH_CHECK_VALUE(t.sizes() == sizes, name, " must have shape ", sizes, ", got ", t.sizes());
    TORCH_CHECK_VALUE(t.is_cpu() && t.is_contiguous(), name, " must be contiguous, on the CPU");
    tensors_.push_back(t);
    return static_cast<T*>(t.data_ptr());
  }

 private:
  Tensors tensors_;
};

struct BoundEngine {
  Keeper keeper;
  std::unique_ptr<Engine> engine;
};

// The shapes of model.parameters().
std::vector<Sizes> sizes_of(const Shape& s) {
  const int64_t d = s.hidden;
  std::vector<Sizes> sizes{{s.vocab, d}, {s.context, d}};
  for (int64_t layer = 0; layer < s.layers; ++layer) {
    for (const Sizes& size : std::initializer_list<Sizes>{
             {d}, {d}, {3 * d, d}, {3 * d}, {d, d}, {d}, {d}, {d}, {4 * d, d}, {4 * d}, {d, 4 * d}, {d}}) {
      sizes.push_back(size);
    }
  }
  sizes.insert(sizes.end(), 2, {d});
  return sizes;
}

Group take_group(Keeper& keeper, const GroupOfTensors& tensors, int64_t& slots, int64_t steps) {
  const auto& [params, exp_avgs, exp_avg_sqs, coefficients, rings, ring_of] = tensors;
  TORCH_CHECK_VALUE(exp_avgs.size() == params.size() && exp_avg_sqs.size() == params.size(),
                    "exp_avgs and exp_avg_sqs must be as many as params");
  TORCH_CHECK_VALUE(ring_of.size() == rings.size(), "ring_of must be as many as rings");
  Group group;
  for (size_t i = 0; i < params.size(); ++i) {
    const at::IntArrayRef sizes = params[i].sizes();
    group.tensors.push_back({keeper.take<void>("params", params[i], at::kBFloat16, sizes),
                             keeper.take<void>("grads", params[i].grad(), at::kBFloat16, sizes),
                             keeper.take<void>("exp_avgs", exp_avgs[i], at::kBFloat16, sizes),
                             keeper.take<void>("exp_avg_sqs", exp_avg_sqs[i], at::kBFloat16, sizes),
                             {},
                             params[i].numel()});
  }
  for (size_t j = 0; j < rings.size(); ++j) {
    const auto param = static_cast<size_t>(ring_of[j] / kFields);
    TORCH_CHECK_VALUE(ring_of[j] >= 0 && param < params.size(), "ring_of must be fields of the params");
    if (slots == 0) slots = rings[j].size(0);
    Sizes sizes = params[param].sizes().vec();
    sizes.insert(sizes.begin(), slots);
    group.tensors[param].rings[ring_of[j] % kFields] = keeper.take<void>("rings", rings[j], at::kBFloat16, sizes);
  }
  constexpr int64_t kNumbers = sizeof(Coefficients) / sizeof(float);
  const auto* table = keeper.take<const Coefficients>("coefficients", coefficients, at::kFloat, {steps, kNumbers});
  group.coefficients.assign(table, table + steps);
  return group;
}

template <class T>
Log<T> take_log(Keeper& keeper, const std::map<std::string, Tensor>& logs, const char* name, at::ScalarType dtype,
                Sizes sizes) {
  const auto found = logs.find(name);
  if (found == logs.end()) return {};
  const int64_t slots = found->second.size(0);
  sizes.insert(sizes.begin(), slots);
  return {keeper.take<T>(name, found->second, dtype, sizes), slots};
}

BoundEngine make_engine(const Tensors& parameters, int64_t heads, const std::vector<GroupOfTensors>& groups,
                        const std::string& rounding, float max_grad_norm, int64_t target_offset, const Tensor& corpus,
                        const Tensor& offsets, const Tensor& learning_rates, int64_t every,
                        const std::map<std::string, Tensor>& logs, const Tensor& losses, const Tensor& grad_norms,
                        int threads, const std::string& instruction_set) {
  BoundEngine bound;
  Keeper& keeper = bound.keeper;
  const auto count = static_cast<int64_t>(parameters.size());
  TORCH_CHECK_VALUE(count >= 16 && count % 12 == 4 && parameters[0].dim() == 2 && parameters[1].dim() == 2,
                    "parameters must be those of a TiedGPT");
  TORCH_CHECK_VALUE(offsets.dim() == 2, "offsets must have shape [steps, windows], got ", offsets.sizes());
  TORCH_CHECK_VALUE(threads >= 1, "threads must be at least 1, got ", threads);
  TORCH_CHECK_VALUE(every >= 1, "every must be at least 1, got ", every);

  Job job{};
  Shape& s = job.shape;
  s = {parameters[0].size(0), parameters[0].size(1), count / 12, heads, parameters[1].size(0), offsets.size(1)};
  TORCH_CHECK_VALUE(heads >= 1 && s.hidden % 32 == 0 && s.hidden % (16 * heads) == 0,
                    "hidden_dim must be divisible by 32, and by 16 times heads, got ", s.hidden, " and ", heads);
  TORCH_CHECK_VALUE(1 <= target_offset && target_offset <= s.context, "target_offset must be 1 to ", s.context,
                    ", got ", target_offset);
  const int64_t steps = offsets.size(0);
  const std::vector<Sizes> sizes = sizes_of(s);
  for (int64_t i = 0; i < count; ++i) {
    const std::string name = "parameters[" + std::to_string(i) + "]";
    job.parameters.push_back({keeper.take<bfloat16>(name, parameters[i], at::kBFloat16, sizes[i]),
                              keeper.take<bfloat16>(name + ".grad", parameters[i].grad(), at::kBFloat16, sizes[i])});
  }
  for (const GroupOfTensors& group : groups) job.groups.push_back(take_group(keeper, group, job.slots, steps));
  job.rounding = rounding == "per-op" ? Rounding::per_op : Rounding::opmath;
  job.max_grad_norm = max_grad_norm;
  job.target_offset = target_offset;
  job.corpus = keeper.take<const uint8_t>("corpus", corpus, at::kByte, {corpus.numel()});
  job.offsets = keeper.take<const int64_t>("offsets", offsets, at::kLong, {steps, s.windows});
  job.learning_rates = keeper.take<const double>("learning_rates", learning_rates, at::kDouble, {steps});
  job.every = every;
  job.losses = take_log<bfloat16>(keeper, logs, "losses", at::kBFloat16, {});
  job.logits = take_log<bfloat16>(keeper, logs, "logits", at::kBFloat16, {s.vocab});
  job.logged_learning_rates = take_log<double>(keeper, logs, "learning_rates", at::kDouble, {});
  job.clip_coefs = take_log<float>(keeper, logs, "clip_coefs", at::kFloat, {});
  job.grad_norms = take_log<float>(keeper, logs, "grad_norms", at::kFloat, {});
  job.step_losses = keeper.take<float>("losses", losses, at::kFloat, {steps});
  job.step_grad_norms = keeper.take<float>("grad_norms", grad_norms, at::kFloat, {steps});

  const uint8_t* const end = job.corpus + corpus.numel();
  TORCH_CHECK_VALUE(std::all_of(job.corpus, end, [&](uint8_t byte) { return byte < s.vocab; }),
                    "corpus must have bytes below ", s.vocab);
  const int64_t last = corpus.numel() - s.context - 1;
  TORCH_CHECK_VALUE(std::all_of(job.offsets, job.offsets + offsets.numel(),
                                [&](int64_t offset) { return 0 <= offset && offset <= last; }),
                    "offsets must be 0 to ", last);
  bound.engine = std::make_unique<Engine>(std::move(job), threads, instruction_set);
  return bound;
}

}  // namespace

void bind(py::module_& m) {
  m.def("native_instruction_sets", &instruction_sets,
        "Those the native engine is compiled for and run here, best first. Its bits depend on it.");
  m.def("native_peak", &peak, py::arg("instruction_set"), py::arg("threads"), py::call_guard<py::gil_scoped_release>(),
        "Floating-point operations per second that so many threads can do, if nothing holds them up.");
  py::class_<BoundEngine>(m, "NativeEngine", "Training steps of a TiedGPT; the tensors it is given stay in its hands.")
      .def(py::init(&make_engine), py::kw_only(), py::arg("parameters"), py::arg("heads"), py::arg("groups"),
           py::arg("rounding"), py::arg("max_grad_norm"), py::arg("target_offset"), py::arg("corpus"),
           py::arg("offsets"), py::arg("learning_rates"), py::arg("every"), py::arg("logs"), py::arg("losses"),
           py::arg("grad_norms"), py::arg("threads"), py::arg("instruction_set"))
      .def(
          "run", [](BoundEngine& self, int64_t steps) { self.engine->run(steps); }, py::arg("steps"),
          py::call_guard<py::gil_scoped_release>(), "Run and record the next steps.")
      .def(
          "set_profiling", [](BoundEngine& self, bool on) { self.engine->set_profiling(on); }, py::arg("on"))
      .def(
          "profile",
          [](const BoundEngine& self) {
            std::map<std::string, double> seconds;
            const std::vector<double> times = self.engine->profile();
            for (int i = 0; i < kActivityCount; ++i) seconds[kActivities[i]] = times[i];
            return seconds;
          },
          "Return the seconds spent on each activity while profiling was on, summed over threads.");
}

}  // namespace bhfast::native
