// The operations that bhfast/ops/kernels.py declares, for CPU and CUDA tensors. Each checks its arguments, then passes
// raw pointers to the kernels.
#include <algorithm>

#include "cpu/operations.h"
#include "libtorch/operation.h"
#ifdef BHFAST_CUDA
#include "cuda/kernels.h"
#include "cuda/launch_stream.h"
#endif
#ifdef BHFAST_CUDA_ON_CPU  // the CUDA kernels, executed by the CPU on its own tensors: tests/cuda_on_cpu
#include <machine.h>
#define BHFAST_LIBRARY "bhfast_cuda_on_cpu"
#else
#define BHFAST_LIBRARY "bhfast"
#endif

namespace bhfast {
namespace {

// Whether the CUDA kernels handle the tensor, and whether the host can read a scalar.
#if defined(BHFAST_CUDA_ON_CPU)
bool for_cuda(const Tensor&) { return true; }
bool host_can_read(const Tensor&) { return cuda_on_cpu::scalars_by_value; }
#elif defined(BHFAST_CUDA)
bool for_cuda(const Tensor& t) { return t.is_cuda(); }
bool host_can_read(const Tensor& t) { return t.is_cpu(); }
#else
bool host_can_read(const Tensor&) { return true; }
#endif

// -------------------------------------------------------------------------------------------------------------------
// Checks: the same as in bhfast/ops/checks.py, which then says what is wrong

void require(bool holds) {
  if (!holds) throw std::runtime_error("an argument is not as bhfast.ops.kernels describes it");
}

bool have_same_shape(const int64_t* sizes, const Tensor& like) {
  return std::equal(sizes, sizes + like.dim(), like.sizes());
}

void check_like(const Tensor& t, const Tensor& param) {
  require(t.dtype() == param.dtype() && t.is_on_device_of(param));
  require(t.dim() == param.dim() && have_same_shape(t.sizes(), param));
}

// Check one or several scalars, on the host or on the parameters' device.
void check_scalars(const Tensor& t, int32_t dtype, int64_t numel, const Tensor& param) {
  require(t.dtype() == dtype && t.numel() == numel && t.is_contiguous());
  require(t.is_cpu() || t.is_on_device_of(param));
}

// Check that t is [rows, *value's shape].
void check_rows(const Tensor& t, const Tensor& value) {
  require(t.dtype() == value.dtype() && t.is_on_device_of(value));
  require(t.dim() == value.dim() + 1 && have_same_shape(t.sizes() + 1, value));
}

void check_ring(const Tensor& ring, const Tensor& value, int64_t slots) {
  check_rows(ring, value);
  require(ring.sizes()[0] == slots && slots > 0 && ring.is_contiguous());
}

Dtype dtype_of(const Tensor& t) {
  const int32_t dtype = t.dtype();
  require(dtype == aoti_torch_dtype_bfloat16() || dtype == aoti_torch_dtype_float32());
  return dtype == aoti_torch_dtype_bfloat16() ? Dtype::bfloat16 : Dtype::float32;
}

Rounding rounding_of(const std::string& name) {
  require(name == "per-op" || name == "opmath");
  return name == "per-op" ? Rounding::per_op : Rounding::opmath;
}

// -------------------------------------------------------------------------------------------------------------------
// Scalars and tensors as the kernels take them

// Read the value if the host can, else point to it.
template <class T>
void take(const Tensor& t, T& value, const T*& device_pointer) {
  const T* data = static_cast<const T*>(t.data());
  if (host_can_read(t)) {
    value = *data;
  } else {
    device_pointer = data;
  }
}

void take_step(StepScalars& s, const Tensor& step, int64_t every, const Tensor& ring, const Tensor& like) {
  check_scalars(step, aoti_torch_dtype_int64(), 1, like);
  require(every > 0);
  take(step, s.step, s.device_step);
  s.every = every;
  s.slots = ring.dim() ? ring.sizes()[0] : 0;
}

// Gives out pointers to contiguous memory: of the tensor itself if it is contiguous, else of a copy.
class ContiguousMemory {
 public:
  const void* read(const Tensor& t) { return t.is_contiguous() ? t.data() : copy(t).data(); }

  void* update(const Tensor& t) {
    if (t.is_contiguous()) return t.mutable_data();
    updated_.emplace_back(&t, copies_.size());
    return copy(t).mutable_data();
  }

  // Copy the copies that were updated back to their tensors.
  void copy_back() const {
    for (const auto& [tensor, index] : updated_) tensor->copy_from(copies_[index]);
  }

 private:
  const Tensor& copy(const Tensor& t) {
    copies_.push_back(new_empty(t, t.dtype(), t.dim(), t.sizes()));
    copies_.back().copy_from(t);
    return copies_.back();
  }

  Tensors copies_;
  std::vector<std::pair<const Tensor*, size_t>> updated_;  // and the index of its copy
};

// -------------------------------------------------------------------------------------------------------------------
// Operations

std::vector<AdamTensors> take_adam_tensors(ContiguousMemory& memory, const Tensors& params, const Tensors& grads,
                                           const Tensors& exp_avgs, const Tensors& exp_avg_sqs) {
  std::vector<AdamTensors> list;
  list.reserve(params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    require(params[i].dtype() == params[0].dtype() && params[i].is_on_device_of(params[0]));
    for (const Tensors* tensors : {&grads, &exp_avgs, &exp_avg_sqs}) check_like((*tensors)[i], params[i]);
    list.push_back({memory.update(params[i]),
                    memory.read(grads[i]),
                    memory.update(exp_avgs[i]),
                    memory.update(exp_avg_sqs[i]),
                    {},
                    params[i].numel()});
  }
  return list;
}

void adam_op(const Tensors& params, const Tensors& grads, const Tensors& exp_avgs, const Tensors& exp_avg_sqs,
             const Tensor& coefficients, const std::optional<Tensor>& clip_coef, const std::string& rounding,
             const Tensors& rings, const std::vector<int64_t>& ring_of, const std::optional<Tensor>& step,
             int64_t every) {
  if (params.empty()) return;
  const Tensor& first = params[0];
  const Dtype dtype = dtype_of(first);
  for (const Tensors* tensors : {&grads, &exp_avgs, &exp_avg_sqs}) require(tensors->size() == params.size());
  const Rounding how = rounding_of(rounding);
  require(ring_of.size() == rings.size());

  const DeviceGuard guard(first);
  ContiguousMemory memory;
  std::vector<AdamTensors> list = take_adam_tensors(memory, params, grads, exp_avgs, exp_avg_sqs);

  StepScalars s{};
  check_scalars(coefficients, aoti_torch_dtype_float32(), kCoefficientCount, first);
  take(coefficients, s.coefficients, s.device_coefficients);
  s.clip_coef = 1;
  if (clip_coef) {
    check_scalars(*clip_coef, aoti_torch_dtype_float32(), 1, first);
    take(*clip_coef, s.clip_coef, s.device_clip_coef);
  }
  if (!rings.empty()) {
    require(step.has_value());
    take_step(s, *step, every, rings[0], first);
    for (size_t j = 0; j < rings.size(); ++j) {
      const int64_t param = ring_of[j] / kFields, field = ring_of[j] % kFields;
      require(ring_of[j] >= 0 && param < static_cast<int64_t>(params.size()));
      check_ring(rings[j], params[param], s.slots);
      list[param].rings[field] = memory.update(rings[j]);
    }
  }

#ifdef BHFAST_CUDA
  if (for_cuda(first)) {
    cuda::adam(list, dtype, how, s, cuda::stream_of(first));
  } else
#endif
    cpu::adam(std::move(list), dtype, how, s);
  memory.copy_back();
}

#ifdef BHFAST_CUDA
// All gradients in one tensor; mixed dtypes become float32, which holds both exactly.
Tensor join(const Tensors& grads, int64_t numel) {
  const bool all_same =
      std::all_of(grads.begin(), grads.end(), [&](const Tensor& grad) { return grad.dtype() == grads[0].dtype(); });
  Tensor joined = new_empty(grads[0], all_same ? grads[0].dtype() : aoti_torch_dtype_float32(), 1, &numel);
  int64_t offset = 0;
  for (const Tensor& grad : grads) {
    const std::vector<int64_t> strides = contiguous_strides(grad.dim(), grad.sizes());
    const Tensor part(ask_torch<AtenTensorHandle>(aoti_torch__reinterpret_tensor, joined.get(), grad.dim(),
                                                  grad.sizes(), strides.data(), offset));
    part.copy_from(grad);
    offset += grad.numel();
  }
  return joined;
}
#endif

std::tuple<Tensor, Tensor> clip_coefficient_op(const Tensors& grads, double max_norm) {
  require(!grads.empty());
  const Tensor& first = grads[0];
  const DeviceGuard guard(first);
  ContiguousMemory memory;
  std::vector<GradTensor> list;
  list.reserve(grads.size());
  bool any_bfloat16 = false;
  for (const Tensor& grad : grads) {
    const Dtype dtype = dtype_of(grad);
    require(grad.is_on_device_of(first));
    any_bfloat16 |= dtype == Dtype::bfloat16;
    list.push_back({memory.read(grad), dtype, grad.numel()});
  }
  Tensor norm = new_empty(first, aoti_torch_dtype_float32(), 0, nullptr);
  Tensor clip_coef = new_empty(first, aoti_torch_dtype_float32(), 0, nullptr);
  auto* const norm_at = static_cast<float*>(norm.mutable_data());
  auto* const clip_coef_at = static_cast<float*>(clip_coef.mutable_data());
#ifdef BHFAST_CUDA
  if (for_cuda(first)) {
    std::optional<Tensor> joined;
    if (list.size() > cuda::kMaxGrads) {
      int64_t numel = 0;
      for (const GradTensor& grad : list) numel += grad.numel;
      joined.emplace(join(grads, numel));
      list = {{joined->data(), dtype_of(*joined), numel}};
    }
    const int64_t blocks = cuda::norm_workspace(list);
    const Tensor sums = new_empty(first, aoti_torch_dtype_float32(), 1, &blocks);
    cuda::grad_norm(list, static_cast<float*>(sums.mutable_data()), norm_at, clip_coef_at, max_norm, any_bfloat16,
                    cuda::stream_of(first));
  } else
#endif
  {
    *norm_at = cpu::grad_norm(std::move(list));
    *clip_coef_at = clip_coefficient(*norm_at, max_norm, any_bfloat16);
  }
  return {std::move(norm), std::move(clip_coef)};
}

void record_op(const Tensors& values, const Tensors& rings, const Tensor& step, int64_t every) {
  require(rings.size() == values.size());
  if (values.empty()) return;
  const DeviceGuard guard(values[0]);
  StepScalars s{};
  take_step(s, step, every, rings[0], values[0]);
  ContiguousMemory memory;
  std::vector<RecordTensor> list;
  for (size_t i = 0; i < values.size(); ++i) {
    check_ring(rings[i], values[i], s.slots);
    require(values[i].is_on_device_of(values[0]));
    const int64_t bytes = values[i].numel() * values[i].itemsize();
    list.push_back({memory.read(values[i]), memory.update(rings[i]), bytes});
  }
#ifdef BHFAST_CUDA
  if (for_cuda(values[0])) {
    cuda::record(list, s, cuda::stream_of(values[0]));
  } else
#endif
    cpu::record(list, s);
}

#ifndef BHFAST_CUDA_ON_CPU
void adam_steps_op(const Tensor& param, const Tensor& exp_avg, const Tensor& exp_avg_sq, const Tensor& grads,
                   const Tensor& coefficients, const Tensor& clip_coefs, const Tensor& updated,
                   const std::string& rounding, const std::optional<Tensor>& params,
                   const std::optional<Tensor>& exp_avgs, const std::optional<Tensor>& exp_avg_sqs, int64_t first) {
  const Dtype dtype = dtype_of(param);
  const Rounding how = rounding_of(rounding);
  check_like(exp_avg, param);
  check_like(exp_avg_sq, param);
  check_rows(grads, param);
  const int64_t steps = grads.sizes()[0];
  check_scalars(coefficients, aoti_torch_dtype_float32(), steps * kCoefficientCount, param);
  check_scalars(clip_coefs, aoti_torch_dtype_float32(), steps, param);
  check_scalars(updated, aoti_torch_dtype_bool(), steps, param);
  require(0 <= first && first <= steps);
  if (steps == 0) return;

  ContiguousMemory memory;
  const Tensor one_step(ask_torch<AtenTensorHandle>(aoti_torch__reinterpret_tensor, grads.get(), param.dim(),
                                                    grads.sizes() + 1, grads.strides() + 1, int64_t{0}));
  const bool has_plain_steps = one_step.is_contiguous();
  cpu::AdamSteps s{};
  s.param = memory.update(param);
  s.exp_avg = memory.update(exp_avg);
  s.exp_avg_sq = memory.update(exp_avg_sq);
  s.grads = has_plain_steps ? grads.data() : memory.read(grads);
  s.numel = param.numel();
  s.grad_stride = has_plain_steps ? grads.strides()[0] : s.numel;
  s.steps = steps;
  s.first = first;
  s.coefficients = static_cast<const Coefficients*>(coefficients.data());
  s.clip_coefs = static_cast<const float*>(clip_coefs.data());
  s.updated = static_cast<const bool*>(updated.data());
  const std::optional<Tensor>* const records[] = {&params, &exp_avgs, &exp_avg_sqs};
  for (int field = 0; field < 3; ++field) {
    const std::optional<Tensor>& record = *records[field];
    if (!record || first == steps) continue;
    check_ring(*record, param, steps - first);
    s.records[field] = memory.update(*record);
  }
  cpu::adam_steps(s, dtype, how);
  memory.copy_back();
}
#endif

const Kernels for_cpu = Kernels(BHFAST_LIBRARY, "CPU")
                            .add<&adam_op>("adam_")
#ifndef BHFAST_CUDA_ON_CPU
                            .add<&adam_steps_op>("adam_steps_")
#endif
                            .add<&clip_coefficient_op>("clip_coefficient")
                            .add<&record_op>("record_");

#if defined(BHFAST_CUDA) && !defined(BHFAST_CUDA_ON_CPU)
const Kernels for_gpu = Kernels(BHFAST_LIBRARY, "CUDA")
                            .add<&adam_op>("adam_")
                            .add<&clip_coefficient_op>("clip_coefficient")
                            .add<&record_op>("record_");
#endif

}  // namespace
}  // namespace bhfast
