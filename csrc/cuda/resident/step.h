// A training step, as a list of its phases: the same as in native/step.h.
#pragma once

#include "backward.h"
#include "forward.h"
#include "optimizer.h"
#include "statistics.h"
#include "weight_gradients.h"

namespace bhfast::cuda::resident {

// Blocks share the rows, then the parameters. They synchronize where one reads what another has written.
template <bool kClustered>
__device__ __forceinline__ void run_step(const Pass<kClustered>& pass, int64_t step) {
  const Run& run = pass.run;

  embed(pass, step, pass.blocks[0].x);  // each thread reads first what it has written itself
#pragma unroll 1
  for (int layer = 0; layer < run.layers; ++layer) {
    const Block& block = pass.blocks[layer];
    forward_qkv(pass, block);
    pass.sync_cluster();
    forward_attention(pass, block);
    forward_mlp(pass, block);
  }
  forward_head(pass, step);
  backward_head(pass);
#pragma unroll 1
  for (int layer = run.layers; layer-- > 0;) {
    const Block& block = pass.blocks[layer];
    backward_mlp(pass, block);
    backward_queries(pass, block);
    pass.sync_cluster();
    backward_keys_values(pass, block);
  }
  pass.sync_cluster();

  weight_gradients(pass, step);
  log_hidden_statistics(pass, step);
  pass.sync_cluster();
  sum_squares(pass);
  pass.sync_cluster();
  const Clipping clipping = clip(pass);
  update(pass, step, clipping.coefficient);
  if (pass.rank == 0 && pass.warp == kWarps - 1) log(pass, step, clipping);
  pass.sync_cluster();
  record_rows(pass, step);
}

}  // namespace bhfast::cuda::resident
