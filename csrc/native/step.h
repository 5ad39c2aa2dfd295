// A training step, as a list.
#pragma once

#include "attention.h"
#include "elementwise.h"
#include "layernorm.h"
#include "loss.h"
#include "network.h"
#include "product.h"
#include "update.h"
#include "weight_gradients.h"

namespace bhfast::native::BHFAST_ISA {

class Step final : public Program {
 public:
  Step(const Job& job, int threads) : job_(job), net_(job), update_(job) {
    const int64_t floats = 2 * std::max({net_.padded_vocab, kBlock * net_.rows_per_window, kBlock * job.shape.hidden});
    for (int i = 0; i < threads; ++i) {
      threads_.push_back(
          {net_.arena.take<float>(floats), net_.arena.matrix(kBlock, 4 * job.shape.hidden, Arena::kRows)});
    }
  }

  void step(Worker& worker, int64_t step) override {
    worker.clock.start();
    const Thread& my = threads_[worker.index];
    if (worker.index == 0) read_windows(worker, step);
    arrange_parameters(worker);
    worker.meet();

    // Rows split over the threads. Attention looks at other rows, and so do its keys and values on the way back: what a
    // thread needs of the others is there after a barrier.
    each_block(worker, [&](Place, int64_t row) { embed(net_, row, net_.blocks[0].x.at(row)); });
    for (size_t i = 0; i < net_.blocks.size(); ++i) {
      const Block& b = net_.blocks[i];
      each_block(worker, [&](Place, int64_t row) { forward_to_attention(worker, my, b, row); });
      worker.meet();
      const Matrix& out = i + 1 < net_.blocks.size() ? net_.blocks[i + 1].x : net_.x_out;
      each_block(worker, [&](Place at, int64_t row) { forward_from_attention(worker, my, b, at, row, out); });
    }
    each_block(worker, [&](Place, int64_t row) { predict(worker, my, row); });
    for (size_t i = net_.blocks.size(); i-- > 0;) {
      const Block& b = net_.blocks[i];
      each_block(worker, [&](Place at, int64_t row) { backward_to_attention(worker, my, b, at, row); });
      worker.meet();
      const Matrix& d_in = i > 0 ? net_.blocks[i - 1].d_out : net_.d_embedded;
      each_block(worker, [&](Place at, int64_t row) { backward_from_attention(worker, my, b, at, row, d_in); });
    }
    worker.meet();

    // Parameters split over the threads.
    weight_gradients(worker, my);
    worker.meet();
    update_.sum_squares(worker);
    worker.meet();
    update_.advance(worker, step);
    if (worker.index == 0) {
      update_.log(step, net_.losses, loss_share(), net_.logged_logits.data());
      worker.clock.was(Activity::recording);
    }
    worker.meet();
  }

 private:
  struct Thread {
    float* floats;
    Matrix rows;  // [kBlock][4 * hidden]
  };

  // A block of rows that is not kept, to be written before it is read.
  static Matrix scratch(const Thread& my, const Matrix& kept) {
    Matrix m = kept;
    m.rows = my.rows.rows;
    return m;
  }

  static Matrix scratch(const Thread& my, int64_t width) {
    Matrix m = my.rows;
    m.width = width;
    return m;
  }

  // Blocks of rows that this thread works on, in all phases the same: an early block of a window attends to fewer keys,
  // so they are dealt out back and forth.
  template <class Work>
  void each_block(const Worker& worker, Work work) const {
    const int64_t per_window = net_.rows_per_window / kBlock, blocks = net_.rows / kBlock;
    for (int64_t deal = 0, block; deal * worker.count < blocks; ++deal) {
      block = deal * worker.count + (deal % 2 ? worker.count - 1 - worker.index : worker.index);
      if (block < blocks) work(Place{block / per_window, block % per_window * kBlock}, block * kBlock);
    }
  }

  float loss_share() const { return 1.0f / (job_.shape.windows * (job_.shape.context + 1 - job_.target_offset)); }

  void read_windows(Worker& worker, int64_t step) {
    const Shape& shape = job_.shape;
    std::fill(net_.first_row.begin(), net_.first_row.end(), -1);
    for (int64_t window = shape.windows; window-- > 0;) {
      const uint8_t* const bytes = job_.corpus + job_.offsets[(step - 1) * shape.windows + window];
      for (int64_t t = net_.rows_per_window; t-- > 0;) {
        const int64_t row = window * net_.rows_per_window + t;
        const bool is_there = t < shape.context, has_target = t + job_.target_offset <= shape.context;
        net_.tokens[row] = is_there ? bytes[t] : -1;
        net_.targets[row] = is_there && has_target ? bytes[t + job_.target_offset] : -1;
        if (is_there) net_.next_row[row] = std::exchange(net_.first_row[bytes[t] / kBlock], row);
      }
    }
    worker.clock.was(Activity::elementwise);
  }

  void linear(const Linear& layer, const Matrix& x, const Matrix& to) {
    multiply(left(x), right_transposed(layer.weight), layer.outputs, layer.inputs / 2, to, 1, layer.bias.value);
  }

  void linear_backward(const Linear& layer, const Matrix& d_y, const Matrix& to) {
    multiply(left(d_y), right(layer.weight), layer.inputs, padded(layer.outputs) / 2, to, 1, nullptr);
  }

  void forward_to_attention(Worker& worker, const Thread& my, const Block& b, int64_t row) {
    const Matrix normed = scratch(my, b.normed_1.at(row)), qkv = b.qkv.at(row);
    layer_norm(b.x.at(row), b.ln_1, b.ln_1.statistics + 2 * row, normed);
    worker.clock.was(Activity::elementwise);
    linear(b.c_attn, normed, qkv);
    worker.clock.was(Activity::products);
    const Matrix keys_and_values = b.qkv.at(row, net_.shape.hidden);
    const bfloat16* rows[kBlock];
    for (int i = 0; i < kBlock; ++i) rows[i] = keys_and_values.row(i);
    turn(rows, 2 * net_.shape.hidden, keys_and_values);
    worker.clock.was(Activity::attention);
  }

  void forward_from_attention(Worker& worker, const Thread& my, const Block& b, Place at, int64_t row,
                              const Matrix& out) {
    attend(net_, b, at, my.floats);
    worker.clock.was(Activity::attention);
    const Matrix projected = scratch(my, net_.shape.hidden), x_mid = b.x_mid.at(row);
    linear(b.attn_proj, b.mixed.at(row), projected);
    worker.clock.was(Activity::products);
    add(b.x.at(row), projected, x_mid);
    const Matrix normed = scratch(my, b.normed_2.at(row)), hidden = b.hidden.at(row);
    layer_norm(x_mid, b.ln_2, b.ln_2.statistics + 2 * row, normed);
    worker.clock.was(Activity::elementwise);
    linear(b.c_fc, normed, hidden);
    worker.clock.was(Activity::products);
    const Matrix activated = scratch(my, b.activated.at(row));
    gelu(hidden, activated);
    worker.clock.was(Activity::elementwise);
    linear(b.mlp_proj, activated, out.at(row));
    worker.clock.was(Activity::products);
    add(x_mid, out.at(row), out.at(row));
    worker.clock.was(Activity::elementwise);
  }

  void predict(Worker& worker, const Thread& my, int64_t row) {
    const Matrix normed = scratch(my, net_.normed.at(row)), logits = net_.logits.at(row);
    const Matrix& x = net_.x_out;
    layer_norm(x.at(row), net_.ln_f, net_.ln_f.statistics + 2 * row, normed);
    worker.clock.was(Activity::elementwise);
    multiply(left(normed), right_transposed(net_.wte.weight), net_.padded_vocab, net_.wte.inputs / 2,
             logits.rows_only(), 1, nullptr);
    worker.clock.was(Activity::products);
    const int64_t last = net_.shape.context - 1 - row;
    if (last >= 0 && last < kBlock) std::copy_n(logits.row(last), net_.shape.vocab, net_.logged_logits.data());
    worker.clock.was(Activity::recording);
    cross_entropy(logits, net_.shape.vocab, net_.targets.data() + row, loss_share(), net_.losses.data() + row,
                  my.floats);
    worker.clock.was(Activity::elementwise);
    const Matrix d_normed = scratch(my, net_.shape.hidden);
    linear_backward(net_.wte, logits, d_normed);
    worker.clock.was(Activity::products);
    layer_norm_backward(d_normed, x.at(row), net_.ln_f, net_.ln_f.statistics + 2 * row, {},
                        net_.blocks.back().d_out.at(row), partial(net_.ln_f, row));
    worker.clock.was(Activity::elementwise);
  }

  void backward_to_attention(Worker& worker, const Thread& my, const Block& b, Place at, int64_t row) {
    const Matrix d_out = b.d_out.at(row), d_hidden = scratch(my, b.d_hidden.at(row));
    linear_backward(b.mlp_proj, d_out, d_hidden.rows_only());
    worker.clock.was(Activity::products);
    gelu_backward(d_hidden, b.hidden.at(row), d_hidden);
    worker.clock.was(Activity::elementwise);
    const Matrix d_mid = b.d_mid.at(row);
    linear_backward(b.c_fc, d_hidden, d_mid.rows_only());
    worker.clock.was(Activity::products);
    layer_norm_backward(d_mid, b.x_mid.at(row), b.ln_2, b.ln_2.statistics + 2 * row, d_out, d_mid,
                        partial(b.ln_2, row));
    worker.clock.was(Activity::elementwise);
    linear_backward(b.attn_proj, d_mid, b.d_mixed.at(row));
    worker.clock.was(Activity::products);
    attend_backward_queries(net_, b, at, my.floats);
    worker.clock.was(Activity::attention);
  }

  void backward_from_attention(Worker& worker, const Thread& my, const Block& b, Place at, int64_t row,
                               const Matrix& d_in) {
    attend_backward_keys(net_, b, at);
    worker.clock.was(Activity::attention);
    const Matrix d_normed = scratch(my, net_.shape.hidden);
    linear_backward(b.c_attn, b.d_qkv.at(row), d_normed);
    worker.clock.was(Activity::products);
    layer_norm_backward(d_normed, b.x.at(row), b.ln_1, b.ln_1.statistics + 2 * row, b.d_mid.at(row), d_in.at(row),
                        partial(b.ln_1, row));
    worker.clock.was(Activity::elementwise);
  }

  float* partial(const Norm& norm, int64_t row) const { return norm.partial + row / kBlock * 2 * net_.shape.hidden; }

  void weight_gradients(Worker& worker, const Thread& my) {
    int64_t piece = 0;
    const auto each_output = [&](const Linear& layer, const Matrix& x, const Matrix& d_y) {
      for (int64_t output = 0; output < layer.outputs; output += kBlock) {
        if (worker.has(piece++)) linear_gradient(net_, layer, x, d_y, output);
      }
    };
    for (const Block& b : net_.blocks) {
      each_output(b.c_attn, b.normed_1, b.d_qkv);
      each_output(b.attn_proj, b.mixed, b.d_mid);
      each_output(b.c_fc, b.normed_2, b.d_hidden);
      each_output(b.mlp_proj, b.activated, b.d_out);
      if (worker.has(piece++)) norm_gradient(net_, b.ln_1);
      if (worker.has(piece++)) norm_gradient(net_, b.ln_2);
    }
    if (worker.has(piece++)) norm_gradient(net_, net_.ln_f);
    for (int64_t token = 0; token < net_.shape.vocab; token += kBlock) {
      if (worker.has(piece++)) token_gradient(net_, token, my.floats);
    }
    for (int64_t position = 0; position < net_.shape.context; ++position) {
      if (worker.has(piece++)) position_gradient(net_, position);
    }
    worker.clock.was(Activity::weight_gradients);
  }

  void arrange_parameters(Worker& worker) {
    int64_t piece = 0;
    const auto each_row = [&](const Linear& layer) {
      for (int64_t row = 0; row < layer.outputs; row += kBlock) {
        if (!worker.has(piece++)) continue;
        const Matrix weight = layer.weight.at(row);
        const bfloat16* rows[kBlock];
        for (int i = 0; i < kBlock; ++i) rows[i] = row + i < layer.outputs ? weight.row(i) : net_.zeros;
        pair_up(rows, layer.inputs, weight);
        turn(rows, layer.inputs, weight);
      }
    };
    each_row(net_.wte);
    for (const Block& b : net_.blocks) {
      each_row(b.c_attn);
      each_row(b.attn_proj);
      each_row(b.c_fc);
      each_row(b.mlp_proj);
    }
    worker.clock.was(Activity::arranging);
  }

  const Job& job_;
  Network net_;
  Update update_;
  std::vector<Thread> threads_;
};

inline std::unique_ptr<Program> make_step(const Job& job, int threads) { return std::make_unique<Step>(job, threads); }

}  // namespace bhfast::native::BHFAST_ISA
