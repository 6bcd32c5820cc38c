#include "mapped_file.h"

#include <utility>

#include "error.h"

#if defined(_WIN32)
#include <windows.h>
#else
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#endif

namespace nnturbo {
namespace {

[[noreturn]] void fail(const std::filesystem::path& file) {
  throw Error(NNTURBO_BAD_BUNDLE,
              file.u8string() + ": this file of the bundle cannot be read; copy the whole bundle, and check its permissions");
}

}  // namespace

#if defined(_WIN32)

MappedFile::MappedFile(const std::filesystem::path& file) {
  const HANDLE opened = CreateFileW(file.c_str(), GENERIC_READ, FILE_SHARE_READ, nullptr, OPEN_EXISTING, 0, nullptr);
  if (opened == INVALID_HANDLE_VALUE) fail(file);
  LARGE_INTEGER size;
  bool good = GetFileSizeEx(opened, &size);
  if (good && size.QuadPart > 0) {
    const HANDLE mapping = CreateFileMappingW(opened, nullptr, PAGE_READONLY, 0, 0, nullptr);
    if (mapping) {
      data_ = static_cast<const unsigned char*>(MapViewOfFile(mapping, FILE_MAP_READ, 0, 0, 0));
      CloseHandle(mapping);
    }
    good = data_ != nullptr;
    size_ = static_cast<std::size_t>(size.QuadPart);
  }
  CloseHandle(opened);
  if (!good) fail(file);
}

MappedFile::~MappedFile() {
  if (data_) UnmapViewOfFile(data_);
}

#else

MappedFile::MappedFile(const std::filesystem::path& file) {
  const int opened = open(file.c_str(), O_RDONLY | O_CLOEXEC);
  if (opened < 0) fail(file);
  struct stat about;
  bool good = fstat(opened, &about) == 0 && S_ISREG(about.st_mode);
  if (good && about.st_size > 0) {
    size_ = static_cast<std::size_t>(about.st_size);
    void* memory = mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, opened, 0);
    good = memory != MAP_FAILED;
    data_ = good ? static_cast<const unsigned char*>(memory) : nullptr;
  }
  close(opened);
  if (!good) fail(file);
}

MappedFile::~MappedFile() {
  if (data_) munmap(const_cast<unsigned char*>(data_), size_);
}

#endif

MappedFile::MappedFile(MappedFile&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

}  // namespace nnturbo
