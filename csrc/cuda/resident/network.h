// The network as a cluster of blocks of threads sees it; see native/network.h, whose matrices have the same names.
//
// The host makes a Run for each run, with its tables behind it in one piece of memory. Each block copies them to its
// shared memory. What a block computes of a matrix, it keeps there if it fits; else in the workspace, in global memory.
#pragma once

#include "../../training_run.h"
#include "../warp.h"

namespace bhfast::cuda::resident {

constexpr int kWarps = 8;  // in a block: with more, a thread has too few registers
constexpr int kThreads = kWarps * kWarp;

// A matrix of bfloat16 [rows][width]. In the workspace it has all rows; in shared memory each block has its own blocks
// of kRowBlock rows: of C blocks of threads, number b % C has block b, as its own number b / C.
struct alignas(16) Matrix {
  int64_t offset;  // in bytes
  int32_t stride;  // elements from one row to the next
  int32_t in_shared;
};

struct Linear {
  Parameter weight, bias;  // weight: [outputs][inputs]
  int32_t inputs, outputs;
};

struct Norm {
  Parameter weight, bias;
  float* statistics;  // [rows][2]: mean, and one over the standard deviation
  float* partial;     // [rows / kRowBlock][2][hidden]: each block's part of the gradients of weight and bias
};

// A transformer block.
struct alignas(16) Block {
  Norm ln_1, ln_2;
  Linear c_attn, attn_proj, c_fc, mlp_proj;
  Matrix x, normed_1, qkv, weights, mixed, x_mid, normed_2, hidden, activated, out;
  Matrix d_out, d_hidden, d_mid, d_mixed, d_scores, d_qkv, d_x;
};

// A tensor that Adam updates. Its gradient is part of Run::grads.
struct alignas(16) Update {
  AdamTensors tensors;
  const Coefficients* coefficients;  // [steps]
  int64_t first_chunk;               // of all chunks of kChunk elements: its own first
};

constexpr int kChunk = 256;                  // elements that a warp updates at once
constexpr int kMaxSums = 64;                 // second sums of squared gradients; each stands for kNormBlock^2 gradients
constexpr int kAhead = 4;                    // tiles of each factor of a product that a warp loads before it needs them
constexpr int kStaged = 2 * kAhead * kWarp;  // uint4 values: where a warp puts tiles that come from elsewhere

struct alignas(16) Run {
  char* workspace;
  int32_t vocab, hidden, layers, heads, context, windows;
  int32_t head_dim, rows_per_window, row_blocks, padded_vocab;
  float loss_scale;  // one over the number of targets: the loss is a mean

  Parameter wpe;
  Linear wte;  // as the output layer, without a bias
  Norm ln_f;
  Matrix x_out, normed, logits, d_normed, d_embedded;

  const int32_t* corpus;
  const int64_t* offsets;
  const bool* frozen;
  int32_t target_offset;
  float* row_losses;  // [rows]

  const bfloat16* grads;  // [parameters], in the order of the updates
  int64_t parameters;
  float* squares;  // [norm blocks]: sums of squared gradients
  int64_t chunks;
  float max_grad_norm;
  Rounding rounding;

  int64_t start;  // how many steps were done before the first launch
  int64_t every, slots;
  const double* learning_rates;
  Log<bfloat16> losses, logits_log;
  Log<double> logged_learning_rates;
  Log<float> clip_coefs, grad_norms, hidden_means, hidden_vars;
  float* step_losses;
  float* step_grad_norms;

  // Behind the Run follow its tables, in this order.
  int32_t update_count, recorded_count;
  // Block blocks[layers]; Update updates[update_count]; RecordedRows recorded[recorded_count]
};

}  // namespace bhfast::cuda::resident
