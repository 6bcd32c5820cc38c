// How the library fails.

#pragma once

#include <stdexcept>
#include <string>

#include "include/nnturbo.h"

namespace nnturbo {

// The text is one line: what must hold, what came, and what to do.
class Error : public std::runtime_error {
 public:
  Error(nnturbo_status status, const std::string& text) : std::runtime_error(text), status(status) {}

  const nnturbo_status status;
};

// Numbers as they stand in messages, such as [3, 4, 5].
template <class Numbers>
std::string listed(const Numbers& numbers);

}  // namespace nnturbo

#include <sstream>

template <class Numbers>
std::string nnturbo::listed(const Numbers& numbers) {
  std::ostringstream text;
  text.precision(12);
  text << "[";
  for (std::size_t i = 0; i < numbers.size(); ++i) text << (i ? ", " : "") << numbers[i];
  text << "]";
  return text.str();
}
