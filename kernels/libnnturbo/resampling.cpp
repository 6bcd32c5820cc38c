#include "resampling.h"

#include <algorithm>
#include <limits>

namespace nnturbo {
namespace {

// The axis to resample separately, or -1 (nnU-Net: determine_do_sep_z_and_axis).
int coarse_axis(const Resampling& resampling, const Spacing& old_spacing, const Spacing& new_spacing) {
  using Separate = Resampling::Separate;
  if (resampling.function == "torch_simple" || resampling.function == "none" || resampling.separate == Separate::no)
    return -1;
  for (const Spacing* spacing : {&old_spacing, &new_spacing}) {
    const auto [least, most] = std::minmax_element(spacing->begin(), spacing->end());
    if (resampling.separate != Separate::yes && !(*most / *least > resampling.threshold)) continue;
    // If two or three axes have the coarse spacing, nnU-Net separates none.
    int coarsest = -1, count = 0;
    for (int axis = 0; axis < 3; ++axis)
      if (*most / (*spacing)[axis] == 1) {
        coarsest = axis;
        ++count;
      }
    return count == 1 ? coarsest : -1;
  }
  return -1;
}

AxisOperator operator_along(const Resampling& resampling, int axis, int coarse, Size n_in, Size n_out) {
  if (resampling.function == "spline")
    return spline_operator(n_in, n_out, axis == coarse ? resampling.order_coarse : resampling.order);
  if (axis == coarse) return torch_operator(n_in, n_out, resampling.mode_coarse);
  // resample_torch_fornnunet uses its mode only if it separates an axis.
  const bool ignored = coarse < 0 && resampling.function == "torch";
  return torch_operator(n_in, n_out, ignored ? "linear" : resampling.mode);
}

// The limits of one plane.
struct Bounds {
  const float *low = nullptr, *high = nullptr;
  int along = -1;  // one for all voxels, or for each place along this axis (1 or 2) of the plane
};

void clamp_plane(const Bounds& bounds, Size height, Size width, float* values) {
  if (!bounds.low) return;
  for (Size y = 0; y < height; ++y)
    for (Size x = 0; x < width; ++x) {
      const Size at = bounds.along == 1 ? y : bounds.along == 2 ? x : 0;
      float& value = values[y * width + x];
      value = std::min(std::max(value, bounds.low[at]), bounds.high[at]);
    }
}

// Along one axis of a plane (height, width) -> its new size.
void apply_in_plane(const AxisOperator& op, int axis, Size height, Size width, const float* from, float* scratch,
                    float* to) {
  if (axis == 1)
    apply_across(op, 0, op.n_out(), 0, from, width, width, to);
  else
    apply_along(op, height, from, scratch, to);
}

// Along y and x, the last of them after values were clamped where bounds are for places along it, else before.
void resample_plane(const GridMap& grid, int first, const Bounds& bounds, const float* from, float* scratch, float* to) {
  const int second = 3 - first;
  Size size[3] = {0, grid.axes[1].n_in, grid.axes[2].n_in};
  float* between = scratch + scratch_along(grid.axes[2]);
  apply_in_plane(grid.axes[first], first, size[1], size[2], from, scratch, between);
  size[first] = grid.axes[first].n_out();
  const bool early = bounds.along > 0;
  if (early) clamp_plane(bounds, size[1], size[2], between);
  apply_in_plane(grid.axes[second], second, size[1], size[2], between, scratch, to);
  if (!early) clamp_plane(bounds, grid.axes[1].n_out(), grid.axes[2].n_out(), to);
}

Array apply_z(const Array& data, const AxisOperator& z, Size start, Size stop, Size offset) {
  Array out(data.channels, {stop - start, data.shape[1], data.shape[2]});
  const Size rows = stop - start;
  parallel(data.channels * rows, [&](Size task) {
    const Size channel = task / rows, row = start + task % rows;
    apply_across(z, row, row + 1, offset, data.plane(channel, 0), data.plane_size(), data.plane_size(),
                 out.plane(channel, row - start));
  });
  return out;
}

// Along y and x; `bounds_of` gives the limits of a channel's plane.
template <class BoundsOf>
Array in_plane(const Array& data, const GridMap& grid, int first, const BoundsOf& bounds_of) {
  Array out(data.channels, {data.shape[0], grid.axes[1].n_out(), grid.axes[2].n_out()});
  parallel(data.channels * data.shape[0], [&](Size task) {
    const Size channel = task / data.shape[0], z = task % data.shape[0];
    resample_plane(grid, first, bounds_of(channel, z), data.plane(channel, z), scratch(scratch_in_plane(grid)),
                   out.plane(channel, z));
  });
  return out;
}

}  // namespace

GridMap grid_map(const Resampling& resampling, const Triple& old_shape, const Triple& new_shape,
                 const Spacing& old_spacing, const Spacing& new_spacing) {
  GridMap grid;
  if (resampling.function == "none" || old_shape == new_shape) {
    for (int axis = 0; axis < 3; ++axis) grid.axes[axis] = AxisOperator::identity(old_shape[axis]);
    return grid;
  }
  const int coarse = coarse_axis(resampling, old_spacing, new_spacing);
  for (int axis = 0; axis < 3; ++axis)
    grid.axes[axis] = operator_along(resampling, axis, coarse, old_shape[axis], new_shape[axis]);
  grid.last_axis = std::max(coarse, 0);
  if (resampling.function == "spline" && resampling.order >= 2) grid.clip = coarse < 0 ? Clip::volume : Clip::slice;
  return grid;
}

Limits::Limits(Size channels, const GridMap& grid) {
  if (grid.clip == Clip::none) return;
  const Size slices = grid.clip == Clip::slice ? grid.axes[grid.last_axis].n_in : 1;
  low.assign(channels * slices, std::numeric_limits<float>::infinity());
  high.assign(channels * slices, -std::numeric_limits<float>::infinity());
}

void Limits::include(const Array& planes, Size z, const GridMap& grid) {
  if (grid.clip == Clip::none) return;
  const Size slices = static_cast<Size>(low.size()) / planes.channels;
  const float* value = planes.values.data();
  for (Size c = 0; c < planes.channels; ++c)
    for (Size plane = 0; plane < planes.shape[0]; ++plane)
      for (Size y = 0; y < planes.shape[1]; ++y)
        for (Size x = 0; x < planes.shape[2]; ++x, ++value) {
          const Size place[3] = {z + plane, y, x};
          const Size at = c * slices + (grid.clip == Clip::slice ? place[grid.last_axis] : 0);
          low[at] = std::min(low[at], *value);
          high[at] = std::max(high[at], *value);
        }
}

Array resample_rows(const Array& data, const GridMap& grid, Size start, Size stop, Size offset, const Limits& limits) {
  const AxisOperator& z = grid.axes[0];
  const Size slices = grid.clip == Clip::slice ? grid.axes[grid.last_axis].n_in : 1;
  const bool by_plane = grid.clip == Clip::slice && grid.last_axis == 0;
  auto bounds_of = [&](Size channel, Size plane) {
    if (grid.clip == Clip::none) return Bounds{};
    const Size at = channel * slices + (by_plane ? offset + plane : 0);
    return Bounds{&limits.low[at], &limits.high[at], grid.clip == Clip::slice && !by_plane ? grid.last_axis : -1};
  };
  if (grid.last_axis == 0 && grid.clip != Clip::volume)
    return apply_z(in_plane(data, grid, 1, bounds_of), z, start, stop, offset);
  const int first = grid.last_axis == 0 ? 1 : 3 - grid.last_axis;
  return in_plane(apply_z(data, z, start, stop, offset), grid, first, bounds_of);
}

Size scratch_in_plane(const GridMap& grid) {
  const AxisOperator &y = grid.axes[1], &x = grid.axes[2];
  return scratch_along(x) + std::max(y.n_out() * x.n_in, y.n_in * x.n_out());
}

void resample_in_plane(const GridMap& grid, const float* from, float* scratch, float* to) {
  resample_plane(grid, 1, {}, from, scratch, to);
}

}  // namespace nnturbo
