// The operations that bhfast/ops/kernels.py declares, for CPU and CUDA tensors. Each checks its arguments, then passes
// raw pointers to the kernels.
#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include "cpu/operations.h"
#ifdef BHFAST_CUDA
#include "cuda/kernels.h"
#include "cuda/launch_stream.h"
#endif
#ifdef BHFAST_CUDA_ON_CPU  // the CUDA kernels, executed by the CPU on its own tensors: tests/cuda_on_cpu
#include <machine.h>
#define BHFAST_LIBRARY bhfast_cuda_on_cpu
#else
#define BHFAST_LIBRARY bhfast
#endif

namespace bhfast {
namespace {

using at::Tensor;
using at::TensorList;

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
// Checks: the same as in bhfast/ops/checks.py, with the same messages

std::string name_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kBFloat16:
      return "bfloat16";
    case at::kHalf:
      return "float16";
    case at::kFloat:
      return "float32";
    case at::kDouble:
      return "float64";
    case at::kInt:
      return "int32";
    case at::kLong:
      return "int64";
    default:
      return c10::toString(dtype);
  }
}

void check_like(const char* name, size_t i, const Tensor& t, const Tensor& param) {
  TORCH_CHECK_TYPE(t.scalar_type() == param.scalar_type(), name, "[", i, "] must be ", name_of(param.scalar_type()),
                   " like params[", i, "], got ", name_of(t.scalar_type()));
  TORCH_CHECK_VALUE(t.sizes() == param.sizes(), name, "[", i, "] must have shape ", param.sizes(), " like params[", i,
                    "], got ", t.sizes());
  TORCH_CHECK_VALUE(t.device() == param.device(), name, "[", i, "] must be on ", param.device(), " like params[", i,
                    "], got ", t.device());
}

void check_length(const char* name, size_t length, const char* like, size_t wanted) {
  TORCH_CHECK_VALUE(length == wanted, name, " must be as many as ", like, " (", wanted, "), got ", length);
}

// Check one or several scalars, on the host or on the parameters' device.
void check_scalars(const char* name, const Tensor& t, at::ScalarType dtype, int64_t numel, const Tensor& param) {
  TORCH_CHECK_TYPE(t.scalar_type() == dtype, name, " must be ", name_of(dtype), ", got ", name_of(t.scalar_type()));
  TORCH_CHECK_VALUE(t.numel() == numel, name, " must have ", numel, " elements, got ", t.numel());
  TORCH_CHECK_VALUE(t.is_contiguous(), name, " must be contiguous");
  TORCH_CHECK_VALUE(t.is_cpu() || t.device() == param.device(), name, " must be on the CPU or on ", param.device(),
                    ", got ", t.device());
}

void check_ring(const std::string& name, const Tensor& ring, const Tensor& value, int64_t slots) {
  TORCH_CHECK_TYPE(ring.scalar_type() == value.scalar_type(), name, " must be ", name_of(value.scalar_type()),
                   " like what it records, got ", name_of(ring.scalar_type()));
  TORCH_CHECK_VALUE(ring.dim() == value.dim() + 1 && ring.sizes().slice(1) == value.sizes(), name,
                    " must have shape [slots, *", value.sizes(), "], got ", ring.sizes());
  TORCH_CHECK_VALUE(ring.size(0) == slots && slots > 0, name, " must have as many slots as the first ring (", slots,
                    "), at least 1, got ", ring.size(0));
  TORCH_CHECK_VALUE(ring.device() == value.device(), name, " must be on ", value.device(),
                    " like what it records, got ", ring.device());
  TORCH_CHECK_VALUE(ring.is_contiguous(), name, " must be contiguous");
}

Dtype dtype_of(const char* name, size_t i, const Tensor& t) {
  TORCH_CHECK_TYPE(t.scalar_type() == at::kBFloat16 || t.scalar_type() == at::kFloat, name, "[", i,
                   "] must be bfloat16 or float32, got ", name_of(t.scalar_type()));
  return t.scalar_type() == at::kBFloat16 ? Dtype::bfloat16 : Dtype::float32;
}

// -------------------------------------------------------------------------------------------------------------------
// Scalars and tensors as the kernels take them

// Read the value if the host can, else point to it.
template <class T>
void take(const Tensor& t, T& value, const T*& device_pointer) {
  const T* data = static_cast<const T*>(t.const_data_ptr());
  if (host_can_read(t)) {
    value = *data;
  } else {
    device_pointer = data;
  }
}

void take_step(StepScalars& s, const Tensor& step, int64_t every, const Tensor& ring, const Tensor& like) {
  check_scalars("step", step, at::kLong, 1, like);
  TORCH_CHECK_VALUE(every > 0, "every must be at least 1, got ", every);
  take(step, s.step, s.device_step);
  s.every = every;
  s.slots = ring.dim() ? ring.size(0) : 0;
}

// Tell autograd that a tensor was written to.
void mark_written(const Tensor& t) {
  if (!t.is_inference()) t.unsafeGetTensorImpl()->bump_version();
}

// Gives out pointers to contiguous memory: of the tensor itself if it is contiguous, else of a copy.
class ContiguousMemory {
 public:
  const void* read(const Tensor& t) { return t.is_contiguous() ? t.const_data_ptr() : copy(t).const_data_ptr(); }

  void* update(const Tensor& t) {
    mark_written(t);
    if (t.is_contiguous()) return t.data_ptr();
    const Tensor& contiguous = copy(t);
    updated_.emplace_back(t, contiguous);
    return contiguous.data_ptr();
  }

  // Copy the copies that were updated back to their tensors.
  void copy_back() const {
    for (const auto& [tensor, contiguous] : updated_) tensor.copy_(contiguous);
  }

 private:
  const Tensor& copy(const Tensor& t) { return copies_.emplace_back(t.contiguous()); }

  std::vector<Tensor> copies_;
  std::vector<std::pair<Tensor, Tensor>> updated_;
};

// -------------------------------------------------------------------------------------------------------------------
// Operations

std::vector<AdamTensors> take_adam_tensors(ContiguousMemory& memory, TensorList params, TensorList grads,
                                           TensorList exp_avgs, TensorList exp_avg_sqs) {
  const Tensor& first = params[0];
  std::vector<AdamTensors> list;
  list.reserve(params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    TORCH_CHECK_TYPE(params[i].scalar_type() == first.scalar_type(), "params[", i, "] must be ",
                     name_of(first.scalar_type()), " like params[0], got ", name_of(params[i].scalar_type()));
    TORCH_CHECK_VALUE(params[i].device() == first.device(), "params[", i, "] must be on ", first.device(),
                      " like params[0], got ", params[i].device());
    check_like("grads", i, grads[i], params[i]);
    check_like("exp_avgs", i, exp_avgs[i], params[i]);
    check_like("exp_avg_sqs", i, exp_avg_sqs[i], params[i]);
    list.push_back({memory.update(params[i]),
                    memory.read(grads[i]),
                    memory.update(exp_avgs[i]),
                    memory.update(exp_avg_sqs[i]),
                    {},
                    params[i].numel()});
  }
  return list;
}

void adam_op(TensorList params, TensorList grads, TensorList exp_avgs, TensorList exp_avg_sqs,
             const Tensor& coefficients, const std::optional<Tensor>& clip_coef, std::string_view rounding,
             TensorList rings, at::IntArrayRef ring_of, const std::optional<Tensor>& step, int64_t every) {
  if (params.empty()) return;
  const Tensor& first = params[0];
  const Dtype dtype = dtype_of("params", 0, first);
  check_length("grads", grads.size(), "params", params.size());
  check_length("exp_avgs", exp_avgs.size(), "params", params.size());
  check_length("exp_avg_sqs", exp_avg_sqs.size(), "params", params.size());
  TORCH_CHECK_VALUE(rounding == "per-op" || rounding == "opmath", "rounding must be per-op or opmath, got ", rounding);
  check_length("ring_of", ring_of.size(), "rings", rings.size());

  const c10::DeviceGuard guard(first.device());
  ContiguousMemory memory;
  std::vector<AdamTensors> list = take_adam_tensors(memory, params, grads, exp_avgs, exp_avg_sqs);

  StepScalars s{};
  check_scalars("coefficients", coefficients, at::kFloat, kCoefficientCount, first);
  take(coefficients, s.coefficients, s.device_coefficients);
  s.clip_coef = 1;
  if (clip_coef) {
    check_scalars("clip_coef", *clip_coef, at::kFloat, 1, first);
    take(*clip_coef, s.clip_coef, s.device_clip_coef);
  }
  if (!rings.empty()) {
    TORCH_CHECK_VALUE(step, "step must be given with rings, got None");
    take_step(s, *step, every, rings[0], first);
    for (size_t j = 0; j < rings.size(); ++j) {
      const int64_t param = ring_of[j] / kFields, field = ring_of[j] % kFields;
      TORCH_CHECK_VALUE(ring_of[j] >= 0 && param < static_cast<int64_t>(params.size()), "ring_of[", j,
                        "] must be a field of one of the params (below ", kFields * params.size(), "), got ",
                        ring_of[j]);
      check_ring("rings[" + std::to_string(j) + "]", rings[j], params[param], s.slots);
      list[param].rings[field] = memory.update(rings[j]);
    }
  }

  const Rounding how = rounding == "per-op" ? Rounding::per_op : Rounding::opmath;
#ifdef BHFAST_CUDA
  if (for_cuda(first)) {
    cuda::adam(list, dtype, how, s, cuda::stream_of(first));
  } else
#endif
    cpu::adam(std::move(list), dtype, how, s);
  memory.copy_back();
}

std::tuple<Tensor, Tensor> clip_coefficient_op(TensorList grads, double max_norm) {
  TORCH_CHECK_VALUE(!grads.empty(), "grads must be at least one, got none");
  const Tensor& first = grads[0];
  const c10::DeviceGuard guard(first.device());
  ContiguousMemory memory;
  std::vector<GradTensor> list;
  list.reserve(grads.size());
  bool any_bfloat16 = false;
  for (size_t i = 0; i < grads.size(); ++i) {
    const Dtype dtype = dtype_of("grads", i, grads[i]);
    TORCH_CHECK_VALUE(grads[i].device() == first.device(), "grads[", i, "] must be on ", first.device(),
                      " like grads[0], got ", grads[i].device());
    any_bfloat16 |= dtype == Dtype::bfloat16;
    list.push_back({memory.read(grads[i]), dtype, grads[i].numel()});
  }
  const auto scalar = first.options().dtype(at::kFloat);
  const Tensor norm = at::empty({}, scalar), clip_coef = at::empty({}, scalar);
  float* const norm_at = norm.mutable_data_ptr<float>();
  float* const clip_coef_at = clip_coef.mutable_data_ptr<float>();
#ifdef BHFAST_CUDA
  if (for_cuda(first)) {
    Tensor joined;
    if (list.size() > cuda::kMaxGrads) {  // joined to one; mixed dtypes become float32, which holds both exactly
      std::vector<Tensor> flat;
      for (const Tensor& grad : grads) flat.push_back(grad.flatten());
      joined = at::cat(flat);
      list = {{joined.const_data_ptr(), dtype_of("grads", 0, joined), joined.numel()}};
    }
    const Tensor sums = at::empty({cuda::norm_workspace(list)}, scalar);
    cuda::grad_norm(list, sums.mutable_data_ptr<float>(), norm_at, clip_coef_at, max_norm, any_bfloat16,
                    cuda::stream_of(first));
  } else
#endif
  {
    *norm_at = cpu::grad_norm(std::move(list));
    *clip_coef_at = clip_coefficient(*norm_at, max_norm, any_bfloat16);
  }
  return {norm, clip_coef};
}

void record_op(TensorList values, TensorList rings, const Tensor& step, int64_t every) {
  check_length("rings", rings.size(), "values", values.size());
  if (values.empty()) return;
  const c10::DeviceGuard guard(values[0].device());
  StepScalars s{};
  take_step(s, step, every, rings[0], values[0]);
  ContiguousMemory memory;
  std::vector<RecordTensor> list;
  for (size_t i = 0; i < values.size(); ++i) {
    check_ring("rings[" + std::to_string(i) + "]", rings[i], values[i], s.slots);
    TORCH_CHECK_VALUE(values[i].device() == values[0].device(), "values[", i, "] must be on ", values[0].device(),
                      " like values[0], got ", values[i].device());
    list.push_back({memory.read(values[i]), memory.update(rings[i]), static_cast<int64_t>(values[i].nbytes())});
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
                   std::string_view rounding, const std::optional<Tensor>& params,
                   const std::optional<Tensor>& exp_avgs, const std::optional<Tensor>& exp_avg_sqs, int64_t first) {
  const Dtype dtype = dtype_of("params", 0, param);
  check_like("exp_avgs", 0, exp_avg, param);
  check_like("exp_avg_sqs", 0, exp_avg_sq, param);
  TORCH_CHECK_VALUE(rounding == "per-op" || rounding == "opmath", "rounding must be per-op or opmath, got ", rounding);
  TORCH_CHECK_VALUE(grads.dim() == param.dim() + 1 && grads.sizes().slice(1) == param.sizes(),
                    "grads must have shape [steps, *", param.sizes(), "], got ", grads.sizes());
  TORCH_CHECK_TYPE(grads.scalar_type() == param.scalar_type(), "grads must be ", name_of(param.scalar_type()),
                   " like param, got ", name_of(grads.scalar_type()));
  const int64_t steps = grads.size(0);
  check_scalars("coefficients", coefficients, at::kFloat, steps * kCoefficientCount, param);
  check_scalars("clip_coefs", clip_coefs, at::kFloat, steps, param);
  check_scalars("updated", updated, at::kBool, steps, param);
  TORCH_CHECK_VALUE(0 <= first && first <= steps, "first must be between 0 and ", steps, ", got ", first);
  if (steps == 0) return;

  ContiguousMemory memory;
  const bool has_plain_steps = grads.select(0, 0).is_contiguous();
  cpu::AdamSteps s{};
  s.param = memory.update(param);
  s.exp_avg = memory.update(exp_avg);
  s.exp_avg_sq = memory.update(exp_avg_sq);
  s.grads = has_plain_steps ? grads.const_data_ptr() : memory.read(grads);
  s.numel = param.numel();
  s.grad_stride = has_plain_steps ? grads.stride(0) : s.numel;
  s.steps = steps;
  s.first = first;
  s.coefficients = reinterpret_cast<const Coefficients*>(coefficients.const_data_ptr());
  s.clip_coefs = clip_coefs.const_data_ptr<float>();
  s.updated = updated.const_data_ptr<bool>();
  const std::optional<Tensor>* const records[] = {&params, &exp_avgs, &exp_avg_sqs};
  for (int field = 0; field < 3; ++field) {
    const std::optional<Tensor>& record = *records[field];
    if (!record || first == steps) continue;
    check_ring("records", *record, param, steps - first);
    s.records[field] = memory.update(*record);
  }
  cpu::adam_steps(s, dtype, rounding == "per-op" ? Rounding::per_op : Rounding::opmath);
  memory.copy_back();
}
#endif

}  // namespace

TORCH_LIBRARY_IMPL(BHFAST_LIBRARY, CPU, m) {
  m.impl("adam_", &adam_op);
#ifndef BHFAST_CUDA_ON_CPU
  m.impl("adam_steps_", &adam_steps_op);
#endif
  m.impl("clip_coefficient", &clip_coefficient_op);
  m.impl("record_", &record_op);
}

#if defined(BHFAST_CUDA) && !defined(BHFAST_CUDA_ON_CPU)
TORCH_LIBRARY_IMPL(BHFAST_LIBRARY, CUDA, m) {
  m.impl("adam_", &adam_op);
  m.impl("clip_coefficient", &clip_coefficient_op);
  m.impl("record_", &record_op);
}
#endif

}  // namespace bhfast
