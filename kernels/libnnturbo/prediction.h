// From a scan to its labels: the whole path.

#pragma once

#include "sliding_window.h"

namespace nnturbo {

struct Options {
  double tile_step_size = 0.5;
  bool mirror = true;
};

struct Prediction {
  std::vector<std::uint8_t> labels;  // (Z, Y, X) on the scan's grid, in the bytes of `LabelScheme::type`
  std::vector<double> volumes_ml;    // of each label or region
  std::vector<double> class_probabilities;  // empty for models without classification
};

Prediction predict(const nnturbo_scan& scan, const Plan& plan, const Network& network, const Options& options,
                   const Progress& progress);

}  // namespace nnturbo
