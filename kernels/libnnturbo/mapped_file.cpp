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

[[noreturn]] void fail(const std::string& name) {
  throw Error(NNTURBO_BAD_BUNDLE,
              name + ": this file of the bundle cannot be read; copy the whole bundle, and check its permissions");
}

#if defined(_WIN32)

std::wstring wide(const std::string& name) {
  const int bytes = static_cast<int>(name.size());
  std::wstring text(MultiByteToWideChar(CP_UTF8, 0, name.data(), bytes, nullptr, 0), L'\0');
  MultiByteToWideChar(CP_UTF8, 0, name.data(), bytes, text.data(), static_cast<int>(text.size()));
  return text;
}

#endif

}  // namespace

#if defined(_WIN32)

bool is_file(const std::string& name) {
  const DWORD about = GetFileAttributesW(wide(name).c_str());
  return about != INVALID_FILE_ATTRIBUTES && !(about & FILE_ATTRIBUTE_DIRECTORY);
}

MappedFile::MappedFile(const std::string& name) {
  const HANDLE opened = CreateFileW(wide(name).c_str(), GENERIC_READ, FILE_SHARE_READ, nullptr, OPEN_EXISTING, 0, nullptr);
  if (opened == INVALID_HANDLE_VALUE) fail(name);
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
  if (!good) fail(name);
}

MappedFile::~MappedFile() {
  if (data_) UnmapViewOfFile(data_);
}

#else

bool is_file(const std::string& name) {
  struct stat about;
  return stat(name.c_str(), &about) == 0 && S_ISREG(about.st_mode);
}

MappedFile::MappedFile(const std::string& name) {
  const int opened = open(name.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);  // of a pipe it would wait
  if (opened < 0) fail(name);
  struct stat about;
  bool good = fstat(opened, &about) == 0 && S_ISREG(about.st_mode);
  if (good && about.st_size > 0) {
    size_ = static_cast<std::size_t>(about.st_size);
    void* memory = mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, opened, 0);
    good = memory != MAP_FAILED;
    data_ = good ? static_cast<const unsigned char*>(memory) : nullptr;
  }
  close(opened);
  if (!good) fail(name);
}

MappedFile::~MappedFile() {
  if (data_) munmap(const_cast<unsigned char*>(data_), size_);
}

#endif

MappedFile::MappedFile(MappedFile&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

}  // namespace nnturbo
