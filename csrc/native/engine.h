// The native engine: whole training steps of model.py's network on CPU threads.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "../tensors.h"

namespace bhfast::native {

// The network's sizes, and how many windows of `context` bytes a step takes.
struct Shape {
  int64_t vocab, hidden, layers, heads, context, windows;
};

// A parameter and its gradient, both contiguous.
struct Parameter {
  bfloat16* value;
  bfloat16* grad;
};

// Parameters that Adam updates with the same coefficients.
struct Group {
  std::vector<AdamTensors> tensors;
  std::vector<Coefficients> coefficients;  // [steps]
};

// Where one kind of logged values goes: [slots, ...], or null if it is not recorded.
template <class T>
struct Log {
  T* ring = nullptr;
  int64_t slots = 0;
};

// All that the steps of a run need. The memory behind the pointers is the caller's.
struct Job {
  Shape shape;
  std::vector<Parameter> parameters;  // in the order of model.parameters()
  std::vector<Group> groups;
  Rounding rounding;
  float max_grad_norm;
  int64_t target_offset;
  const uint8_t* corpus;
  const int64_t* offsets;        // [steps, windows]: where in the corpus they start
  const double* learning_rates;  // [steps]
  int64_t every, slots;          // of the rings in `groups`
  Log<bfloat16> losses, logits;  // logits: [slots, vocab]
  Log<double> logged_learning_rates;
  Log<float> clip_coefs, grad_norms;
  float* step_losses;      // [steps]
  float* step_grad_norms;  // [steps]
};

// What a thread spends its time on.
enum class Activity { products, attention, elementwise, weight_gradients, adam, recording, arranging, waiting };
constexpr const char* kActivities[] = {"products", "attention", "elementwise", "weight gradients",
                                       "adam",     "recording", "arranging",   "waiting"};
constexpr int kActivityCount = sizeof kActivities / sizeof kActivities[0];

// The instruction sets the engine is compiled for and that run here, best first.
std::vector<std::string> instruction_sets();

// The floating-point operations per second that so many threads can do, if nothing holds them up. Throws as Engine
// does.
double peak(const std::string& instruction_set, int threads);

// Steps have the same bits for any number of threads.
class Engine {
 public:
  // Throws std::invalid_argument if the instruction set does not run here.
  Engine(Job job, int threads, const std::string& instruction_set);
  ~Engine();

  // Run and record the next `steps` steps.
  void run(int64_t steps);

  // Whether to measure what the time is spent on, and the seconds so far, summed over threads: [kActivityCount].
  void set_profiling(bool on);
  std::vector<double> profile() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace bhfast::native
