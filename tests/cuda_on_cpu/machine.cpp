#include "machine.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <vector>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cuda_on_cpu {

cudaError_t last_error = cudaSuccess;
bool scalars_by_value = false;

namespace {

constexpr size_t kStack = 256 << 10;
constexpr unsigned kWarp = 32;
constexpr unsigned kRest = 40;  // turns that a slow warp misses
constexpr int kPoison = 0xff;   // a NaN in every floating-point type

struct Block {
  unsigned index;  // in the grid
  std::map<int, std::vector<std::byte>> variables;
  std::vector<std::byte> dynamic;
  std::vector<std::byte> exchanged;  // kExchanged bytes a thread
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<std::byte[]> stack{new std::byte[kStack]};
  unsigned thread;  // in its block
  Block* block;
  jmp_buf left;  // where it has left off, once it has begun
  bool begun, done, waits;
  bool for_arrivals;  // it waits for a cluster barrier in two parts: until all have arrived as often as it has
  Group group;
  const void* place;
  unsigned arrivals;
};

std::mt19937_64 random_order(1);
std::vector<std::unique_ptr<Fiber>> fibers;  // of the current cluster, block by block; then unused ones
std::vector<Block> blocks;
Fiber* current;
const std::function<void()>* body;

// AddressSanitizer must be told of every switch of stacks, and objects to the quick one, which makes no system call.
void* scheduler_fake_stack;
const void* scheduler_stack;
size_t scheduler_stack_size;
#ifdef __SANITIZE_ADDRESS__
ucontext_t scheduler;
void switch_to_scheduler() { swapcontext(&current->context, &scheduler); }
void switch_to(Fiber& fiber) { swapcontext(&scheduler, &fiber.context); }
void leaving(void** fake_stack, const void* to, size_t size) { __sanitizer_start_switch_fiber(fake_stack, to, size); }
void came(void* fake_stack, const void** from, size_t* size) {
  __sanitizer_finish_switch_fiber(fake_stack, from, size);
}
#else
jmp_buf scheduler_left;
void switch_to_scheduler() {
  if (_setjmp(current->left) == 0) _longjmp(scheduler_left, 1);
}
void switch_to(Fiber& fiber) {
  if (_setjmp(scheduler_left) != 0) return;
  if (fiber.begun) _longjmp(fiber.left, 1);
  fiber.begun = true;
  setcontext(&fiber.context);
}
void leaving(void**, const void*, size_t) {}
void came(void*, const void**, size_t*) {}
#endif

void back_to_scheduler(bool for_good) {
  void* fake_stack = nullptr;
  leaving(for_good ? nullptr : &fake_stack, scheduler_stack, scheduler_stack_size);
  switch_to_scheduler();
  came(fake_stack, &scheduler_stack, &scheduler_stack_size);
}

void run_fiber() {
  came(nullptr, &scheduler_stack, &scheduler_stack_size);
  (*body)();
  current->done = true;
  back_to_scheduler(true);
}

void resume(Fiber& fiber) {
  current = &fiber;
  threadIdx.x = fiber.thread;
  blockIdx.x = fiber.block->index;
  leaving(&scheduler_fake_stack, fiber.stack.get(), kStack);
  switch_to(fiber);
  came(scheduler_fake_stack, nullptr, nullptr);
}

void wait() {
  current->waits = true;
  back_to_scheduler(false);
}

// The fibers [begin, end) that belong to the group of fiber i.
std::pair<unsigned, unsigned> group_of(unsigned i, Group group, unsigned count) {
  if (group == Group::cluster) return {0, count};
  const unsigned block = i / blockDim.x * blockDim.x;
  if (group == Group::block) return {block, block + blockDim.x};
  const unsigned warp = block + (i - block) / kWarp * kWarp;
  return {warp, std::min(warp + kWarp, block + blockDim.x)};
}

// Release a waiting fiber, with its group, once the whole group has arrived.
void release(unsigned i, unsigned count) {
  const Fiber& fiber = *fibers[i];
  const auto [begin, end] = group_of(i, fiber.group, count);
  for (unsigned j = begin; j < end; ++j) {
    const Fiber& other = *fibers[j];
    if (fiber.for_arrivals) {
      if (other.arrivals < fiber.arrivals) return;
      continue;
    }
    current = fibers[j].get();
    if (other.done) die("threads wait at a barrier for a thread that has left");
    if (!other.waits) return;
    if (other.for_arrivals || other.group != fiber.group) return;
    if (other.place != fiber.place) die("threads of one group wait at different barriers");
  }
  if (fiber.for_arrivals) {
    fibers[i]->waits = false;
    return;
  }
  for (unsigned j = begin; j < end; ++j) fibers[j]->waits = false;
}

void start(Fiber& fiber, unsigned thread, Block& block) {
  fiber.thread = thread;
  fiber.block = &block;
  fiber.begun = fiber.done = fiber.waits = false;
  fiber.arrivals = 0;
  getcontext(&fiber.context);
  fiber.context.uc_stack = {fiber.stack.get(), 0, kStack};
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, run_fiber, 0);
}

void run_cluster(unsigned first_block, unsigned size, size_t shared) {
  const unsigned count = size * blockDim.x, warps = (blockDim.x + kWarp - 1) / kWarp;
  blocks.assign(size, {});
  for (unsigned rank = 0; rank < size; ++rank) {
    blocks[rank].index = first_block + rank;
    blocks[rank].dynamic.assign(shared, std::byte{kPoison});
    blocks[rank].exchanged.resize(warps * kWarp * kExchanged);
  }
  while (fibers.size() < count) fibers.push_back(std::make_unique<Fiber>());
  for (unsigned i = 0; i < count; ++i) {
    start(*fibers[i], i % blockDim.x, blocks[i / blockDim.x]);
  }
  std::vector<unsigned> order(count);
  std::iota(order.begin(), order.end(), 0);
  std::vector<bool> rests(size * warps);  // whether a warp is slow for now: the others get ahead as far as they can
  for (unsigned left = count, turn = 0; left > 0; ++turn) {
    if (turn % kRest == 0) {
      for (unsigned i = 0; i < rests.size(); ++i) rests[i] = random_order() % 2;
    }
    std::shuffle(order.begin(), order.end(), random_order);
    unsigned ran = 0, resting = 0;
    for (const unsigned i : order) {
      Fiber& fiber = *fibers[i];
      if (fiber.done || fiber.waits) continue;
      if (rests[i / blockDim.x * warps + i % blockDim.x / kWarp]) {
        ++resting;
        continue;
      }
      resume(fiber);
      ++ran;
      left -= fiber.done;
    }
    if (ran + resting == 0) die("threads wait for each other forever");
    if (ran == 0) rests.assign(rests.size(), false);
    for (unsigned i = 0; i < count; ++i) {
      if (!fibers[i]->done && fibers[i]->waits) release(i, count);
    }
  }
}

}  // namespace

extern "C" void cuda_on_cpu_seed(uint64_t seed) { random_order.seed(seed); }

unsigned rank_in_cluster() { return current->block - blocks.data(); }

void die(const char* what) {
  std::fprintf(stderr, "CUDA on the CPU: %s (thread %u of block %u)\n", what, current->thread, current->block->index);
  std::abort();
}

void wait_for(Group group, const void* place) {
  current->for_arrivals = false;
  current->group = group;
  current->place = place;
  wait();
}

void cluster_arrive() { ++current->arrivals; }

void cluster_wait() {
  current->for_arrivals = true;
  current->group = Group::cluster;
  wait();
}

const std::byte* hand_over(const void* from, size_t size) {
  std::byte* const all = current->block->exchanged.data();
  const unsigned i = current->thread;
  std::memcpy(all + i * kExchanged, from, size);
  wait_for(Group::warp, nullptr);
  return all + i / kWarp * kWarp * kExchanged;
}

void* shared_bytes(int id, size_t size) {
  const auto [variable, is_new] = current->block->variables.try_emplace(id);
  if (is_new) variable->second.assign(size, std::byte{kPoison});
  return variable->second.data();
}

void* dynamic_shared() { return current->block->dynamic.data(); }

void* of_rank(const void* shared, unsigned rank) {
  const std::byte* const p = static_cast<const std::byte*>(shared);
  if (rank >= blocks.size()) die("there is no such block in the cluster");
  const auto offset_in = [p](const std::vector<std::byte>& memory) {
    return p >= memory.data() && p < memory.data() + memory.size() ? p - memory.data() : -1;
  };
  if (const auto offset = offset_in(current->block->dynamic); offset >= 0) return &blocks[rank].dynamic[offset];
  for (const auto& [id, memory] : current->block->variables) {
    if (const auto offset = offset_in(memory); offset >= 0) {
      auto& there = blocks[rank].variables[id];
      if (there.empty()) there.assign(memory.size(), std::byte{kPoison});
      return &there[offset];
    }
  }
  die("an address that is not in shared memory was mapped to another block");
}

void launch(dim3 grid, dim3 block, size_t shared, cudaStream_t, const std::function<void()>& kernel, unsigned cluster) {
  if (grid.x == 0 || grid.x > 0x7fffffff || block.x == 0 || block.x > 1024 || grid.x % cluster) {
    last_error = cudaErrorInvalidConfiguration;
    return;
  }
  body = &kernel;
  blockDim = block;
  gridDim = grid;
  std::vector<unsigned> clusters(grid.x / cluster);
  std::iota(clusters.begin(), clusters.end(), 0);
  std::shuffle(clusters.begin(), clusters.end(), random_order);
  for (const unsigned i : clusters) run_cluster(i * cluster, cluster, shared);
}

}  // namespace cuda_on_cpu
