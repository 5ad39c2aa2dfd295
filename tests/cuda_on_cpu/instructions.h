#pragma once

#include <cstdint>

namespace bhfast::cuda {

// c = a b on the device: a [16][32] and b [32][8] of bfloat16, c [16][8] of float32.
void product(const uint16_t* a, const uint16_t* b, float* c);

}  // namespace bhfast::cuda
