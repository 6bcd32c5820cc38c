// Turns a scan into planes of the network's grid: transpose, crop to non-zero, normalise, resample.

#pragma once

#include "plan.h"

namespace nnturbo {

// A cropped scan with all that is needed to make planes of the network's grid, and to map logits back.
struct Case {
  ScanView scan;  // cropped, in the network's axis order
  std::vector<Normalization> normalizations;
  std::vector<std::uint8_t> mask;  // (Z, Y, X), empty if no channel is normalised within it
  GridMap grid, logits_grid;       // from the cropped scan to the network's grid, and back
  Limits limits;                   // normalised range to which resampling clips
  Box box;                         // of the crop, along the network's axes
  Triple scan_shape;               // before cropping, along the scan's own axes

  // Size of the network's grid.
  Triple shape() const { return grid.shape(); }

  // Make the planes [start, stop) of the network's grid.
  Array planes(Size start, Size stop) const;
};

// Find how a scan maps to the network's grid (nnU-Net: DefaultPreprocessor.run_case_npy).
Case preprocess(const nnturbo_scan& scan, const Plan& plan);

// Size of a scan at another spacing (nnU-Net: compute_new_shape); throws Error where it would be empty or too large.
Triple shape_at_spacing(const Triple& shape, const Spacing& spacing, const Spacing& new_spacing);

}  // namespace nnturbo
