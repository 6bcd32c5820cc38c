#include "labels.h"

#include <algorithm>
#include <cstring>

#include "fused.h"

namespace nnturbo {
namespace {

constexpr Size WORKING_FLOATS = Size{4} << 20;  // planes that are resampled at once

// The weighted sum of lines, one after the other.
FUSED void mix(const std::vector<const float*>& lines, const float* weights, Size count, float* to) {
  const Size taps = static_cast<Size>(lines.size());
  if (weights[0] == 1 && std::all_of(weights + 1, weights + taps, [](float weight) { return weight == 0; })) {
    std::memcpy(to, lines[0], count * sizeof(float));
    return;
  }
  for (Size x = 0; x < count; ++x) to[x] = lines[0][x] * weights[0];
  for (Size t = 1; t < taps; ++t) {
    const float *line = lines[t], weight = weights[t];
    for (Size x = 0; x < count; ++x) to[x] = __builtin_fmaf(line[x], weight, to[x]);
  }
}

}  // namespace

LabelPlanes::LabelPlanes(const Case& scan, const Plan& plan) : case_(scan), scheme_(plan.labels) {
  const auto [depth, height, width] = scan.scan_shape;
  const Size bytes = scheme_.type == NNTURBO_UINT8 ? 1 : 2;
  labels_.resize(depth * height * width * bytes);
  const Size of_axis[3] = {height * width, width, 1};
  for (int axis = 0; axis < 3; ++axis) {
    steps_[axis] = of_axis[plan.transpose_forward[axis]];
    first_place_ += scan.box[axis].start * steps_[axis];
  }
}

void LabelPlanes::add(const Array& logits, Size first, Size last, const Triple& before) {
  if (case_.logits_grid.clip != Clip::none) {  // clipping needs the range of all logits
    add_to_whole(logits, first, last, before);
    return;
  }
  const auto [depth, height, width] = case_.logits_grid.shape();
  const Size step = std::max<Size>(1, WORKING_FLOATS / (logits.channels * height * width));
  for (Size start = first; start < last; start += step) {
    add_in_plane(logits, start, std::min(start + step, last), before);
    make_planes();
  }
}

// Resample planes along y and x, and hold them.
void LabelPlanes::add_in_plane(const Array& logits, Size first, Size last, const Triple& before) {
  const GridMap& grid = case_.logits_grid;
  const Size height = grid.axes[1].n_in, width = grid.axes[2].n_in, size = grid.axes[1].n_out() * grid.axes[2].n_out();
  const std::size_t earlier = held_.size();
  for (Size z = first; z < last; ++z) held_.emplace_back(count_that_fits({logits.channels, size}));
  parallel(logits.channels * (last - first), [&](Size task) {
    const Size channel = task % logits.channels, index = task / logits.channels;
    float* memory = scratch(height * width + scratch_in_plane(grid));
    const float* from = logits.plane(channel, first + index) + before[1] * logits.shape[2] + before[2];
    for (Size y = 0; y < height; ++y)
      std::memcpy(memory + y * width, from + y * logits.shape[2], width * sizeof(float));
    resample_in_plane(grid, memory, memory + height * width, held_[earlier + index].data() + channel * size);
  });
}

// Label the planes of the scan whose inputs are all held, and drop inputs that no other plane needs.
void LabelPlanes::make_planes() {
  const AxisOperator& z = case_.logits_grid.axes[0];
  const Size held_to = held_from_ + static_cast<Size>(held_.size()), height = case_.logits_grid.axes[1].n_out();
  Size ready = made_;
  while (ready < z.n_out() && z.first[ready] + z.taps <= held_to) ++ready;
  parallel((ready - made_) * height, [&](Size task) {
    const Size plane = made_ + task / height;
    std::vector<const float*> planes;
    for (Size tap = 0; tap < z.taps; ++tap) planes.push_back(held_[z.first[plane] + tap - held_from_].data());
    label_line(plane, task % height, planes, &z.weights[plane * z.taps]);
  });
  made_ = ready;
  const Size needed = made_ < z.n_out() ? std::min(z.first[made_], held_to) : held_to;
  for (; held_from_ < needed; ++held_from_) held_.pop_front();
}

void LabelPlanes::add_to_whole(const Array& logits, Size first, Size last, const Triple& before) {
  const GridMap& grid = case_.logits_grid;
  const Triple shape{grid.axes[0].n_in, grid.axes[1].n_in, grid.axes[2].n_in};
  if (come_ == 0) whole_ = Array(logits.channels, shape);
  for (Size channel = 0; channel < logits.channels; ++channel)
    for (Size z = first; z < last; ++z)
      for (Size y = 0; y < shape[1]; ++y)
        std::memcpy(whole_.plane(channel, come_ + z - first) + y * shape[2],
                    logits.plane(channel, z) + (before[1] + y) * logits.shape[2] + before[2], shape[2] * sizeof(float));
  come_ += last - first;
  if (come_ < shape[0]) return;
  Limits limits(whole_.channels, grid);
  limits.include(whole_, 0, grid);
  const Array resampled = resample_rows(whole_, grid, 0, grid.axes[0].n_out(), 0, limits);
  // As held planes have it: (Z, K, Y, X).
  parallel(resampled.shape[0], [&](Size z) {
    std::vector<float> plane(resampled.channels * resampled.plane_size());
    for (Size channel = 0; channel < resampled.channels; ++channel)
      std::memcpy(plane.data() + channel * resampled.plane_size(), resampled.plane(channel, z),
                  resampled.plane_size() * sizeof(float));
    const float unchanged = 1;
    for (Size y = 0; y < resampled.shape[1]; ++y) label_line(z, y, {plane.data()}, &unchanged);
  });
}

// Mix lines of planes (K, Y, X), and write the labels: the index of the greatest logit, the first of equal ones; or
// regions over each other, where their probability is above one half.
void LabelPlanes::label_line(Size z, Size y, const std::vector<const float*>& planes, const float* weights) {
  const auto [depth, height, width] = case_.logits_grid.shape();
  std::vector<float> mixed(width), best(width);
  std::vector<std::uint16_t> labels(width);
  std::vector<const float*> lines(planes.size());
  for (Size channel = 0; channel < scheme_.num_outputs; ++channel) {
    for (std::size_t tap = 0; tap < planes.size(); ++tap) lines[tap] = planes[tap] + (channel * height + y) * width;
    mix(lines, weights, width, mixed.data());
    if (scheme_.regions_class_order) {
      const auto value = static_cast<std::uint16_t>((*scheme_.regions_class_order)[channel]);
      for (Size x = 0; x < width; ++x) labels[x] = mixed[x] > 0 ? value : labels[x];
    } else if (channel == 0) {
      best = mixed;
    } else {
      for (Size x = 0; x < width; ++x) {
        labels[x] = mixed[x] > best[x] ? static_cast<std::uint16_t>(channel) : labels[x];
        best[x] = std::max(best[x], mixed[x]);
      }
    }
  }
  const Size start = first_place_ + z * steps_[0] + y * steps_[1];
  for (Size x = 0; x < width; ++x) {
    const Size place = start + x * steps_[2];
    if (scheme_.type == NNTURBO_UINT8)
      labels_[place] = static_cast<std::uint8_t>(labels[x]);
    else
      std::memcpy(&labels_[2 * place], &labels[x], 2);
  }
}

std::vector<double> volumes_ml(const std::vector<std::uint8_t>& labels, const LabelScheme& scheme,
                               const Spacing& spacing) {
  std::vector<Size> counts(1 << 16);
  if (scheme.type == NNTURBO_UINT8) {
    for (const std::uint8_t label : labels) ++counts[label];
  } else {
    for (std::size_t at = 0; at < labels.size(); at += 2) {
      std::uint16_t label;
      std::memcpy(&label, &labels[at], 2);
      ++counts[label];
    }
  }
  const double voxel_ml = spacing[0] * spacing[1] * spacing[2] / 1000;
  std::vector<double> volumes;
  for (const auto& values : scheme.values) {
    Size voxels = 0;
    for (const Size value : values) voxels += counts[value];
    volumes.push_back(static_cast<double>(voxels) * voxel_ml);
  }
  return volumes;
}

}  // namespace nnturbo
