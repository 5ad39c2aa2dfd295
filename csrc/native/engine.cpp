#include "engine.h"

#include <numeric>
#include <stdexcept>
#include <thread>

#include "program.h"
#include "team.h"

namespace bhfast::native {
namespace {

std::vector<const InstructionSet*> sets_here() {
  std::vector<const InstructionSet*> here;
  for (const InstructionSet* set : {
#ifdef __x86_64__
           &avx512bf16_set, &avx512_set, &avx2_set,
#endif
           &portable_set}) {
    if (set->runs_here()) here.push_back(set);
  }
  return here;
}

const InstructionSet& find(const std::string& name) {
  std::string there;
  for (const InstructionSet* set : sets_here()) {
    if (set->name == name) return *set;
    there += (there.empty() ? "" : ", ") + std::string(set->name);
  }
  throw std::invalid_argument("instruction_set must be one of this machine's (" + there + "), got '" + name + "'");
}

}  // namespace

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const InstructionSet* set : sets_here()) names.emplace_back(set->name);
  return names;
}

double peak(const std::string& instruction_set, int threads) {
  const InstructionSet& set = find(instruction_set);
  std::vector<double> flops(threads);
  {
    std::vector<std::jthread> team;
    for (double& own : flops) team.emplace_back([&set, &own] { own = set.peak(); });
  }
  return std::accumulate(flops.begin(), flops.end(), 0.0);
}

struct Engine::State {
  State(Job j, int count, const InstructionSet& set)
      : job(std::move(j)), barrier(count), program(set.make(job, count)) {
    for (int i = 0; i < count; ++i) workers.push_back({i, count, barrier, {}});
    for (int i = 1; i < count; ++i) {
      threads.emplace_back([this, i] {
        while (begin()) work(i);
      });
    }
  }

  ~State() {
    until = -1;
    barrier.wait();
  }

  // The other threads wait here between runs.
  bool begin() {
    barrier.wait();
    return until >= 0;
  }

  void work(int i) {
    for (int64_t step = done + 1; step <= until; ++step) program->step(workers[i], step);
    barrier.wait();
  }

  const Job job;
  Barrier barrier;
  std::unique_ptr<Program> program;
  std::vector<Worker> workers;
  int64_t done = 0, until = 0;        // steps; until: -1 to end
  std::vector<std::jthread> threads;  // last: they use the rest
};

Engine::Engine(Job job, int threads, const std::string& instruction_set)
    : state_(std::make_unique<State>(std::move(job), threads, find(instruction_set))) {}

Engine::~Engine() = default;

void Engine::run(int64_t steps) {
  state_->until = state_->done + steps;
  state_->barrier.wait();
  state_->work(0);
  state_->done = state_->until;
}

void Engine::set_profiling(bool on) {
  for (Worker& worker : state_->workers) worker.clock.on = on;
}

std::vector<double> Engine::profile() const {
  std::vector<double> sum(kActivityCount);
  for (const Worker& worker : state_->workers) {
    for (int i = 0; i < kActivityCount; ++i) sum[i] += worker.clock.seconds[i];
  }
  return sum;
}

}  // namespace bhfast::native
