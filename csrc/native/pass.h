// What a thread needs to run its part of a step: the network, its share of the work, and scratch memory.
#pragma once

#include "network.h"

namespace bhfast::native::BHFAST_ISA {

// Memory that one thread uses alone.
struct Scratch {
  float* floats;  // [kRowBlock][the largest of padded_vocab, rows_per_window and hidden]
  Matrix rows;    // [kRowBlock][the wider of hidden and mlp]

  explicit Scratch(Network& net) {
    const int64_t hidden = net.shape.hidden;
    floats = net.arena.allocate<float>(kRowBlock * std::max({net.padded_vocab, net.rows_per_window, hidden}));
    rows = net.arena.matrix(kRowBlock, std::max(hidden, net.shape.mlp), Arena::kRows);
  }

  // A block of rows, to be written before it is read.
  Matrix block(int64_t width) const {
    Matrix m = rows;
    m.width = width;
    return m;
  }

  // The same for a matrix that keeps its pairs, but not its rows.
  Matrix with_rows(const Matrix& kept) const {
    Matrix m = kept;
    m.rows = rows.rows;
    return m;
  }
};

struct Pass {
  Network& net;
  Worker& worker;
  const Scratch& scratch;

  // See Timer.
  void lap(Activity activity) const { worker.timer.lap(activity); }

  // Call work(rows) for each of this thread's blocks of rows, which are the same in every phase. Early blocks of a
  // window attend to fewer keys than late ones, so every other round deals them out in reverse order.
  template <class Work>
  void each_row_block(Work work) const {
    const int64_t per_window = net.rows_per_window / kRowBlock, blocks = net.rows / kRowBlock;
    for (int64_t round = 0; round * worker.count < blocks; ++round) {
      const int64_t turn = round % 2 ? worker.count - 1 - worker.index : worker.index;
      const int64_t block = round * worker.count + turn;
      if (block < blocks) work(RowBlock{block / per_window, block % per_window * kRowBlock, block * kRowBlock});
    }
  }
};

}  // namespace bhfast::native::BHFAST_ISA
