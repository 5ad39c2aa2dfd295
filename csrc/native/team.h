// Threads that run a program together, and meet at barriers.
#pragma once

#include <atomic>
#include <chrono>
#include <functional>
#include <thread>
#include <vector>

#include "engine.h"

namespace bhfast::native {

// All threads wait here for one another. A short wait spins; a long one sleeps, as when a thread has lost its core.
class Barrier {
 public:
  explicit Barrier(int threads) : threads_(threads) {}

  void wait() {
    const int round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      round_.notify_all();
      return;
    }
    for (int spin = 0; spin < kSpins; ++spin) {
      if (round_.load(std::memory_order_acquire) != round) return;
      pause();
    }
    while (round_.load(std::memory_order_acquire) == round) round_.wait(round, std::memory_order_acquire);
  }

 private:
  static constexpr int kSpins = 5000;  // some 50 us

  static void pause() {
#ifdef __x86_64__
    __builtin_ia32_pause();
#endif
  }

  const int threads_;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> round_{0};
};

// Says how much time goes to which activity, if anybody wants to know.
class Clock {
 public:
  bool on = false;
  double seconds[kActivityCount] = {};

  void start() { last_ = now(); }

  // What was done since the last call was this.
  void was(Activity activity) {
    if (!on) return;
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

// One thread of a team, as the program sees it.
struct Worker {
  int index, count;
  Barrier& barrier;
  Clock clock;

  // Wait for the others.
  void meet() {
    barrier.wait();
    clock.was(Activity::waiting);
  }

  // Whether piece i of some work is this thread's. It does not change a result who does what.
  bool has(int64_t i) const { return i % count == index; }
};

}  // namespace bhfast::native
