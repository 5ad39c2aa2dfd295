// The native engine: whole training steps of model.py's network on CPU threads.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "../training_run.h"

namespace bhfast::native {

constexpr int kMaxLanes = 16;  // float32 values in a vector of the widest instruction set

// The number of blocks of kRowBlock rows, the unit of work of the forward and backward pass. More threads than that
// would have nothing to do.
inline int64_t row_blocks(const Shape& s) { return s.windows * ((s.context + kRowBlock - 1) / kRowBlock); }

// Why the engine cannot run a network of these sizes; empty if it can.
std::string unsupported(int64_t hidden, int64_t heads, int64_t mlp);

// What a thread spends its time on.
enum class Activity { products, attention, elementwise, weight_gradients, adam, recording, arranging, waiting };
constexpr const char* kActivities[] = {"products", "attention", "elementwise", "weight gradients",
                                       "adam",     "recording", "arranging",   "waiting"};
constexpr int kActivityCount = sizeof kActivities / sizeof kActivities[0];

// The floating-point operations per second that `threads` threads reach if they never wait for memory. Throws like
// Engine.
double peak_flops(const std::string& instruction_set, int threads);

// Runs the steps. Their bits do not depend on the number of threads.
class Engine {
 public:
  // Throws std::invalid_argument if this machine does not support the instruction set.
  Engine(TrainingRun run, int threads, const std::string& instruction_set);
  ~Engine();

  // Run and record the next `steps` steps.
  void run(int64_t steps);

  // Turn profiling on or off; get the seconds measured so far, summed over threads: [kActivityCount].
  void set_profiling(bool on);
  std::vector<double> profile() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace bhfast::native
