#include "plan.h"

#include <algorithm>
#include <cstring>

namespace bhfast::cuda::resident {
namespace {

constexpr int64_t kAlignment = 16;
constexpr int64_t kSharedOfH200 = 227 << 10;

int64_t aligned(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

int64_t padded(int64_t n) { return (n + kRowBlock - 1) / kRowBlock * kRowBlock; }

// What a block needs in shared memory besides matrices.
int64_t fixed_bytes(int64_t layers, int64_t updates, int64_t recorded) {
  const int64_t tables =
      sizeof(Run) + layers * sizeof(Block) + updates * sizeof(Update) + recorded * sizeof(RecordedRows);
  return aligned(tables) + kWarps * kStaged * kAlignment + kMaxSums * sizeof(float);
}

int64_t parameter_tensors(int64_t layers) { return 4 + 12 * layers; }

// Deals out shared memory to matrices, in the order of the calls, and the workspace to the rest.
class Memory {
 public:
  Memory(int64_t rows, int64_t own_rows, int64_t shared_used, int64_t shared_bytes)
      : rows_(rows), own_rows_(own_rows), shared_(shared_used), shared_bytes_(shared_bytes) {}

  Matrix matrix(int64_t width) {
    constexpr int64_t kSkew = 8;  // elements: adjacent rows begin in other banks
    Matrix m{0, static_cast<int32_t>(width + kSkew), 0};
    const int64_t row_bytes = m.stride * sizeof(bfloat16);
    m.in_shared = shared_ + own_rows_ * row_bytes <= shared_bytes_;
    m.offset = m.in_shared ? shared_ : workspace_;
    (m.in_shared ? shared_ : workspace_) += (m.in_shared ? own_rows_ : rows_) * row_bytes;
    return m;
  }

  // The offset of an array in the workspace.
  template <class T>
  int64_t array(int64_t count) {
    const int64_t offset = workspace_;
    workspace_ += aligned(count * sizeof(T));
    return offset;
  }

  int64_t shared() const { return shared_; }
  int64_t workspace() const { return workspace_; }

 private:
  int64_t rows_, own_rows_, shared_, shared_bytes_, workspace_ = 0;
};

// Hands out the parameters in the order of model.parameters().
class Parameters {
 public:
  explicit Parameters(const TrainingRun& run) : next_(run.parameters.data()) {}

  Parameter take() { return *next_++; }

  Linear linear(int64_t inputs, int64_t outputs) {
    const Parameter weight = take(), bias = take();
    return {weight, bias, static_cast<int32_t>(inputs), static_cast<int32_t>(outputs)};
  }

 private:
  const Parameter* next_;
};

class Planner {
 public:
  Planner(const TrainingRun& run, int blocks, int64_t shared_bytes, char* workspace)
      : run_(run),
        shape_(run.shape),
        rows_(shape_.windows * padded(shape_.context)),
        parameters_(run),
        memory_(rows_, (rows_ / kRowBlock + blocks - 1) / blocks * kRowBlock, fixed(run), shared_bytes),
        workspace_(workspace) {}

  Plan plan() {
    Run result{};
    set_sizes(result);
    std::vector<Block> blocks = set_network(result);
    std::vector<Update> updates = set_updates(result);
    set_records(result);
    result.workspace = workspace_;
    Plan plan{{}, memory_.shared(), memory_.shared() - fixed(run_), memory_.workspace()};
    append(plan.run, &result, 1);
    append(plan.run, blocks.data(), blocks.size());
    append(plan.run, updates.data(), updates.size());
    append(plan.run, run_.recorded_rows.data(), run_.recorded_rows.size());
    plan.run.resize(aligned(plan.run.size()));
    return plan;
  }

 private:
  static int64_t fixed(const TrainingRun& run) {
    int64_t updates = 0;
    for (const ParameterGroup& group : run.groups) updates += group.tensors.size();
    return fixed_bytes(run.shape.layers, updates, run.recorded_rows.size());
  }

  template <class T>
  static void append(std::vector<std::byte>& to, const T* from, size_t count) {
    const size_t end = to.size();
    to.resize(end + count * sizeof(T));
    if (count) std::memcpy(&to[end], from, count * sizeof(T));
  }

  template <class T>
  T* array(int64_t count) {
    return reinterpret_cast<T*>(workspace_ + memory_.array<T>(count));
  }

  Norm norm() {
    const Parameter weight = parameters_.take(), bias = parameters_.take();
    return {weight, bias, array<float>(rows_ * 2), array<float>(rows_ / kRowBlock * 2 * shape_.hidden)};
  }

  void set_sizes(Run& to) const {
    to.vocab = static_cast<int32_t>(shape_.vocab);
    to.hidden = static_cast<int32_t>(shape_.hidden);
    to.layers = static_cast<int32_t>(shape_.layers);
    to.heads = static_cast<int32_t>(shape_.heads);
    to.context = static_cast<int32_t>(shape_.context);
    to.windows = static_cast<int32_t>(shape_.windows);
    to.head_dim = static_cast<int32_t>(shape_.hidden / shape_.heads);
    to.rows_per_window = static_cast<int32_t>(padded(shape_.context));
    to.row_blocks = static_cast<int32_t>(rows_ / kRowBlock);
    to.padded_vocab = static_cast<int32_t>(padded(shape_.vocab));
    to.loss_scale = 1.0f / (shape_.windows * (shape_.context + 1 - run_.target_offset));
    to.corpus = run_.corpus;
    to.offsets = run_.offsets;
    to.frozen = run_.frozen;
    to.target_offset = static_cast<int32_t>(run_.target_offset);
  }

  // The order of the matrices says which of them are in shared memory if not all of them fit.
  std::vector<Block> set_network(Run& to) {
    const int64_t width = shape_.hidden, scores = shape_.heads * padded(shape_.context);
    to.wte = {parameters_.take(), {}, static_cast<int32_t>(width), static_cast<int32_t>(shape_.vocab)};
    to.wpe = parameters_.take();
    to.d_normed = memory_.matrix(width);
    to.x_out = memory_.matrix(width);
    to.d_embedded = memory_.matrix(width);
    std::vector<Block> blocks(shape_.layers);
    for (Block& block : blocks) {
      block.ln_1 = norm();
      block.c_attn = parameters_.linear(width, 3 * width);
      block.attn_proj = parameters_.linear(width, width);
      block.ln_2 = norm();
      block.c_fc = parameters_.linear(width, shape_.mlp);
      block.mlp_proj = parameters_.linear(shape_.mlp, width);
      for (Matrix* m : {&block.x, &block.normed_1, &block.mixed, &block.x_mid, &block.normed_2})
        *m = memory_.matrix(width);
      for (Matrix* m : {&block.d_out, &block.d_mid, &block.d_mixed}) *m = memory_.matrix(width);
      for (Matrix* m : {&block.qkv, &block.d_qkv}) *m = memory_.matrix(3 * width);
    }
    to.ln_f = norm();
    to.normed = memory_.matrix(width);
    for (Block& block : blocks) {
      for (Matrix* m : {&block.weights, &block.d_scores}) *m = memory_.matrix(scores);
      for (Matrix* m : {&block.hidden, &block.activated, &block.d_hidden}) *m = memory_.matrix(shape_.mlp);
    }
    to.logits = memory_.matrix(to.padded_vocab);
    for (size_t i = 0; i < blocks.size(); ++i) {
      blocks[i].out = i + 1 < blocks.size() ? blocks[i + 1].x : to.x_out;
      blocks[i].d_x = i > 0 ? blocks[i - 1].d_out : to.d_embedded;
    }
    to.row_losses = array<float>(rows_);
    return blocks;
  }

  std::vector<Update> set_updates(Run& to) {
    std::vector<Update> updates;
    for (const ParameterGroup& group : run_.groups) {
      for (const AdamTensors& t : group.tensors) {
        updates.push_back({t, group.coefficients, to.chunks});
        to.chunks += (t.numel + kChunk - 1) / kChunk;
        to.parameters += t.numel;
      }
    }
    to.grads = static_cast<const bfloat16*>(updates[0].tensors.grad);
    to.squares = array<float>((to.parameters + kNormBlock - 1) / kNormBlock);
    to.max_grad_norm = run_.max_grad_norm;
    to.rounding = run_.rounding;
    to.update_count = static_cast<int32_t>(updates.size());
    return updates;
  }

  void set_records(Run& to) const {
    to.recorded_count = static_cast<int32_t>(run_.recorded_rows.size());
    to.start = run_.start;
    to.every = run_.every;
    to.slots = run_.slots;
    to.learning_rates = run_.learning_rates;
    to.losses = run_.losses;
    to.logits_log = run_.logits;
    to.logged_learning_rates = run_.logged_learning_rates;
    to.clip_coefs = run_.clip_coefs;
    to.grad_norms = run_.grad_norms;
    to.hidden_means = run_.hidden_means;
    to.hidden_vars = run_.hidden_vars;
    to.step_losses = run_.step_losses;
    to.step_grad_norms = run_.step_grad_norms;
  }

  const TrainingRun& run_;
  const Shape& shape_;
  const int64_t rows_;
  Parameters parameters_;
  Memory memory_;
  char* const workspace_;
};

}  // namespace

std::string unsupported(const Shape& s, int blocks, int64_t shared_bytes) {
  const auto multiple = std::to_string(kRowBlock);
  if (s.heads < 1 || s.hidden % (s.heads * kRowBlock)) {
    return "the resident engine needs a hidden_dim divisible by " + multiple + " times heads, got " +
           std::to_string(s.hidden) + " and " + std::to_string(s.heads);
  }
  if (s.mlp % kRowBlock) {
    return "the resident engine needs an mlp_dim divisible by " + multiple + ", got " + std::to_string(s.mlp);
  }
  if (blocks < 1 || blocks > 16 || (blocks & (blocks - 1))) {
    return "the resident engine takes 1, 2, 4, 8 or 16 blocks for a run, got " + std::to_string(blocks);
  }
  const int64_t layer = (4 * s.hidden + 2 * s.mlp + 9) * s.hidden + s.mlp;
  const int64_t parameters = (s.vocab + s.context + 2) * s.hidden + s.layers * layer;
  if (parameters > kMaxSums * kNormBlock * kNormBlock) {
    return "the resident engine takes at most " + std::to_string(kMaxSums * kNormBlock * kNormBlock) +
           " parameters, got " + std::to_string(parameters);
  }
  const int64_t have = shared_bytes ? shared_bytes : kSharedOfH200;
  const int64_t need = fixed_bytes(s.layers, parameter_tensors(s.layers), parameter_tensors(s.layers));
  if (need > have) {
    return "the resident engine needs " + std::to_string(need) + " bytes of shared memory for " +
           std::to_string(s.layers) + " layers, a block has " + std::to_string(have);
  }
  return "";
}

Plan make_plan(const TrainingRun& run, int blocks, int64_t shared_bytes, char* workspace) {
  return Planner(run, blocks, shared_bytes ? shared_bytes : kSharedOfH200, workspace).plan();
}

}  // namespace bhfast::cuda::resident
