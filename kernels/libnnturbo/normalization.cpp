#include "normalization.h"

#include <algorithm>
#include <cmath>

#include "error.h"

namespace nnturbo {
namespace {

constexpr double EPSILON = 1e-8;  // least standard deviation or range by which nnU-Net divides

// Call `work(value)` with each voxel of a channel, within a mask if there is one.
template <class Work>
void each_voxel(const ScanView& scan, Size channel, const std::uint8_t* mask, const Work& work) {
  std::vector<float> line(scan.shape[2]);
  for (Size z = 0; z < scan.shape[0]; ++z)
    for (Size y = 0; y < scan.shape[1]; ++y) {
      scan.read_line(channel, z, y, line.data());
      for (Size x = 0; x < scan.shape[2]; ++x)
        if (!mask || mask[(z * scan.shape[1] + y) * scan.shape[2] + x]) work(line[x]);
    }
}

// Mean and standard deviation.
std::pair<double, double> statistics(const ScanView& scan, Size channel, const std::uint8_t* mask) {
  Size count = 0;
  double total = 0, squares = 0;
  each_voxel(scan, channel, mask, [&](float value) {
    ++count;
    total += value;
  });
  const double mean = total / std::max<Size>(count, 1);
  each_voxel(scan, channel, mask, [&](float value) {
    const float difference = value - static_cast<float>(mean);
    squares += difference * difference;
  });
  return {mean, std::sqrt(squares / std::max<Size>(count, 1))};
}

std::pair<float, float> extremes(const ScanView& scan, Size channel) {
  float low = std::numeric_limits<float>::infinity(), high = -low;
  each_voxel(scan, channel, nullptr, [&](float value) {
    low = std::min(low, value);
    high = std::max(high, value);
  });
  return {low, high};
}

}  // namespace

float Normalization::operator()(float value) const {
  value = std::min(std::max(value, low), high);
  return (value - shift) / scale;
}

Normalization choose_normalization(const NormalizationScheme& scheme, const ScanView& scan, Size channel,
                                   const std::vector<std::uint8_t>& mask) {
  Normalization chosen;
  if (scheme.scheme == "CTNormalization") {
    chosen.low = static_cast<float>(scheme.low);
    chosen.high = static_cast<float>(scheme.high);
    chosen.shift = static_cast<float>(scheme.mean);
    chosen.scale = static_cast<float>(std::max(scheme.std, EPSILON));
  } else if (scheme.scheme == "ZScoreNormalization") {
    const auto [mean, deviation] = statistics(scan, channel, scheme.use_mask ? mask.data() : nullptr);
    chosen.shift = static_cast<float>(mean);
    chosen.scale = static_cast<float>(std::max(deviation, EPSILON));
    chosen.masked = scheme.use_mask;
  } else if (scheme.scheme == "RescaleTo01Normalization") {
    const auto [low, high] = extremes(scan, channel);
    chosen.shift = low;
    chosen.scale = static_cast<float>(std::max(static_cast<double>(high) - low, EPSILON));
  } else if (scheme.scheme == "RGBTo01Normalization") {
    const auto [low, high] = extremes(scan, channel);
    if (low < 0 || high > 255)
      throw Error(NNTURBO_BAD_SCAN, "an RGB channel must hold values from 0 to 255, got " +
                                        listed(std::array<float, 2>{low, high}) +
                                        "; this model was trained on colour images");
    chosen.scale = 255;
  }
  return chosen;
}

Array normalized_planes(const ScanView& scan, const std::vector<Normalization>& normalizations,
                        const std::vector<std::uint8_t>& mask, Size start, Size stop) {
  const Size height = scan.shape[1], width = scan.shape[2];
  Array planes(scan.channels, {stop - start, height, width});
  parallel(scan.channels * (stop - start), [&](Size task) {
    const Size channel = task / (stop - start), z = start + task % (stop - start);
    const Normalization& normalize = normalizations[channel];
    for (Size y = 0; y < height; ++y) {
      float* line = planes.plane(channel, z - start) + y * width;
      scan.read_line(channel, z, y, line);
      for (Size x = 0; x < width; ++x) line[x] = normalize(line[x]);
      if (!normalize.masked) continue;
      const std::uint8_t* inside = &mask[(z * height + y) * width];
      for (Size x = 0; x < width; ++x) line[x] = inside[x] ? line[x] : 0;
    }
  });
  return planes;
}

Limits normalized_range(const ScanView& scan, const std::vector<Normalization>& normalizations,
                        const std::vector<std::uint8_t>& mask, const GridMap& grid) {
  Limits limits(scan.channels, grid);
  if (grid.clip != Clip::none)
    for (Size z = 0; z < scan.shape[0]; ++z)
      limits.include(normalized_planes(scan, normalizations, mask, z, z + 1), z, grid);
  return limits;
}

}  // namespace nnturbo
