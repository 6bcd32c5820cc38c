// nnU-Net's resampling functions as one linear operator per axis.

#pragma once

#include <string>

#include "axis_operator.h"

namespace nnturbo {

// One of nnU-Net's resampling functions with the arguments a plan gives it.
struct Resampling {
  std::string function;  // "spline", "torch", "torch_simple" or "none"
  Size order = 3;        // of the spline, in plane
  Size order_coarse = 0;  // along the coarse axis if it is resampled separately
  enum class Separate { no, yes, by_spacing } separate = Separate::no;
  double threshold = 3;  // ratio of spacings above which the coarse axis is resampled separately
  std::string mode = "linear", mode_coarse = "nearest-exact";  // of torch
};

// The operator that scipy.ndimage applies along an axis; order 0 nearest, 1 linear, 2 to 5 B-spline.
AxisOperator spline_operator(Size n_in, Size n_out, Size order);

// The operator that torch's interpolate applies along an axis: "linear", "nearest" or "nearest-exact".
AxisOperator torch_operator(Size n_in, Size n_out, const std::string& mode);

enum class Clip {
  none,
  volume,  // to the range of each channel, after all axes
  slice    // to the range of each slice across `last_axis`, before that axis is resampled
};

// The map from one grid to another.
struct GridMap {
  std::array<AxisOperator, 3> axes;
  int last_axis = 0;  // that is resampled last: the coarse one, if nnU-Net separates it
  Clip clip = Clip::none;

  Triple shape() const { return {axes[0].n_out(), axes[1].n_out(), axes[2].n_out()}; }
};

GridMap grid_map(const Resampling& resampling, const Triple& old_shape, const Triple& new_shape,
                 const Spacing& old_spacing, const Spacing& new_spacing);

// Least and greatest value of each channel or, where a map clips by slice, of each of its slices; empty without clipping.
struct Limits {
  std::vector<float> low, high;

  Limits() = default;
  // Of no values yet.
  Limits(Size channels, const GridMap& grid);
  // Include planes of the map's old grid, from `z` on.
  void include(const Array& planes, Size z, const GridMap& grid);
};

// Resample to the planes [start, stop) of the new grid, from the input planes that these need, beginning with `offset`.
Array resample_rows(const Array& data, const GridMap& grid, Size start, Size stop, Size offset, const Limits& limits);

// Resample a plane along y and x; `scratch` has as many floats as `scratch_in_plane` says.
void resample_in_plane(const GridMap& grid, const float* from, float* scratch, float* to);
Size scratch_in_plane(const GridMap& grid);

}  // namespace nnturbo
