// What csrc/cuda/ptx.h declares, as the PTX manual describes it.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace bhfast::cuda {

struct Operands {
  uint32_t a[4], b[2];
};

inline float half_of(uint32_t pair, int which) {
  return __builtin_bit_cast(float, which ? pair & 0xffff0000 : pair << 16);
}

inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const auto lanes = cuda_on_cpu::exchange(Operands{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}});
  const int lane = threadIdx.x % 32;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    double sum = d[i];  // the manual leaves order and precision of this sum open
    for (int k = 0; k < 16; ++k) {
      const uint32_t from_a = lanes[row % 8 * 4 + k % 8 / 2].a[row / 8 + k / 8 * 2];
      const uint32_t from_b = lanes[column * 4 + k % 8 / 2].b[k / 8];
      sum += static_cast<double>(half_of(from_a, k % 2)) * half_of(from_b, k % 2);
    }
    d[i] = static_cast<float>(sum);
  }
}

template <bool kTransposed>
void ldmatrix_x4(uint32_t (&to)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) cuda_on_cpu::die("ldmatrix from an address not aligned to 16 bytes");
  const auto rows = cuda_on_cpu::exchange(static_cast<const uint16_t*>(row));
  const int lane = threadIdx.x % 32;
  for (int matrix = 0; matrix < 4; ++matrix) {
    const auto at = [&](int i, int j) -> uint32_t { return rows[matrix * 8 + i][j]; };
    const int i = lane / 4, j = lane % 4 * 2;
    to[matrix] = kTransposed ? at(j, i) | at(j + 1, i) << 16 : at(i, j) | at(i, j + 1) << 16;
  }
}

inline uint32_t cluster_rank() { return cuda_on_cpu::rank_in_cluster(); }
inline void cluster_arrive() { cuda_on_cpu::cluster_arrive(); }
inline void cluster_wait() { cuda_on_cpu::cluster_wait(); }

template <class T>
T* of_rank(T* shared, uint32_t rank) {
  return static_cast<T*>(cuda_on_cpu::of_rank(shared, rank));
}

inline uint32_t pack_bfloat16(float first, float second) {
  const auto round = [](float x) -> uint32_t {
    const uint32_t bits = __builtin_bit_cast(uint32_t, x);
    return x == x ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fff;
  };
  return round(first) | round(second) << 16;
}

}  // namespace bhfast::cuda
