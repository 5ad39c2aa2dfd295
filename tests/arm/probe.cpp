// The CPU's operations and the native engine without Python and torch, for machines that only an emulator has here.
//
//   probe sets                                      print the instruction sets that run here
//   probe SET adam DTYPE ROUNDING <IN >OUT          a step of Adam
//   probe SET norm DTYPE <IN >OUT                   the gradient norm
//   probe SET steps COUNT <IN >OUT                  steps of the native engine
//
// DTYPE: 0 bfloat16, 1 float32; ROUNDING: 0 per-op, 1 opmath. test_arm.py says what goes in, and what comes out.
#include <algorithm>
#include <cstdio>
#include <iterator>
#include <string>
#include <vector>

#include "cpu/operations.h"
#include "instruction_sets/dispatch.h"
#include "libtorch/abi.h"
#include "native/engine.h"

// Stands in for torch's: the whole range, on one thread.
AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t, ParallelFunc work, void* context) {
  if (begin < end) work(begin, end, context);
  return 0;
}

namespace bhfast {
namespace {

template <class T>
std::vector<T> read(int64_t count) {
  std::vector<T> values(count);
  if (std::fread(values.data(), sizeof(T), count, stdin) != static_cast<size_t>(count)) std::abort();
  return values;
}

template <class T>
void write(const std::vector<T>& values) {
  std::fwrite(values.data(), sizeof(T), values.size(), stdout);
}

// In: the number of elements; the coefficients and clip_coef; param, grad, exp_avg, exp_avg_sq. Out: all but grad.
void adam(Dtype dtype, Rounding rounding) {
  const int64_t numel = read<int64_t>(1)[0], bytes = numel * (dtype == Dtype::bfloat16 ? 2 : 4);
  StepScalars scalars{};
  scalars.coefficients = read<Coefficients>(1)[0];
  scalars.clip_coef = read<float>(1)[0];
  std::vector<char> param = read<char>(bytes), grad = read<char>(bytes), exp_avg = read<char>(bytes),
                    exp_avg_sq = read<char>(bytes);
  cpu::adam({{param.data(), grad.data(), exp_avg.data(), exp_avg_sq.data(), {}, numel}}, dtype, rounding, scalars);
  for (const auto& values : {param, exp_avg, exp_avg_sq}) write(values);
}

// In: the number of elements; the gradient. Out: its norm.
void norm(Dtype dtype) {
  const int64_t numel = read<int64_t>(1)[0];
  const std::vector<char> grad = read<char>(numel * (dtype == Dtype::bfloat16 ? 2 : 4));
  write(std::vector<float>{cpu::grad_norm({{grad.data(), dtype, numel}})});
}

// In: the shape, target_offset, the number of parameters, tokens and coefficients; the coefficients of each step; the
// sizes of the parameters; parameters; corpus; offsets.
// Out: losses and norms; for each parameter its gradient, and after the last step itself and both moments.
void steps(const std::string& instruction_set, int64_t count) {
  TrainingRun run{};
  run.shape = read<Shape>(1)[0];
  const std::vector<int64_t> sizes = read<int64_t>(3);
  const auto coefficients = read<Coefficients>(count);
  const auto numels = read<int64_t>(sizes[1]);
  std::vector<std::vector<bfloat16>> values, grads, exp_avgs, exp_avg_sqs;
  ParameterGroup group{{}, coefficients.data()};
  for (const int64_t numel : numels) {
    values.push_back(read<bfloat16>(numel));
    for (auto* zeros : {&grads, &exp_avgs, &exp_avg_sqs}) zeros->emplace_back(numel);
    run.parameters.push_back({values.back().data(), grads.back().data()});
    group.tensors.push_back(
        {values.back().data(), grads.back().data(), exp_avgs.back().data(), exp_avg_sqs.back().data(), {}, numel});
  }
  const auto corpus = read<int32_t>(sizes[2]);
  const auto offsets = read<int64_t>(count * run.shape.windows);
  const std::vector<double> learning_rates(count);
  std::vector<float> losses(count), norms(count);
  run.groups = {group};
  run.rounding = Rounding::per_op;
  run.max_grad_norm = 1;
  run.target_offset = sizes[0];
  run.corpus = corpus.data();
  run.offsets = offsets.data();
  run.learning_rates = learning_rates.data();
  run.every = 1;
  run.step_losses = losses.data();
  run.step_grad_norms = norms.data();
  native::Engine(run, 2, instruction_set).run(count);
  write(losses);
  write(norms);
  for (size_t i = 0; i < values.size(); ++i) {
    for (const auto* own : {&grads, &values, &exp_avgs, &exp_avg_sqs}) write((*own)[i]);
  }
}

}  // namespace
}  // namespace bhfast

int main(int count, char** arguments) {
  using namespace bhfast;
  const std::vector<std::string> words(arguments + 1, arguments + count);
  if (words[0] == "sets") {
    for (const std::string& name : instruction_sets()) std::puts(name.c_str());
    return 0;
  }
  use_instruction_set(words[0]);
  const auto dtype = static_cast<Dtype>(std::stoi(words[2]));
  if (words[1] == "adam") adam(dtype, static_cast<Rounding>(std::stoi(words[3])));
  if (words[1] == "norm") norm(dtype);
  if (words[1] == "steps") steps(words[0], std::stoll(words[2]));
}
