#include "engine.h"

#include <numeric>
#include <thread>

#include "../instruction_sets/dispatch.h"
#include "training_step.h"
#include "worker.h"

namespace bhfast::native {

std::string unsupported(int64_t hidden, int64_t heads, int64_t mlp) {
  // A head fills whole vectors, and a row whole vectors of pairs.
  constexpr int64_t kHeadMultiple = kMaxLanes, kRowMultiple = 2 * kMaxLanes;
  if (mlp % kRowMultiple) {
    return "the native engine needs an mlp_dim divisible by " + std::to_string(kRowMultiple) + ", got " +
           std::to_string(mlp);
  }
  if (heads >= 1 && hidden % kRowMultiple == 0 && hidden % (kHeadMultiple * heads) == 0) return "";
  return "the native engine needs a hidden_dim divisible by " + std::to_string(kRowMultiple) + ", and by " +
         std::to_string(kHeadMultiple) + " times heads, got " + std::to_string(hidden) + " and " +
         std::to_string(heads);
}

double peak_flops(const std::string& instruction_set, int threads) {
  const InstructionSet& set = find_instruction_set(instruction_set);
  std::vector<double> flops(threads);
  std::vector<std::thread> pool;
  for (double& result : flops) pool.emplace_back([&set, &result] { result = set.peak_flops(); });
  for (std::thread& thread : pool) thread.join();
  return std::accumulate(flops.begin(), flops.end(), 0.0);
}

// The caller's thread is worker 0. The others are a pool: they wait at the barrier between runs.
struct Engine::State {
  State(TrainingRun r, int count, const InstructionSet& set)
      : run(std::move(r)), barrier(count), step(set.make_step(run, count)), steps_done(run.start) {
    for (int i = 0; i < count; ++i) workers.push_back({i, count, barrier, {}});
    for (int i = 1; i < count; ++i) {
      threads.emplace_back([this, i] {
        while (wait_for_run()) run_steps(workers[i]);
      });
    }
  }

  ~State() {
    stop = true;
    barrier.wait();
    for (std::thread& thread : threads) thread.join();
  }

  bool wait_for_run() {
    barrier.wait();
    return !stop;
  }

  void run_steps(Worker& worker) {
    for (int64_t i = steps_done + 1; i <= last_step; ++i) step->run(worker, i);
    barrier.wait();
  }

  const TrainingRun run;
  Barrier barrier;
  std::unique_ptr<TrainingStep> step;
  std::vector<Worker> workers;
  int64_t steps_done, last_step = 0;  // last_step: of the current run
  bool stop = false;
  std::vector<std::thread> threads;  // not jthread: a Mac's library has none
};

Engine::Engine(TrainingRun run, int threads, const std::string& instruction_set)
    : state_(std::make_unique<State>(std::move(run), threads, find_instruction_set(instruction_set))) {}

Engine::~Engine() = default;

void Engine::run(int64_t steps) {
  state_->last_step = state_->steps_done + steps;
  state_->barrier.wait();
  state_->run_steps(state_->workers[0]);
  state_->steps_done = state_->last_step;
}

void Engine::set_profiling(bool on) {
  for (Worker& worker : state_->workers) worker.timer.enabled = on;
}

std::vector<double> Engine::profile() const {
  std::vector<double> sum(kActivityCount);
  for (const Worker& worker : state_->workers) {
    for (int i = 0; i < kActivityCount; ++i) sum[i] += worker.timer.seconds[i];
  }
  return sum;
}

}  // namespace bhfast::native
