// Where the matrices of a run lie, in shared memory and in the workspace. For the host; knows nothing of CUDA.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "network.h"

namespace bhfast::cuda::resident {

// Why the engine cannot run a network of these sizes; empty if it can.
// blocks: of a cluster. shared_bytes: what a block may use; 0: as much as an H200 has.
std::string unsupported(const Shape& shape, int blocks, int64_t shared_bytes);

struct Plan {
  std::vector<std::byte> run;  // a Run and its tables, to be copied to the device
  int64_t shared_bytes;        // of each block
  int64_t matrix_bytes;        // of these, how many hold matrices
  int64_t workspace_bytes;
};

// The workspace may be null if only the sizes matter. Supported sizes only.
Plan make_plan(const TrainingRun& run, int blocks, int64_t shared_bytes, char* workspace);

}  // namespace bhfast::cuda::resident
