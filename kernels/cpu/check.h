// What a program must fulfil before it is packed and run.

#pragma once

#include "operations.h"

#include <vector>

namespace nnturbo {

// The values of a program, with their channels in memory.
std::vector<Map> maps_of(const nnturbo_description& description, Size lanes);

// Throws std::invalid_argument, with a sentence, where anything would be read that is not there.
void check(const nnturbo_description& description, const std::vector<Map>& maps);

}  // namespace nnturbo
