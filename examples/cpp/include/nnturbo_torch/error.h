#pragma once

#include <stdexcept>

namespace nnturbo_torch {

/// Everything this library reports: the text says what must hold, what came, and what to do.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

}  // namespace nnturbo_torch
