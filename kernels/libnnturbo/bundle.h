// A bundle of the native backend: a folder with a manifest and files, which are compared with their SHA-256.

#pragma once

#include <memory>

#include "network.h"
#include "plan.h"

namespace nnturbo {

struct Bundle {
  Plan plan;
  std::unique_ptr<const Network> network;
};

// Throws Error where a bundle is incomplete, damaged, too new, or for another backend. `folder` is UTF-8.
Bundle open_bundle(const std::string& folder);

}  // namespace nnturbo
