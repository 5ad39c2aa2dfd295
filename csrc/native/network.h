// The network's parameters, and what a step keeps of it, forward and backward.
//
// The rows of all matrices are the positions of all windows, each window padded to a multiple of kBlock rows. Padding
// comes after a window's end, where attention does not look, and gets no gradient. d_x is the gradient of the loss by
// x.
#pragma once

#include "matrix.h"
#include "program.h"

namespace bhfast::native::BHFAST_ISA {

BHFAST_INLINE int64_t padded(int64_t n) { return (n + kBlock - 1) / kBlock * kBlock; }

// Hands out zeroed memory, each piece from a cache line's start.
class Arena {
 public:
  template <class T>
  T* take(int64_t count) {
    const size_t bytes = (count * sizeof(T) + 63) / 64 * 64;
    void* const memory = std::aligned_alloc(64, std::max<size_t>(bytes, 64));
    if (!memory) throw std::bad_alloc();
    pieces_.emplace_back(memory, std::free);
    return static_cast<T*>(std::memset(memory, 0, bytes));
  }

  enum Layouts { kRows = 1, kPairs = 2, kTurned = 4 };

  Matrix matrix(int64_t rows, int64_t width, int layouts) {
    Matrix m;
    m.width = width;
    if (layouts & kRows) m.rows = take<bfloat16>(rows * width);
    if (layouts & kPairs) m.pairs = take<uint32_t>(rows / 2 * width);
    if (layouts & kTurned) m.turned = take<uint32_t>(rows * width / 2);
    m.pairs_panel = rows / 2 * kLanes;
    m.turned_panel = width / 2 * kLanes;
    return m;
  }

 private:
  std::vector<std::unique_ptr<void, void (*)(void*)>> pieces_;
};

struct Linear {
  Parameter bias;
  bfloat16* grad;  // of the weight, [outputs][inputs]
  int64_t inputs, outputs;
  Matrix weight;  // rows are the parameter itself, padded if the number of outputs is odd
};

struct Norm {
  Parameter weight, bias;
  float* statistics;  // [rows][2]: mean, and one over the standard deviation
  float* partial;     // [rows / kBlock][2][hidden]: gradients of weight and bias, by block
};

struct Block {
  Norm ln_1, ln_2;
  Linear c_attn, attn_proj, c_fc, mlp_proj;

  Matrix x;          // what comes in
  Matrix normed_1;   // ln_1
  Matrix qkv;        // c_attn
  Matrix weights;    // of attention: [windows, heads, queries][keys]
  Matrix mixed;      // the values, by weight
  Matrix x_mid;      // x + attn_proj
  Matrix normed_2;   // ln_2
  Matrix hidden;     // c_fc
  Matrix activated;  // GELU

  Matrix d_out;  // of what goes out
  Matrix d_hidden;
  Matrix d_mid;
  Matrix d_mixed;
  Matrix d_scores;
  Matrix d_qkv;
};

struct Network {
  Shape shape;
  int64_t rows_per_window, rows, head_dim, padded_vocab;
  Arena arena;

  Parameter wpe;
  Linear wte;  // as the output layer, without a bias
  std::vector<Block> blocks;
  Norm ln_f;

  Matrix x_out;   // of the last block
  Matrix normed;  // ln_f
  Matrix logits;  // and later d_logits
  Matrix d_embedded;
  const bfloat16* zeros;                     // [hidden]
  std::vector<int32_t> tokens, targets;      // [rows]; no target: -1, padding: token -1
  std::vector<float> losses;                 // [rows]
  std::vector<bfloat16> logged_logits;       // [vocab], of the first window's last position
  std::vector<int32_t> first_row, next_row;  // of the rows whose token is in a block of the vocabulary; -1: no more

  explicit Network(const Job& job);
};

inline Network::Network(const Job& job)
    : shape(job.shape),
      rows_per_window(padded(shape.context)),
      rows(rows_per_window * shape.windows),
      head_dim(shape.hidden / shape.heads),
      padded_vocab(padded(shape.vocab)),
      blocks(shape.layers),
      tokens(rows),
      targets(rows),
      losses(rows),
      logged_logits(shape.vocab),
      first_row(padded_vocab / kBlock),
      next_row(rows) {
  constexpr int kRows = Arena::kRows, kPairs = Arena::kPairs, kTurned = Arena::kTurned;
  const Parameter* next = job.parameters.data();
  const int64_t width = shape.hidden;

  const auto linear = [&](int64_t inputs, int64_t outputs, bool has_bias) {
    const Parameter weight = *next++;
    Linear result{{}, weight.grad, inputs, outputs, arena.matrix(padded(outputs), inputs, kPairs | kTurned)};
    result.weight.rows = weight.value;
    if (has_bias) result.bias = *next++;
    return result;
  };
  const auto norm = [&] {
    const Parameter weight = *next++, bias = *next++;
    return Norm{weight, bias, arena.take<float>(rows * 2), arena.take<float>(rows / kBlock * 2 * width)};
  };

  wte = linear(width, shape.vocab, false);
  wpe = *next++;
  const Matrix d_qkv = arena.matrix(rows, 3 * width, kRows);
  for (Block& b : blocks) {
    b.ln_1 = norm();
    b.c_attn = linear(width, 3 * width, true);
    b.attn_proj = linear(width, width, true);
    b.ln_2 = norm();
    b.c_fc = linear(width, 4 * width, true);
    b.mlp_proj = linear(4 * width, width, true);

    b.x = arena.matrix(rows, width, kRows);
    b.normed_1 = arena.matrix(rows, width, kPairs);
    b.qkv = arena.matrix(rows, 3 * width, kRows | kPairs | kTurned);
    b.weights = arena.matrix(shape.heads * rows, rows_per_window, kRows | kPairs);
    b.mixed = arena.matrix(rows, width, kRows | kPairs);
    b.x_mid = arena.matrix(rows, width, kRows);
    b.normed_2 = arena.matrix(rows, width, kPairs);
    b.hidden = arena.matrix(rows, 4 * width, kRows);
    b.activated = arena.matrix(rows, 4 * width, kPairs);

    b.d_out = arena.matrix(rows, width, kRows | kPairs);
    b.d_hidden = arena.matrix(rows, 4 * width, kPairs);
    b.d_mid = arena.matrix(rows, width, kRows | kPairs);
    b.d_mixed = arena.matrix(rows, width, kRows | kPairs);
    b.d_scores = arena.matrix(shape.heads * rows, rows_per_window, kRows | kPairs);
    b.d_qkv = arena.matrix(rows, 3 * width, kPairs);
    b.d_qkv.rows = d_qkv.rows;  // of all blocks: none needs its rows once its own backward pass is over
  }
  ln_f = norm();
  x_out = arena.matrix(rows, width, kRows);
  normed = arena.matrix(rows, width, kPairs);
  logits = arena.matrix(rows, padded_vocab, kRows | kPairs);
  d_embedded = arena.matrix(rows, width, kRows);
  zeros = arena.take<bfloat16>(width);
}

}  // namespace bhfast::native::BHFAST_ISA
