// Runs kernels: `probes NAME` exits with 0 if the results are right. The probes below FAULTS are wrong on purpose, and
// must be noticed.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <functional>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "cuda/kernels.h"
#include "cuda/ptx.h"
#include "cuda/resident.h"
#include "cuda/resident/plan.h"
#include "instructions.h"
#include "ring.h"

using namespace bhfast;

namespace {

std::mt19937_64 generator(7);

template <class T>
std::vector<T> random_values(int64_t n) {
  std::normal_distribution<float> normal;
  std::vector<T> values(n);
  for (T& value : values) store(value, rounded<T>(normal(generator)));
  return values;
}

bool check(bool is_right, const char* what) {
  if (!is_right) std::fprintf(stderr, "%s: the result is wrong\n", what);
  return is_right;
}

template <class T>
bool same(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

// ---------------------------------------------------------------------------------------------------------------------
// The project's kernels, on memory that ends where a tensor ends

const int64_t kSizes[] = {0, 1, 7, 8, 9, 63, 2047, 2048, 2049, 4100};

template <class T>
bool adam_is_right(bool records) {
  constexpr int64_t kSlots = 3;
  const Coefficients c{0.99f, 0.3f, -1e-3f, 0.1f, 0.001f, 0.999f, 1e-8f};
  struct Tensors {
    std::vector<T> param, grad, exp_avg, exp_avg_sq, ring;
  };
  std::vector<Tensors> all;
  std::vector<AdamTensors> list;
  for (const int64_t n : kSizes) {
    all.push_back({random_values<T>(n), random_values<T>(n), random_values<T>(n), random_values<T>(n),
                   std::vector<T>(kSlots * n)});
    for (T& v : all.back().exp_avg_sq) store(v, std::fabs(to_float(v)));
  }
  for (Tensors& t : all) {
    list.push_back({t.param.data(),
                    t.grad.data(),
                    t.exp_avg.data(),
                    t.exp_avg_sq.data(),
                    {nullptr, nullptr, records ? t.ring.data() : nullptr, nullptr},
                    static_cast<int64_t>(t.param.size())});
  }
  std::vector<Tensors> wanted = all;
  for (Tensors& t : wanted) {
    for (size_t i = 0; i < t.param.size(); ++i) {
      adam_element<T, T>(t.param[i], t.grad[i], t.exp_avg[i], t.exp_avg_sq[i], 0.5f, c);
      if (records) t.ring[2 * t.param.size() + i] = t.exp_avg[i];
    }
  }
  const Dtype dtype = sizeof(T) == 2 ? Dtype::bfloat16 : Dtype::float32;
  cuda::adam(list, dtype, Rounding::per_op, {nullptr, c, nullptr, 0.5f, nullptr, 5, 1, kSlots}, nullptr);
  for (size_t i = 0; i < all.size(); ++i) {
    if (!same(all[i].param, wanted[i].param) || !same(all[i].exp_avg, wanted[i].exp_avg) ||
        !same(all[i].exp_avg_sq, wanted[i].exp_avg_sq) || !same(all[i].ring, wanted[i].ring)) {
      return false;
    }
  }
  return true;
}

bool norm_is_right() {
  std::vector<std::vector<bfloat16>> grads;
  std::vector<GradTensor> list;
  std::vector<float> squares;
  for (const int64_t n : kSizes) grads.push_back(random_values<bfloat16>(n));
  for (const auto& grad : grads) {
    list.push_back({grad.data(), Dtype::bfloat16, static_cast<int64_t>(grad.size())});
    for (const bfloat16 x : grad) squares.push_back(to_float(x) * to_float(x));
  }
  while (squares.size() > 1) {
    squares.resize((squares.size() + kNormBlock - 1) / kNormBlock * kNormBlock);
    std::vector<float> sums;
    for (size_t block = 0; block < squares.size(); block += kNormBlock) {
      for (int64_t width = kNormBlock / 2; width > 0; width /= 2) {
        for (int64_t i = 0; i < width; ++i) squares[block + i] += squares[block + width + i];
      }
      sums.push_back(squares[block]);
    }
    squares = sums;
  }
  std::vector<float> workspace(cuda::norm_workspace(list));
  float norm, coefficient;
  cuda::grad_norm(list, workspace.data(), &norm, &coefficient, 1, true, nullptr);
  return norm == std::sqrt(squares[0]) && coefficient == clip_coefficient(norm, 1, true);
}

bool record_is_right() {
  constexpr int64_t kSlots = 2;
  std::vector<std::vector<float>> values, rings;
  std::vector<RecordTensor> list;
  for (const int64_t n : kSizes) {
    values.push_back(random_values<float>(n));
    rings.emplace_back(kSlots * n);
  }
  for (size_t i = 0; i < values.size(); ++i) {
    list.push_back({values[i].data(), rings[i].data(), static_cast<int64_t>(values[i].size() * sizeof(float))});
  }
  StepScalars scalars{};
  scalars.step = 3, scalars.every = 1, scalars.slots = kSlots;
  cuda::record(list, scalars, nullptr);
  for (size_t i = 0; i < values.size(); ++i) {
    if (!same(values[i], {rings[i].begin() + values[i].size(), rings[i].end()})) return false;
  }
  return true;
}

// What steps of the resident engine write: parameters, state, gradients, rings and losses.
std::vector<uint16_t> state_after_steps(const Shape& shape, int64_t steps, int blocks_log2, int64_t shared_bytes) {
  constexpr int64_t kSlots = 2;
  const int64_t d = shape.hidden;
  std::vector<int64_t> sizes{shape.context * d};
  for (int64_t layer = 0; layer < shape.layers; ++layer) {
    const int64_t wide = shape.mlp * d;
    sizes.insert(sizes.end(), {d, d, 3 * d * d, 3 * d, d * d, d, d, d, wide, shape.mlp, wide, d});
  }
  sizes.insert(sizes.end(), 2, d);
  sizes.push_back(shape.vocab * d);  // last, so that its gradients and state end where memory ends
  int64_t count = 0;
  for (const int64_t n : sizes) count += n;
  generator.seed(1);
  std::vector<bfloat16> params = random_values<bfloat16>(count), grads(count), exp_avgs(count), exp_avg_sqs(count);
  std::vector<bfloat16> ring(kSlots * sizes.back()), logits(kSlots * shape.vocab);
  std::vector<int32_t> corpus(99);
  for (size_t i = 0; i < corpus.size(); ++i) corpus[i] = static_cast<int32_t>(i * 7 % shape.vocab);
  const std::vector<int64_t> offsets{3, 40, 17, 8}, rows{18, 0};
  const std::vector<double> rates(steps, 1e-3);
  const std::vector<Coefficients> coefficients(steps, {1, 0.3f, -1e-3f, 0.1f, 0.001f, 0.999f, 1e-8f});
  std::vector<float> losses(steps), norms(steps);
  std::vector<char> row_ring(kSlots * rows.size() * 2 * d);

  TrainingRun run{};
  run.shape = shape;
  ParameterGroup group{{}, coefficients.data()};
  int64_t first = 0;
  for (const int64_t n : sizes) {
    run.parameters.push_back({&params[first], &grads[first]});
    group.tensors.push_back({&params[first], &grads[first], &exp_avgs[first], &exp_avg_sqs[first], {}, n});
    first += n;
  }
  std::rotate(run.parameters.begin(), run.parameters.end() - 1, run.parameters.end());  // tokens come first
  group.tensors.back().rings[0] = ring.data();
  run.groups = {group};
  run.max_grad_norm = 1;
  run.target_offset = 2;
  run.corpus = corpus.data();
  run.offsets = offsets.data();
  run.learning_rates = rates.data();
  run.every = 1;
  run.slots = kSlots;
  run.logits = {logits.data(), kSlots};
  const auto* const tokens = reinterpret_cast<const char*>(run.parameters[0].value);
  run.recorded_rows = {{tokens, 2 * d, rows.data(), static_cast<int64_t>(rows.size()), row_ring.data(), kSlots}};
  run.step_losses = losses.data();
  run.step_grad_norms = norms.data();

  using cuda::resident::make_plan;
  std::vector<char> workspace(make_plan(run, 1 << blocks_log2, shared_bytes, nullptr).workspace_bytes);
  const auto plan = make_plan(run, 1 << blocks_log2, shared_bytes, workspace.data());
  const auto size = static_cast<int64_t>(plan.run.size());
  cuda::run_resident({plan.run.data(), size, 1, blocks_log2, plan.shared_bytes, 0, steps}, nullptr);

  std::vector<uint16_t> state;
  const auto add = [&](const void* from, size_t bytes) {
    const auto* const values = static_cast<const uint16_t*>(from);
    state.insert(state.end(), values, values + bytes / 2);
  };
  for (const auto* v : {&params, &grads, &exp_avgs, &exp_avg_sqs, &ring, &logits}) add(v->data(), 2 * v->size());
  add(row_ring.data(), row_ring.size());
  for (const auto* v : {&losses, &norms}) add(v->data(), 4 * v->size());
  return state;
}

// Whether neither the number of blocks nor the place of matrices change its bits. (test_resident.py looks at values.)
bool resident_is_right(const Shape& shape, int64_t steps) {
  return state_after_steps(shape, steps, 1, 0) == state_after_steps(shape, steps, 0, 40 << 10);
}

// ---------------------------------------------------------------------------------------------------------------------
// What the stand-in must do right

bool warps_are_right() {
  std::vector<int> sums(2 * 64);
  int count = 0;
  cuda_on_cpu::launch(2, 64, 0, nullptr, [&] {
    int x = threadIdx.x;
    for (int mask = 16; mask > 0; mask /= 2) x += __shfl_xor_sync(~0u, x, mask);
    const int first = __shfl_sync(~0u, x, 0), below = __shfl_down_sync(~0u, x, 16);
    sums[blockIdx.x * blockDim.x + threadIdx.x] = x + first - below;
    atomicAdd(&count, 1);
  });
  for (int i = 0; i < 128; ++i) {
    if (sums[i] != (i / 32 % 2 ? 1520 : 496)) return false;
  }
  return count == 128;
}

// The sum of a block's thread numbers through shared memory; 0 barriers are too few.
float sum_of_block(int barriers) {
  float result = 0;
  cuda_on_cpu::launch(1, 64, 0, nullptr, [&] {
    auto& x = cuda_on_cpu::shared<float[64]>(0);
    x[threadIdx.x] = threadIdx.x;
    for (int i = 0; i < barriers; ++i) __syncthreads();
    if (threadIdx.x == 20) {
      for (int i = 0; i < 64; ++i) result += x[i];
    }
  });
  return result;
}

bool barriers_are_right() { return sum_of_block(1) == 63 * 64 / 2; }

bool product_is_right() {
  const auto a = random_values<bfloat16>(16 * 32), b = random_values<bfloat16>(32 * 8);
  std::vector<float> c(16 * 8);
  cuda::product(&a[0].bits, &b[0].bits, c.data());
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      double wanted = 0, size = 0;
      for (int k = 0; k < 32; ++k) {
        const double term = static_cast<double>(to_float(a[row * 32 + k])) * to_float(b[k * 8 + column]);
        wanted += term;
        size += std::fabs(term);
      }
      if (!(std::fabs(c[row * 8 + column] - wanted) <= 3 * 0x1p-24 * size)) return false;  // three roundings
    }
  }
  return true;
}

bool launches_are_checked() {
  cuda_on_cpu::launch(0, 32, 0, nullptr, [] {});
  return cudaGetLastError() == cudaErrorInvalidConfiguration && cudaGetLastError() == cudaSuccess;
}

// ---------------------------------------------------------------------------------------------------------------------
// FAULTS

bool missing_barrier() {
  for (int i = 0; i < 20; ++i) {
    if (sum_of_block(0) != 63 * 64 / 2) return false;
  }
  return true;
}

bool divergent_barrier() {
  cuda_on_cpu::launch(1, 64, 0, nullptr, [] {
    if (threadIdx.x < 16) {
      __syncthreads();
      asm volatile("");
    } else {
      __syncthreads();
    }
  });
  return true;
}

bool barrier_without_everyone() {
  cuda_on_cpu::launch(1, 64, 0, nullptr, [] {
    if (threadIdx.x < 32) __syncthreads();
  });
  return true;
}

bool half_a_cluster() {
  cuda_on_cpu::launch(
      2, 32, 0, nullptr,
      [] {
        if (cuda::cluster_rank() == 0) {
          cuda::cluster_arrive();
          cuda::cluster_wait();
        }
      },
      2);
  return true;
}

bool beyond_shared_memory() {
  cuda_on_cpu::launch(1, 64, 0, nullptr, [] { cuda_on_cpu::shared<float[63]>(0)[threadIdx.x] = 1; });
  return true;
}

bool beyond_dynamic_memory() {
  cuda_on_cpu::launch(1, 64, 63, nullptr, [] { static_cast<char*>(cuda_on_cpu::dynamic_shared())[threadIdx.x] = 1; });
  return true;
}

bool beyond_the_tensor() {
  std::vector<float> x(63);
  cuda_on_cpu::launch(1, 64, 0, nullptr, [&] { x.data()[threadIdx.x] = 1; });
  return true;
}

bool misaligned() {
  std::vector<char> x(100);
  volatile int offset = 4;
  cuda_on_cpu::launch(1, 1, 0, nullptr, [&] { reinterpret_cast<uint4*>(x.data() + offset)->x = 1; });
  return true;
}

bool misaligned_matrix() {
  cuda_on_cpu::launch(1, 32, 1024, nullptr, [] {
    uint32_t to[4];
    cuda::ldmatrix_x4<false>(to, static_cast<char*>(cuda_on_cpu::dynamic_shared()) + threadIdx.x * 8);
  });
  return true;
}

const std::map<std::string, std::function<bool()>> kProbes = {
    {"adam",
     [] {
       return adam_is_right<bfloat16>(true) && adam_is_right<float>(true) && adam_is_right<bfloat16>(false) &&
              adam_is_right<float>(false);
     }},
    {"norm", norm_is_right},
    {"record", record_is_right},
    {"resident", [] { return resident_is_right({19, 16, 16, 1, 1, 17, 1}, 1); }},
    {"barriers_of_resident", [] { return resident_is_right({99, 32, 64, 2, 2, 33, 1}, 2); }},
    {"warps", warps_are_right},
    {"barriers", barriers_are_right},
    {"product", product_is_right},
    {"launches", launches_are_checked},
    {"missing_barrier", missing_barrier},
    {"divergent_barrier", divergent_barrier},
    {"barrier_without_everyone", barrier_without_everyone},
    {"half_a_cluster", half_a_cluster},
    {"beyond_shared_memory", beyond_shared_memory},
    {"beyond_dynamic_memory", beyond_dynamic_memory},
    {"beyond_the_tensor", beyond_the_tensor},
    {"misaligned", misaligned},
    {"misaligned_matrix", misaligned_matrix},
};

}  // namespace

int main(int count, char** arguments) {
  bool right = true;
  for (int i = 1; i < count; ++i) right = check(kProbes.at(arguments[i])(), arguments[i]) && right;
  return right ? 0 : 1;
}
