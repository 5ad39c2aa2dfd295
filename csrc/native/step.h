// A training step, as a list of its phases.
#pragma once

#include "backward.h"
#include "forward.h"
#include "prepare.h"
#include "statistics.h"
#include "weight_gradients.h"

namespace bhfast::native::BHFAST_ISA {

class Step final : public TrainingStep {
 public:
  Step(const TrainingRun& run, int threads) : run_(run), net_(run), optimizer_(run) {
    for (int i = 0; i < threads; ++i) scratch_.emplace_back(net_);
  }

  // Threads share the rows, then the parameters. They synchronize where one reads what another has written.
  void run(Worker& worker, int64_t step) override {
    worker.timer.start();
#ifdef BHFAST_TILES
    const TileScope tiles;
#endif
    const Pass pass{net_, worker, scratch_[worker.index]};
    const bool is_first = worker.index == 0;

    if (is_first) load_windows(pass, run_, step);
    pack_weights(pass);
    worker.sync();

    pass.each_row_block([&](RowBlock rows) { embed(net_, rows.first, net_.blocks[0].x.at(rows.first)); });
    for (const Block& block : net_.blocks) {
      pass.each_row_block([&](RowBlock rows) { forward_qkv(pass, block, rows); });
      worker.sync();
      pass.each_row_block([&](RowBlock rows) {
        forward_attention(pass, block, rows);
        forward_mlp(pass, block, rows);
      });
    }
    pass.each_row_block([&](RowBlock rows) {
      forward_head(pass, rows);
      backward_head(pass, rows);
    });
    for (auto block = net_.blocks.rbegin(); block != net_.blocks.rend(); ++block) {
      pass.each_row_block([&](RowBlock rows) {
        backward_mlp(pass, *block, rows);
        backward_queries(pass, *block, rows);
      });
      worker.sync();
      pass.each_row_block([&](RowBlock rows) { backward_keys_values(pass, *block, rows); });
    }
    worker.sync();

    weight_gradients(pass, run_.frozen);
    log_hidden_statistics(pass, run_, step);
    worker.sync();
    optimizer_.sum_squares(worker);
    worker.sync();
    optimizer_.apply(worker, step);
    if (is_first) {
      optimizer_.log(step, net_.losses, net_.loss_scale, net_.logged_logits.data());
      worker.timer.lap(Activity::recording);
    }
    worker.sync();
    optimizer_.record_rows(worker, step);
  }

 private:
  const TrainingRun& run_;
  Network net_;
  OptimizerStep optimizer_;
  std::vector<Scratch> scratch_;
};

inline std::unique_ptr<TrainingStep> make_step(const TrainingRun& run, int threads) {
  return std::make_unique<Step>(run, threads);
}

}  // namespace bhfast::native::BHFAST_ISA
