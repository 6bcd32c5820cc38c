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

#include <cstdio>
#include <type_traits>

// Without streams, which would be half of the library on systems where it brings its own.
template <class Numbers>
std::string nnturbo::listed(const Numbers& numbers) {
  std::string text = "[";
  for (const auto number : numbers) {
    if (text.size() > 1) text += ", ";
    if constexpr (std::is_integral_v<decltype(number)>) {
      text += std::to_string(number);
    } else {
      char written[32];
      std::snprintf(written, sizeof written, "%.12g", static_cast<double>(number));
      text += written;
    }
  }
  return text + "]";
}
