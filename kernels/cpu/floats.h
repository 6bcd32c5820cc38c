// Memory for numbers, as long as its owner lives.

#pragma once

#include "kernels.h"

#include <algorithm>
#include <utility>

namespace nnturbo {

class Floats {
 public:
  Floats() = default;
  explicit Floats(Size count)
      : memory_(static_cast<float*>(allocate(static_cast<std::size_t>(count) * sizeof(float)))), size_(count) {}
  Floats(Floats&& other) noexcept
      : memory_(std::exchange(other.memory_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  Floats& operator=(Floats&& other) noexcept {
    std::swap(memory_, other.memory_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~Floats() { release(memory_); }

  static Floats zeros(Size count) {
    Floats made(count);
    std::fill_n(made.memory_, count, 0.0f);
    return made;
  }

  float* data() const { return memory_; }
  float& operator[](Size index) const { return memory_[index]; }
  Size size() const { return size_; }

 private:
  float* memory_ = nullptr;
  Size size_ = 0;
};

// Call `task` with 0 to `tasks` - 1, with all threads.
template <class Task>
void in_parallel(Size tasks, const Task& task) {
  run(tasks, [](const void* given, Size index) { (*static_cast<const Task*>(given))(index); }, &task);
}

}  // namespace nnturbo
