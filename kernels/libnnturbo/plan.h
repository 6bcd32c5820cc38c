// The plan of the path around the network, which nnturbo writes into a bundle as path.json.

#pragma once

#include <optional>

#include "normalization.h"

namespace nnturbo {

// A view of a tile: the spatial axes along which it is flipped.
using View = std::array<bool, 3>;

// What the network's outputs mean.
struct LabelScheme {
  Size num_outputs = 0;
  std::optional<std::vector<Size>> regions_class_order;  // label that each region paints, in painting order
  std::vector<std::string> names;                        // of labels or regions, without background
  std::vector<std::vector<Size>> values;                 // that each has in a segmentation
  nnturbo_type type = NNTURBO_UINT8;                     // of a segmentation
};

// How a case gets its class.
struct ClassificationScheme {
  std::vector<std::string> class_names;
  std::vector<Size> focus_channels;  // of the segmentation output, whose voxels decide the class
};

struct Plan {
  std::vector<NormalizationScheme> channels;
  std::vector<double> spacing;  // mm of the network's grid: two numbers for 2d configurations
  Triple transpose_forward{};   // axis of the scan that becomes each axis of the network's grid
  Triple patch_size{};
  bool slicewise = false;   // every plane is a row of tiles, as in 2d configurations
  std::vector<View> views;  // the unflipped one first
  Resampling resampling_data, resampling_logits;
  LabelScheme labels;
  std::optional<ClassificationScheme> classification;
  std::string reader;

  // The network's spacing (z, y, x); a 2d configuration keeps the scan's own slice spacing.
  Spacing spacing_3d(double slice_spacing) const;
};

// Read a plan from the text of path.json; throws Error where something is missing or out of range.
Plan parse_plan(const std::string& text);

}  // namespace nnturbo
