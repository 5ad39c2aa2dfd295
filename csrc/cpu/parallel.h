// Torch's threads.
#pragma once

#include "../libtorch/tensor.h"

namespace bhfast::cpu {

// Call f(begin, end) for parts of [0, size), side by side; below `grain` elements, once.
template <class F>
void parallel_for(int64_t size, int64_t grain, const F& f) {
  const ParallelFunc call = [](int64_t begin, int64_t end, void* context) {
    (*static_cast<const F*>(context))(begin, end);
  };
  check_torch(torch_parallel_for(0, size, grain, call, const_cast<F*>(&f)));
}

}  // namespace bhfast::cpu
