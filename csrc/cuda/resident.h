// Launches of the resident engine, as the host calls them; see resident/plan.h for what it runs.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace bhfast::cuda {

// What the current device allows.
struct ResidentLimits {
  int64_t shared_bytes;  // of a block
  bool has_clusters;     // of more than one block
};
ResidentLimits resident_limits();

struct ResidentLaunch {
  const void* runs;  // on the device: Plan::run of each run, one after the other
  int64_t run_bytes;
  int64_t count;
  int blocks_log2;  // of the number of blocks in a run's cluster
  int64_t shared_bytes;
  int64_t done, steps;  // how many steps of each run earlier launches have done, and how many to do
};

// Run steps of several runs. Throws std::runtime_error with CUDA's message if the launch fails. Does not synchronize.
void run_resident(const ResidentLaunch&, cudaStream_t);

}  // namespace bhfast::cuda
