// The network of a bundle, run by the executor of programs (kernels/cpu/program.h).

#pragma once

#include <memory>

#include "mapped_file.h"
#include "network.h"
#include "plan.h"

namespace nnturbo {

// Read the text of network.json with the weights of all folds, and pack them for this processor. Throws Error where they
// are damaged, or do not fit the plan.
std::unique_ptr<const Network> read_network(const std::string& text, const MappedFile& weights, const Plan& plan);

}  // namespace nnturbo
