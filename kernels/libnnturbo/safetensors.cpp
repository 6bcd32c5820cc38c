#include "safetensors.h"

#include <cstring>

#include "error.h"
#include "json.h"

namespace nnturbo {
namespace {

constexpr std::size_t LENGTH_BYTES = 8;

void require(bool holds, const std::string& name, const std::string& what) {
  if (!holds) throw Error(NNTURBO_BAD_BUNDLE, name + ": " + what + "; build the bundle again");
}

std::uint64_t header_bytes(const MappedFile& file) {
  std::uint64_t count = 0;
  for (std::size_t i = 0; i < LENGTH_BYTES; ++i) count |= std::uint64_t{file.data()[i]} << 8 * i;
  return count;
}

// JSON's library would take any number for a whole one.
std::uint64_t whole(const Json& value, const std::string& name) {
  require(value.is_number_unsigned(), name, "sizes and offsets must be whole numbers");
  return value.get<std::uint64_t>();
}

Tensor read_tensor(const Json& entry, const unsigned char* numbers, std::size_t bytes, const std::string& name) {
  const Json& places = entry.at("data_offsets");
  const std::uint64_t offsets[2] = {whole(places.at(0), name), whole(places.at(1), name)};
  require(entry.at("dtype") == "F32", name, "tensors must be F32");
  require(offsets[0] <= offsets[1] && offsets[1] <= bytes, name, "tensors must lie inside the file");
  double count = 1;  // exact as long as it fits into the file
  for (const Json& size : entry.at("shape")) count *= static_cast<double>(whole(size, name));
  require(count * sizeof(float) == static_cast<double>(offsets[1] - offsets[0]), name,
          "tensors must have as many bytes as their shape says");
  const unsigned char* first = numbers + offsets[0];
  require(reinterpret_cast<std::uintptr_t>(first) % alignof(float) == 0, name, "tensors must be aligned to 4 bytes");
  return {reinterpret_cast<const float*>(first), static_cast<Size>(count)};
}

}  // namespace

std::map<std::string, Tensor> read_tensors(const MappedFile& file, const std::string& name) {
  require(file.size() >= LENGTH_BYTES && header_bytes(file) <= file.size() - LENGTH_BYTES, name,
          "its header must lie inside the file");
  const unsigned char *header = file.data() + LENGTH_BYTES, *numbers = header + header_bytes(file);
  const std::size_t bytes = static_cast<std::size_t>(file.data() + file.size() - numbers);
  std::map<std::string, Tensor> tensors;
  try {
    const Json described = Json::parse(header, numbers);
    for (const auto& [tensor, entry] : described.items())
      if (tensor != "__metadata__") tensors.emplace(tensor, read_tensor(entry, numbers, bytes, name));
  } catch (const Json::exception& error) {
    require(false, name, std::string("its header must have the form of safetensors: ") + error.what());
  }
  return tensors;
}

}  // namespace nnturbo
