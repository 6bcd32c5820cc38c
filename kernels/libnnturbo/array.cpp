#include "array.h"

#include <new>

#if defined(_WIN32)
#include <windows.h>
#else
#include <unistd.h>
#endif

namespace nnturbo {
namespace {

// Systems promise more memory than there is, and end a program that uses it.
double memory_bytes() {
#if defined(_WIN32)
  MEMORYSTATUSEX status;
  status.dwLength = sizeof status;
  return GlobalMemoryStatusEx(&status) ? static_cast<double>(status.ullTotalPhys) : 1e15;
#else
  const double bytes = static_cast<double>(sysconf(_SC_PAGESIZE)) * static_cast<double>(sysconf(_SC_PHYS_PAGES));
  return bytes > 0 ? bytes : 1e15;
#endif
}

}  // namespace

std::size_t count_that_fits(const std::vector<Size>& sizes) {
  double count = 1;
  for (const Size size : sizes) count *= static_cast<double>(size);
  static const double most = memory_bytes() / sizeof(float);
  if (!(0 <= count && count <= most)) throw std::bad_alloc();
  return static_cast<std::size_t>(count);
}

}  // namespace nnturbo
