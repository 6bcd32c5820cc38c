#pragma once

#include <nnturbo_torch/engine.h>

#include <array>
#include <memory>
#include <string>
#include <vector>

#include "bundle.h"

namespace nnturbo_torch {

/// Labels (Z, Y, X) on the CPU, and class probabilities.
struct Answer {
  torch::Tensor segmentation;
  std::vector<float> class_probabilities;
};

/// What runs a bundle: all that lies between a scan and its labels.
class Path {
 public:
  virtual ~Path() = default;

  /// Runs a scan (C, Z, Y, X) of finite real numbers.
  ///
  /// @throws std::exception  Where that fails, whose text says why.
  virtual Answer run(const torch::Tensor& scan, const std::array<double, 3>& spacing_mm,
                     const Options& options) const = 0;

  std::vector<std::string> class_names, label_names;
  std::string reader;
  std::size_t channels = 0;
};

/// Loads `path.ts` and a network of TorchScript or AOTInductor; libtorch runs them.
///
/// @throws Error  Where libtorch cannot load them.
std::unique_ptr<const Path> load_script_path(const Bundle& bundle, torch::Device device);

/// Opens a bundle of the native backend; libnnturbo verifies and runs it.
///
/// @throws Error  Where libnnturbo refuses it.
std::unique_ptr<const Path> load_native_path(const Bundle& bundle);

/// What torch says about a failure, without its stack traces.
std::string reason(const std::exception& error);

}  // namespace nnturbo_torch
