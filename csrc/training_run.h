// What an engine runs: the network's sizes and parameters, and everything else that training steps need.
#pragma once

#include <cstdint>
#include <vector>

#include "tensors.h"

namespace bhfast {

constexpr int kRowBlock = 16;  // rows that are worked on together

// The network's sizes, and how many windows of `context` tokens a step takes. mlp: the width of an MLP's hidden layer.
struct Shape {
  int64_t vocab, hidden, mlp, layers, heads, context, windows;
};

// A parameter and its gradient, both contiguous.
struct Parameter {
  bfloat16* value;
  bfloat16* grad;
};

// Parameters that Adam updates with the same coefficients.
struct ParameterGroup {
  std::vector<AdamTensors> tensors;
  const Coefficients* coefficients;  // [steps]
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
  int64_t start;                 // how many of the steps are done already
  int64_t every, slots;          // of the rings in `groups`
  std::vector<RecordedRows> recorded_rows;
  Log<bfloat16> losses, logits;  // logits: [slots, vocab]
  Log<double> logged_learning_rates;
  Log<float> clip_coefs, grad_norms;
  Log<float> hidden_means, hidden_vars;  // [slots, hidden]: see native/statistics.h
  float* step_losses;                    // [steps]
  float* step_grad_norms;                // [steps]
};

}  // namespace bhfast
