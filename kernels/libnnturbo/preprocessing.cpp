#include "preprocessing.h"

#include <algorithm>
#include <cmath>

#include "error.h"

namespace nnturbo {
namespace {

constexpr double LARGEST_GROWTH = 1000;  // of the number of voxels; more means that a spacing is wrong
constexpr double LEAST_SPACING = 1e-6, LARGEST_SPACING = 1e6;
constexpr double MOST_VOXELS = 1e12;  // so that sizes in bytes are numbers that fit

void check(const nnturbo_scan& scan, const Plan& plan) {
  const std::array<Size, 4> shape{scan.channels, scan.z, scan.y, scan.x};
  const auto channels = static_cast<Size>(plan.channels.size());
  if (!scan.voxels || *std::min_element(shape.begin(), shape.end()) < 1)
    throw Error(NNTURBO_BAD_SCAN, "a scan must have voxels (channels, z, y, x), got " + listed(shape));
  if (1.0 * scan.channels * scan.z * scan.y * scan.x > MOST_VOXELS)
    throw Error(NNTURBO_BAD_SCAN, "a scan must have at most 10^12 voxels, got " + listed(shape));
  if (scan.type < NNTURBO_INT8 || scan.type > NNTURBO_FLOAT64)
    throw Error(NNTURBO_BAD_SCAN, "the voxels' type must be one of nnturbo_type");
  if (scan.channels != channels)
    throw Error(NNTURBO_BAD_SCAN, "the model takes " + std::to_string(channels) + " channel(s), got " +
                                      std::to_string(scan.channels) + ": pass all channels in the order of training");
  for (const double step : scan.spacing_mm)
    if (!(LEAST_SPACING <= step && step <= LARGEST_SPACING))
      throw Error(NNTURBO_BAD_SCAN, "spacing must be finite and above 0 mm, got " +
                                        listed(Spacing{scan.spacing_mm[0], scan.spacing_mm[1], scan.spacing_mm[2]}) +
                                        " (z, y, x)");
}

}  // namespace

Triple shape_at_spacing(const Triple& shape, const Spacing& spacing, const Spacing& new_spacing) {
  Spacing reached;
  for (int axis = 0; axis < 3; ++axis)  // half to even, as in Python
    reached[axis] = std::nearbyint(spacing[axis] / new_spacing[axis] * static_cast<double>(shape[axis]));
  const std::string what = "at the model's spacing of " + listed(new_spacing) + " mm ";
  const std::string grown = listed(shape) + " voxels of " + listed(spacing) + " mm become " + listed(reached);
  if (*std::min_element(reached.begin(), reached.end()) < 1)
    throw Error(NNTURBO_BAD_SCAN, what + "the scan must have at least one voxel along each axis; " + grown);
  if (!(reached[0] * reached[1] * reached[2] <= LARGEST_GROWTH * shape[0] * shape[1] * shape[2]))
    throw Error(NNTURBO_BAD_SCAN, what + "a scan must grow at most 1000 times; " + grown + ": check the spacing");
  return {static_cast<Size>(reached[0]), static_cast<Size>(reached[1]), static_cast<Size>(reached[2])};
}

Case preprocess(const nnturbo_scan& scan, const Plan& plan) {
  check(scan, plan);
  const ScanView whole = ScanView::of(scan);
  if (!is_finite(whole)) throw Error(NNTURBO_BAD_SCAN, "voxels must be finite, got NaN or infinity: replace them");
  Case made;
  made.scan_shape = whole.shape;
  const ScanView turned = whole.transposed(plan.transpose_forward);
  made.box = nonzero_box(turned);
  made.scan = turned.cropped(made.box);

  const Triple shape = made.scan.shape;
  Spacing spacing;
  for (int axis = 0; axis < 3; ++axis) spacing[axis] = scan.spacing_mm[plan.transpose_forward[axis]];
  const Spacing new_spacing = plan.spacing_3d(spacing[0]);
  const Triple new_shape = shape_at_spacing(shape, spacing, new_spacing);
  made.grid = grid_map(plan.resampling_data, shape, new_shape, spacing, new_spacing);
  made.logits_grid = grid_map(plan.resampling_logits, made.grid.shape(), shape, new_spacing, spacing);

  const auto uses_mask = [](const NormalizationScheme& channel) { return channel.use_mask; };
  if (std::any_of(plan.channels.begin(), plan.channels.end(), uses_mask)) made.mask = filled_mask(made.scan);
  for (Size channel = 0; channel < made.scan.channels; ++channel)
    made.normalizations.push_back(choose_normalization(plan.channels[channel], made.scan, channel, made.mask));
  made.limits = normalized_range(made.scan, made.normalizations, made.mask, made.grid);
  return made;
}

Array Case::planes(Size start, Size stop) const {
  const Range needed = grid.axes[0].inputs_of(start, stop);
  const Array normalized = normalized_planes(scan, normalizations, mask, needed.start, needed.stop);
  return resample_rows(normalized, grid, start, stop, needed.start, limits);
}

}  // namespace nnturbo
