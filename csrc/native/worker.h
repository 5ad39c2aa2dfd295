// One thread of the pool: its share of the work, and the barrier at which it waits for the others.
#pragma once

#include <atomic>
#include <chrono>

#include "engine.h"

namespace bhfast::native {

// All threads wait here for each other. A short wait spins; a long one sleeps, as when a thread has lost its core.
class Barrier {
 public:
  explicit Barrier(int threads) : threads_(threads) {}

  void wait() {
    const int phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      phase_.notify_all();
      return;
    }
    for (int spin = 0; spin < kSpins; ++spin) {
      if (phase_.load(std::memory_order_acquire) != phase) return;
      pause();
    }
    while (phase_.load(std::memory_order_acquire) == phase) phase_.wait(phase, std::memory_order_acquire);
  }

 private:
  static constexpr int kSpins = 5000;  // about 50 us

  static void pause() {
#ifdef __x86_64__
    __builtin_ia32_pause();
#elif defined __aarch64__
    asm volatile("isb");
#endif
  }

  const int threads_;
  // A cache line each.
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> phase_{0};
};

// Optional per-activity timer.
class Timer {
 public:
  bool enabled = false;
  double seconds[kActivityCount] = {};

  void start() { last_ = now(); }

  // Charge the time since the last call to this activity.
  void lap(Activity activity) {
    if (!enabled) return;
    const double time = now();
    seconds[static_cast<int>(activity)] += time - last_;
    last_ = time;
  }

 private:
  static double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
  }

  double last_ = 0;
};

struct Worker {
  int index, count;  // this worker's number, and how many there are
  Barrier& barrier;
  Timer timer;

  // Wait for the other threads.
  void sync() {
    barrier.wait();
    timer.lap(Activity::waiting);
  }

  // Whether work item i of a phase is this thread's. Results do not depend on which thread does which item.
  bool owns(int64_t i) const { return i % count == index; }
};

}  // namespace bhfast::native
