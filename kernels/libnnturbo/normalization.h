// Turns nnU-Net's normalization schemes into numbers for a scan: `(clamp(x, low, high) - shift) / scale`.

#pragma once

#include <limits>
#include <string>

#include "resampling.h"
#include "scan.h"

namespace nnturbo {

// How a plan says that one channel is normalised.
struct NormalizationScheme {
  std::string scheme;     // nnU-Net's name
  bool use_mask = false;  // measure and change only the non-zero region (z-score)
  double low = -std::numeric_limits<double>::infinity();  // clip bounds and statistics of training (CT)
  double high = std::numeric_limits<double>::infinity();
  double mean = 0, std = 1;
};

// The numbers for a scan, as they are rounded for computing; zero outside the mask of a masked channel.
struct Normalization {
  float low = -std::numeric_limits<float>::infinity(), high = std::numeric_limits<float>::infinity();
  float shift = 0, scale = 1;
  bool masked = false;

  float operator()(float value) const;
};

// Choose the numbers of a channel of a cropped scan; the mask is empty if no channel needs one.
Normalization choose_normalization(const NormalizationScheme& scheme, const ScanView& scan, Size channel,
                                   const std::vector<std::uint8_t>& mask);

// Normalised planes [start, stop) of a cropped scan.
Array normalized_planes(const ScanView& scan, const std::vector<Normalization>& normalizations,
                        const std::vector<std::uint8_t>& mask, Size start, Size stop);

// Least and greatest normalised values to which a map from the scan clips.
Limits normalized_range(const ScanView& scan, const std::vector<Normalization>& normalizations,
                        const std::vector<std::uint8_t>& mask, const GridMap& grid);

}  // namespace nnturbo
