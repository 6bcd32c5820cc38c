// JSON, for the few files that read it: its templates take long to compile.

#pragma once

#include <nlohmann/json.hpp>

namespace nnturbo {

using Json = nlohmann::json;

}  // namespace nnturbo
