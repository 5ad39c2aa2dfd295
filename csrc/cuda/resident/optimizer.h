// The end of a step: gradient norm, clipping, Adam and recording; see native/optimizer_step.h. The cluster divides it.
#pragma once

#include "../adam_pack.h"
#include "../halving.h"
#include "pass.h"

namespace bhfast::cuda::resident {

struct Clipping {
  float norm, coefficient;
};

// The block's share of the sums of squared gradients.
template <bool kClustered>
__device__ void sum_squares(const Pass<kClustered>& pass) {
  const int64_t count = pass.run.parameters;
  pass.each_of_cluster((count + kNormBlock - 1) / kNormBlock, 0, [&](int64_t i) {
    const int64_t begin = i * kNormBlock;
    float x[kRuns][kRunLength];
    if (begin + kNormBlock <= count) {
      load_squares(pass.run.grads + begin, x);
    } else {
      load_block(x, count - begin, [&](int64_t k) {
        const float value = to_float(pass.run.grads[begin + k]);
        return value * value;
      });
    }
    const float sum = sum_by_halving(x);
    if (pass.lane == 0) pass.run.squares[i] = sum;
  });
}

// The norm of all gradients, and what it clips them by. The threads of the block call it together.
template <bool kClustered>
__device__ Clipping clip(const Pass<kClustered>& pass) {
  const int64_t first_sums = (pass.run.parameters + kNormBlock - 1) / kNormBlock;
  const int64_t second_sums = (first_sums + kNormBlock - 1) / kNormBlock;
  float x[kRuns][kRunLength];
  for (int64_t i = pass.warp; i < second_sums; i += kWarps) {
    const float* const sums = pass.run.squares + i * kNormBlock;
    load_block(x, first_sums - i * kNormBlock, [&](int64_t k) { return sums[k]; });
    const float sum = sum_by_halving(x);
    if (pass.lane == 0) pass.sums[i] = sum;
  }
  pass.sync();
  load_block(x, second_sums, [&](int64_t k) { return pass.sums[k]; });
  const float norm = sqrtf(__shfl_sync(kAllLanes, sum_by_halving(x), 0));
  return {norm, clip_coefficient(norm, pass.run.max_grad_norm, true)};
}

// Update and record the block's share of the parameters.
template <bool kClustered>
__device__ void update(const Pass<kClustered>& pass, int64_t step, float clip_coef) {
  const Run& run = pass.run;
  const int64_t slot = run.slots ? slot_of(step, run.every, run.slots) : -1;
  pass.each_of_cluster(run.chunks, 0, [&](int64_t chunk) {
    int low = 0, high = run.update_count;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (pass.updates[middle].first_chunk <= chunk ? low : high) = middle;
    }
    const Update& own = pass.updates[low];
    const int64_t i = (chunk - own.first_chunk) * kChunk + pass.lane * Pack<bfloat16>::kSize;
    if (i >= own.tensors.numel) return;
    const Coefficients c = own.coefficients[step - 1];
    if (run.rounding == Rounding::per_op) {
      adam_pack<bfloat16, bfloat16>(own.tensors, true, i, clip_coef, c, slot);
    } else {
      adam_pack<bfloat16, float>(own.tensors, true, i, clip_coef, c, slot);
    }
  });
}

// Log the values that a step has one of. One warp of the cluster calls it.
template <bool kClustered>
__device__ void log(const Pass<kClustered>& pass, int64_t step, const Clipping& clipping) {
  const Run& run = pass.run;
  double sum = 0;
  for (int row = pass.lane; row < run.row_blocks * kRowBlock; row += kWarp) sum += run.row_losses[row];
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) sum += __shfl_xor_sync(kAllLanes, sum, mask);
  const auto loss = static_cast<float>(sum * run.loss_scale);
  if (pass.lane != 0) return;
  const auto write = [&](const auto& log, auto value) {
    const int64_t slot = log.ring ? slot_of(step, run.every, log.slots) : -1;
    if (slot >= 0) log.ring[slot] = value;
  };
  bfloat16 rounded_loss;
  store(rounded_loss, rounded<bfloat16>(loss));
  run.step_losses[step - 1] = loss;
  run.step_grad_norms[step - 1] = clipping.norm;
  write(run.losses, rounded_loss);
  write(run.logged_learning_rates, run.learning_rates[step - 1]);
  write(run.clip_coefs, clipping.coefficient);
  write(run.grad_norms, clipping.norm);
}

// Record the block's share of the chosen rows. The whole cluster must have updated the parameters.
template <bool kClustered>
__device__ void record_rows(const Pass<kClustered>& pass, int64_t step) {
  for (int which = 0; which < pass.run.recorded_count; ++which) {
    const RecordedRows& own = pass.recorded[which];
    const int64_t slot = slot_of(step, pass.run.every, own.slots);
    if (slot < 0) continue;
    pass.each_of_cluster(own.count, 0, [&](int64_t i) {
      const auto* const from = reinterpret_cast<const uint16_t*>(own.tensor + own.rows[i] * own.row_bytes);
      auto* const to = reinterpret_cast<uint16_t*>(own.ring + (slot * own.count + i) * own.row_bytes);
      for (int64_t k = pass.lane; k < own.row_bytes / 2; k += kWarp) to[k] = from[k];
    });
  }
}

}  // namespace bhfast::cuda::resident
