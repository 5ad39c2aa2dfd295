// The network's parameters, activations and gradients. d_x is the gradient of the loss with respect to x.
//
// A matrix has one row for each position of each window. Windows are padded to a multiple of kRowBlock rows; padding
// comes after a window's end, where causal attention does not look, and gets no gradient.
#pragma once

#include "matrix.h"

namespace bhfast::native::BHFAST_ISA {

BHFAST_INLINE int64_t padded(int64_t n) { return (n + kRowBlock - 1) / kRowBlock * kRowBlock; }

// kRowBlock rows of one window.
struct RowBlock {
  int64_t window;
  int64_t position;  // of the first row, in its window
  int64_t first;     // the first row's number among the rows of all windows
};

// Allocates zeroed memory, aligned to cache lines.
class Arena {
 public:
  template <class T>
  T* allocate(int64_t count) {
    constexpr size_t kCacheLine = 64;
    const size_t bytes = (count * sizeof(T) + kCacheLine - 1) / kCacheLine * kCacheLine;
    void* const memory = std::aligned_alloc(kCacheLine, std::max(bytes, kCacheLine));
    if (!memory) throw std::bad_alloc();
    allocations_.emplace_back(memory, std::free);
    return static_cast<T*>(std::memset(memory, 0, bytes));
  }

  enum Layouts { kRows = 1, kPairs = 2, kTransposed = 4 };

  Matrix matrix(int64_t rows, int64_t width, int layouts) {
    Matrix m;
    m.width = width;
    if (layouts & kRows) m.rows = allocate<bfloat16>(rows * width);
    if (layouts & kPairs) m.pairs = allocate<uint32_t>(rows / 2 * width);
    if (layouts & kTransposed) m.transposed = allocate<uint32_t>(rows * width / 2);
    m.pairs_panel = rows / 2 * kLanes;
    m.transposed_panel = width / 2 * kLanes;
    return m;
  }

 private:
  std::vector<std::unique_ptr<void, void (*)(void*)>> allocations_;
};

struct Linear {
  Parameter bias;
  bfloat16* grad;  // of the weight, [outputs][inputs]
  int64_t inputs, outputs;
  Matrix weight;  // rows are the parameter itself; the packed layouts are padded to a multiple of kRowBlock outputs
};

struct Norm {
  Parameter weight, bias;
  float* statistics;  // [rows][2]: mean, and one over the standard deviation
  float* partial;     // [rows / kRowBlock][2][hidden]: each block's part of the gradients of weight and bias
};

// A transformer block.
struct Block {
  Norm ln_1, ln_2;
  Linear c_attn, attn_proj, c_fc, mlp_proj;

  Matrix x;          // the block's input
  Matrix normed_1;   // the result of ln_1
  Matrix qkv;        // of c_attn
  Matrix weights;    // attention's: [windows, heads, queries][keys]
  Matrix mixed;      // the values, mixed with the weights
  Matrix x_mid;      // x + attn_proj(mixed)
  Matrix normed_2;   // the result of ln_2
  Matrix hidden;     // of c_fc
  Matrix activated;  // of GELU
  Matrix out;        // x_mid + mlp_proj(activated): the next block's input

  Matrix d_out;
  Matrix d_hidden;
  Matrix d_mid;  // of x_mid
  Matrix d_mixed;
  Matrix d_scores;
  Matrix d_qkv;
  Matrix d_x;  // the previous block's d_out
};

struct Network {
  Shape shape;
  int64_t rows_per_window, rows, head_dim, padded_vocab;
  float loss_scale;  // one over the number of targets: the loss is a mean
  Arena arena;

  Parameter wpe;
  Linear wte;  // as the output layer, without a bias
  std::vector<Block> blocks;
  Norm ln_f;

  Matrix x_out;   // of the last block
  Matrix normed;  // the result of ln_f
  Matrix logits;  // replaced by their gradient once the loss is known
  Matrix d_embedded;
  const bfloat16* zeros;                // [hidden]
  std::vector<int32_t> tokens;          // [rows]; -1 in padding
  std::vector<int32_t> targets;         // [rows]; -1 without a target
  std::vector<float> losses;            // [rows]
  std::vector<bfloat16> logged_logits;  // [vocab], of the first window's last position
  // For each kRowBlock tokens of the vocabulary a linked list of the rows where they occur; -1 ends it.
  std::vector<int32_t> first_row;  // [padded_vocab / kRowBlock]
  std::vector<int32_t> next_row;   // [rows]

  explicit Network(const TrainingRun& run);

 private:
  void allocate_matrices(Block& block);
};

inline Network::Network(const TrainingRun& run)
    : shape(run.shape),
      rows_per_window(padded(shape.context)),
      rows(rows_per_window * shape.windows),
      head_dim(shape.hidden / shape.heads),
      padded_vocab(padded(shape.vocab)),
      loss_scale(1.0f / (shape.windows * (shape.context + 1 - run.target_offset))),
      blocks(shape.layers),
      tokens(rows),
      targets(rows),
      losses(rows),
      logged_logits(shape.vocab),
      first_row(padded_vocab / kRowBlock),
      next_row(rows) {
  const Parameter* next = run.parameters.data();
  const int64_t width = shape.hidden;

  const auto linear = [&](int64_t inputs, int64_t outputs, bool has_bias) {
    const Parameter weight = *next++;
    Linear result{
        {}, weight.grad, inputs, outputs, arena.matrix(padded(outputs), inputs, Arena::kPairs | Arena::kTransposed)};
    result.weight.rows = weight.value;
    if (has_bias) result.bias = *next++;
    return result;
  };
  const auto norm = [&] {
    const Parameter weight = *next++, bias = *next++;
    return Norm{weight, bias, arena.allocate<float>(rows * 2), arena.allocate<float>(rows / kRowBlock * 2 * width)};
  };

  wte = linear(width, shape.vocab, false);
  wpe = *next++;
  bfloat16* const d_qkv_rows = arena.matrix(rows, 3 * width, Arena::kRows).rows;
  for (Block& block : blocks) {
    block.ln_1 = norm();
    block.c_attn = linear(width, 3 * width, true);
    block.attn_proj = linear(width, width, true);
    block.ln_2 = norm();
    block.c_fc = linear(width, shape.mlp, true);
    block.mlp_proj = linear(shape.mlp, width, true);
    allocate_matrices(block);
    block.d_qkv.rows = d_qkv_rows;  // all blocks share them: each needs its own only during its backward pass
  }
  ln_f = norm();
  x_out = arena.matrix(rows, width, Arena::kRows);
  normed = arena.matrix(rows, width, Arena::kRows | Arena::kPairs);
  logits = arena.matrix(rows, padded_vocab, Arena::kRows | Arena::kPairs);
  d_embedded = arena.matrix(rows, width, Arena::kRows);
  zeros = arena.allocate<bfloat16>(width);
  for (size_t i = 0; i < blocks.size(); ++i) {
    blocks[i].out = i + 1 < blocks.size() ? blocks[i + 1].x : x_out;
    blocks[i].d_x = i > 0 ? blocks[i - 1].d_out : d_embedded;
  }
}

inline void Network::allocate_matrices(Block& block) {
  constexpr int kRows = Arena::kRows, kPairs = Arena::kPairs, kTransposed = Arena::kTransposed;
  const int64_t width = shape.hidden;

  block.x = arena.matrix(rows, width, kRows);
  block.normed_1 = arena.matrix(rows, width, kPairs);
  block.qkv = arena.matrix(rows, 3 * width, kRows | kPairs | kTransposed);
  block.weights = arena.matrix(shape.heads * rows, rows_per_window, kRows | kPairs);
  block.mixed = arena.matrix(rows, width, kRows | kPairs);
  block.x_mid = arena.matrix(rows, width, kRows);
  block.normed_2 = arena.matrix(rows, width, kPairs);
  block.hidden = arena.matrix(rows, shape.mlp, kRows);
  block.activated = arena.matrix(rows, shape.mlp, kPairs);

  block.d_out = arena.matrix(rows, width, kRows | kPairs);
  block.d_hidden = arena.matrix(rows, shape.mlp, kPairs);
  block.d_mid = arena.matrix(rows, width, kRows | kPairs);
  block.d_mixed = arena.matrix(rows, width, kRows | kPairs);
  block.d_scores = arena.matrix(shape.heads * rows, rows_per_window, kRows | kPairs);
  block.d_qkv = arena.matrix(rows, 3 * width, kPairs);
}

}  // namespace bhfast::native::BHFAST_ISA
