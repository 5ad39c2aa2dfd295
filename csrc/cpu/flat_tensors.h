// A list of tensors whose elements are numbered in order, as if they were one tensor.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

namespace bhfast::cpu {

template <class Tensor>
class FlatTensors {
 public:
  explicit FlatTensors(std::vector<Tensor> tensors) : tensors_(std::move(tensors)) {
    for (const Tensor& tensor : tensors_) starts_.push_back(starts_.back() + tensor.numel);
  }

  int64_t numel() const { return starts_.back(); }

  // Call visit(tensor, begin, end) for each tensor that has some of the elements [begin, end); the call's begin and end
  // count within the tensor.
  template <class Visit>
  void visit(int64_t begin, int64_t end, Visit visit) const {
    size_t i = std::upper_bound(starts_.begin(), starts_.end(), begin) - starts_.begin() - 1;
    for (; i < tensors_.size() && starts_[i] < end; ++i) {
      const int64_t first = std::max(begin - starts_[i], int64_t{0});
      const int64_t last = std::min(end - starts_[i], tensors_[i].numel);
      if (first < last) visit(tensors_[i], first, last);
    }
  }

 private:
  std::vector<Tensor> tensors_;
  std::vector<int64_t> starts_{0};
};

}  // namespace bhfast::cpu
