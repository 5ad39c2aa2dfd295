// Instructions that CUDA C++ has no functions for: matrix products of a warp, clusters of blocks, and rounding. The PTX
// manual (version 9.0) describes them: "Warp Level Matrix Multiply-Accumulate", "barrier.cluster", "mapa", "cvt".
#pragma once

#ifdef BHFAST_CUDA_ON_CPU
#include <ptx_on_cpu.h>
#else
#include <cuda_runtime.h>

#include <cstdint>

namespace bhfast::cuda {

// d += a b for a warp. a is bfloat16 [16][16], b bfloat16 [16][8], d float32 [16][8]. Thread t holds, with
// i = t / 4 and j = 2 (t % 4):
//   of a: columns j and j + 1 of rows i and i + 8 (registers 0 and 1); columns j + 8 and j + 9 of the same rows (2, 3)
//   of b: rows j and j + 1 of column i (register 0); rows j + 8 and j + 9 of it (1)
//   of d: columns j and j + 1 of row i (registers 0 and 1), and of row i + 8 (2 and 3)
__device__ inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Load four 8 x 8 matrices of 16-bit values from shared memory. Thread t passes the address of row t % 8 of matrix
// t / 8, aligned to 16 bytes. From each matrix, or its transpose, it gets two values: row t / 4, columns 2 (t % 4) and
// the next.
template <bool kTransposed>
__device__ inline void ldmatrix_x4(uint32_t (&to)[4], const void* row) {
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(at)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(at)
                 : "memory");
  }
}

// The block's index in its cluster.
__device__ inline uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// The two parts of a barrier for all threads of the cluster.
__device__ inline void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ inline void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// The address of a shared variable in the cluster's block `rank`.
template <class T>
__device__ T* of_rank(T* shared, uint32_t rank) {
  uint64_t there;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(reinterpret_cast<uint64_t>(shared)), "r"(rank));
  return reinterpret_cast<T*>(there);
}

// Two values rounded to bfloat16, ties to even; the lower half is the first. Any NaN becomes 0x7fff.
__device__ inline uint32_t pack_bfloat16(float first, float second) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}

}  // namespace bhfast::cuda
#endif
