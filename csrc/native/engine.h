// The native engine: whole training steps of model.py's network on CPU threads.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "../tensors.h"

namespace bhfast::native {

constexpr int kRowBlock = 16;  // rows that a thread works on together
constexpr int kMaxLanes = 16;  // float32 values in a vector of the widest instruction set

// The network's sizes, and how many windows of `context` tokens a step takes. mlp: the width of an MLP's hidden layer.
struct Shape {
  int64_t vocab, hidden, mlp, layers, heads, context, windows;
};

// The number of blocks of kRowBlock rows, the unit of work of the forward and backward pass. More threads than that
// would have nothing to do.
inline int64_t row_blocks(const Shape& s) { return s.windows * ((s.context + kRowBlock - 1) / kRowBlock); }

// Why the engine cannot run a network of these sizes; empty if it can.
std::string unsupported(int64_t hidden, int64_t heads, int64_t mlp);

// A parameter and its gradient, both contiguous.
struct Parameter {
  bfloat16* value;
  bfloat16* grad;
};

// Parameters that Adam updates with the same coefficients.
struct ParameterGroup {
  std::vector<AdamTensors> tensors;
  std::vector<Coefficients> coefficients;  // [steps]
};

// Some rows of a tensor, which are recorded after each step.
struct RecordedRows {
  const char* tensor;
  int64_t row_bytes;
  const int64_t* rows;  // [count]
  int64_t count;
  char* ring;  // [slots, count, row_bytes]
  int64_t slots;
};

// Where the values of one name are logged: [slots, ...], or null if they are not recorded.
template <class T>
struct Log {
  T* ring = nullptr;
  int64_t slots = 0;
};

// Everything that the steps of a run need. The caller owns the memory behind the pointers.
struct TrainingRun {
  Shape shape;
  std::vector<Parameter> parameters;  // in the order of model.parameters()
  std::vector<ParameterGroup> groups;
  Rounding rounding;
  float max_grad_norm;
  int64_t target_offset;
  const int32_t* corpus;
  const int64_t* offsets;        // [steps, windows]: where each window starts in the corpus
  const bool* frozen;            // [vocab]: tokens whose vectors get no gradient; null if there are none
  const double* learning_rates;  // [steps]
  int64_t every, slots;          // of the rings in `groups`
  std::vector<RecordedRows> recorded_rows;
  int64_t start;                 // how many of the steps are done already
  Log<bfloat16> losses, logits;  // logits: [slots, vocab]
  Log<double> logged_learning_rates;
  Log<float> clip_coefs, grad_norms;
  Log<float> hidden_means, hidden_vars;  // [slots, hidden]: see statistics.h
  float* step_losses;                    // [steps]
  float* step_grad_norms;                // [steps]
};

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
