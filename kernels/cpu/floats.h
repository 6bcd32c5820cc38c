// Memory for numbers, as long as its owner lives.

#pragma once

#include "kernels.h"

#include <algorithm>
#include <utility>

namespace nnturbo {

template <class Number>
class Values {
 public:
  Values() = default;
  explicit Values(Size count)
      : memory_(static_cast<Number*>(allocate(static_cast<std::size_t>(count) * sizeof(Number)))), size_(count) {}
  Values(Values&& other) noexcept
      : memory_(std::exchange(other.memory_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  Values& operator=(Values&& other) noexcept {
    std::swap(memory_, other.memory_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~Values() { release(memory_); }

  static Values zeros(Size count) {
    Values made(count);
    std::fill_n(made.memory_, count, Number{});
    return made;
  }

  Number* data() const { return memory_; }
  Number& operator[](Size index) const { return memory_[index]; }
  Size size() const { return size_; }
  Size bytes() const { return size_ * static_cast<Size>(sizeof(Number)); }

 private:
  Number* memory_ = nullptr;
  Size size_ = 0;
};

using Floats = Values<float>;

// Call `task` with 0 to `tasks` - 1, with all threads.
template <class Task>
void in_parallel(Size tasks, const Task& task) {
  run(tasks, [](const void* given, Size index) { (*static_cast<const Task*>(given))(index); }, &task);
}

}  // namespace nnturbo
