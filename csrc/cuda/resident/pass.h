// What a thread needs to run its part of a step: the run, its place in the cluster, and how work is divided.
#pragma once

#include "../ptx.h"
#include "network.h"

namespace bhfast::cuda::resident {

constexpr int kHalf = kWarp / 2;  // threads that work on a row
static_assert(kRowBlock % (2 * kWarps) == 0, "or some halves of warps have fewer rows");

// kClustered: whether the cluster has more than one block.
template <bool kClustered>
struct Pass {
  const Run& run;
  const Block* blocks;           // [layers]
  const Update* updates;         // [run.update_count]
  const RecordedRows* recorded;  // [run.recorded_count]
  char* shared;
  uint4* staged;  // kStaged of them, the warp's own
  float* sums;    // [kMaxSums]: see clip
  int warp, lane;
  int rank;         // of the block in its cluster
  int blocks_log2;  // of the number of blocks in the cluster

  // Wait for the threads of the block.
  __device__ void sync() const { __syncthreads(); }

  // Wait for the threads of the cluster.
  __device__ void sync_cluster() const {
    if constexpr (kClustered) {
      __syncwarp();  // the barrier wants whole warps
      cluster_arrive();
      cluster_wait();
    } else {
      __syncthreads();
    }
  }

  // -------------------------------------------------------------------------------------------------------------------
  // Matrices

  // Each block of rows belongs to one block of the cluster. Its number among the owner's:
  __device__ int number(int row_block) const { return kClustered ? row_block >> blocks_log2 : row_block; }
  __device__ int owner(int row_block) const { return kClustered ? row_block & ((1 << blocks_log2) - 1) : 0; }

  // Where this block keeps its own block of rows number `number`; in the workspace, where all blocks begin.
  __device__ bfloat16* at(const Matrix& m, int number) const {
    char* const memory = (m.in_shared ? shared : run.workspace) + m.offset;
    return reinterpret_cast<bfloat16*>(memory) + int64_t{number} * kRowBlock * m.stride;
  }

  __device__ bool is_near(const Matrix& m, int row_block) const {
    return m.in_shared && (!kClustered || owner(row_block) == rank);
  }

  __device__ bfloat16* rows(const Matrix& m, int row_block) const {
    if (!m.in_shared) return at(m, row_block);
    bfloat16* const own = at(m, number(row_block));
    if constexpr (kClustered) return owner(row_block) == rank ? own : of_rank(own, owner(row_block));
    return own;
  }

  __device__ bfloat16* row(const Matrix& m, int row_block, int i) const { return rows(m, row_block) + i * m.stride; }

  // -------------------------------------------------------------------------------------------------------------------
  // Division of the work. Each item is one warp's.

  __device__ int own_row_blocks() const { return number(run.row_blocks - rank + (1 << blocks_log2) - 1); }

  __device__ int position(int row_block) const { return row_block % (run.rows_per_window / kRowBlock) * kRowBlock; }
  __device__ int first_of_window(int row_block) const { return row_block - position(row_block) / kRowBlock; }

  // Call work(row block, item) for `per_block` items of each of the block's own blocks of rows.
  template <class Work>
  __device__ void each_own(int per_block, Work work) const {
    const int count = own_row_blocks() * per_block;
#pragma unroll 1
    for (int i = warp; i < count; i += kWarps) work((i / per_block << blocks_log2) + rank, i % per_block);
  }

  // Call work(row block, column) for each tile of kRowBlock columns.
  template <class Work>
  __device__ void each_tile(int columns, Work work) const {
    each_own(columns / kRowBlock, [&](int row_block, int i) { work(row_block, i * kRowBlock); });
  }

  // The same, but each item is half a warp's. per_block is a multiple of kRowBlock, so both halves have as many.
  template <class Work>
  __device__ void each_row(int per_block, Work work) const {
    const int count = own_row_blocks() * per_block;
#pragma unroll 1
    for (int i = 2 * warp + lane / kHalf; i < count; i += 2 * kWarps) {
      work((i / per_block << blocks_log2) + rank, i % per_block);
    }
  }

  // Call work(item) for the warp's share of `count` items that the whole cluster divides, beginning with item `first`
  // of a longer list.
  template <class Work>
  __device__ void each_of_cluster(int64_t count, int64_t first, Work work) const {
    const int warps = kWarps << blocks_log2, own = (warp << blocks_log2) + rank;  // powers of two
#pragma unroll 1
    for (int64_t i = (own - first) & (warps - 1); i < count; i += warps) work(i);
  }

  // Call work(column) for the thread's share of `columns`, which kLanes threads divide; work takes a column
  // and the next.
  template <int kLanes = kHalf, class Work>
  __device__ void each_pair(int columns, Work work) const {
#pragma unroll 1
    for (int c = 2 * (lane % kLanes); c < columns; c += 2 * kLanes) work(c);
  }
};

// Two adjacent values.
struct Pair {
  float first, second;
};

__device__ inline Pair load_pair(const bfloat16* from) {
  const uint32_t pair = *reinterpret_cast<const uint32_t*>(from);
  return {__builtin_bit_cast(float, pair << 16), __builtin_bit_cast(float, pair & 0xffff0000)};
}

__device__ inline void store_pair(bfloat16* to, float first, float second) {
  *reinterpret_cast<uint32_t*>(to) = pack_bfloat16(first, second);
}

__device__ inline float rounded_bfloat16(float x) { return __builtin_bit_cast(float, pack_bfloat16(x, 0) << 16); }

// The sum over the threads of a row, in all of them. The order of the sum is fixed.
__device__ inline float row_sum(float x) {
#pragma unroll
  for (int mask = kHalf / 2; mask > 0; mask /= 2) x += __shfl_xor_sync(kAllLanes, x, mask);
  return x;
}

__device__ inline float row_max(float x) {
#pragma unroll
  for (int mask = kHalf / 2; mask > 0; mask /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, mask));
  return x;
}

}  // namespace bhfast::cuda::resident
