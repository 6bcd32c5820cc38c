// SHA-256 of bytes (FIPS 180-4), so that the library needs no other one.

#pragma once

#include <cstddef>
#include <string>

namespace nnturbo {

// In hexadecimal digits.
std::string sha256(const void* bytes, std::size_t count);

}  // namespace nnturbo
