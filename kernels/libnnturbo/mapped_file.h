// A file as memory, which the system reads when it is looked at.

#pragma once

#include <string>

namespace nnturbo {

// Whether there is a file of this name, which is UTF-8 here and below. Not by std::filesystem, whose streams would be
// half of the library on systems where it brings its own.
bool is_file(const std::string& name);

class MappedFile {
 public:
  // Throws Error where the file cannot be read.
  explicit MappedFile(const std::string& name);
  ~MappedFile();
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&&) = delete;

  const unsigned char* data() const { return data_; }
  std::size_t size() const { return size_; }
  std::string text() const { return {reinterpret_cast<const char*>(data_), size_}; }

 private:
  const unsigned char* data_ = nullptr;  // null for an empty file
  std::size_t size_ = 0;
};

}  // namespace nnturbo
