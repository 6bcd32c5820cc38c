// Tensors in a file of the safetensors format: the length of a header, the header in JSON, and the numbers.

#pragma once

#include <map>

#include "../cpu/kernels.h"
#include "mapped_file.h"

namespace nnturbo {

struct Tensor {
  const float* data;
  Size count;
};

// The float32 tensors of a file, by name; they are in its memory. Throws Error where it is damaged.
std::map<std::string, Tensor> read_tensors(const MappedFile& file, const std::string& name);

}  // namespace nnturbo
