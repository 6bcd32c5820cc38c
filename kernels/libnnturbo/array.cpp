#include "array.h"

#include <new>

namespace nnturbo {

std::size_t count_that_fits(const std::vector<Size>& sizes) {
  double count = 1;
  for (const Size size : sizes) count *= static_cast<double>(size);
  static const double most = memory_bytes() / sizeof(float);
  if (!(0 <= count && count <= most)) throw std::bad_alloc();
  return static_cast<std::size_t>(count);
}

}  // namespace nnturbo
