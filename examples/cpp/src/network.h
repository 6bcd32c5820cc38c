#pragma once

#include <torch/types.h>

#include <memory>
#include <vector>

#include "bundle.h"

namespace nnturbo_torch {

/// A bundle's network, ready to run on its device.
class Network {
 public:
  virtual ~Network() = default;

  /// Runs the views of one tile, (V, C, *patch) float32.
  ///
  /// @returns  Segmentation logits (V, K, *patch), and class logits (V, S) where the model has classes; float32.
  virtual std::vector<torch::Tensor> run(const torch::Tensor& views) const = 0;
};

/// Loads the network of a bundle that was verified.
///
/// @throws Error  Where it was compiled for another CPU.
std::unique_ptr<const Network> load_network(const Bundle& bundle, torch::Device device);

}  // namespace nnturbo_torch
