#include "voting.h"

#include <algorithm>
#include <cmath>

#include "error.h"

namespace nnturbo {

void Votes::add(const Array& logits) {
  logits_.emplace_back(latest_.begin(), latest_.end());
  weights_.push_back(mean_focus(logits, scheme_.focus_channels, regions_));
}

std::vector<double> Votes::probabilities() const {
  const std::size_t tiles = weights_.size() / views_, classes = latest_.size();
  double total = 0;
  for (const double weight : weights_) total += weight;
  const bool alike = total == 0;
  if (alike) total = static_cast<double>(weights_.size());
  std::vector<double> mean(classes);
  for (std::size_t tile = 0; tile < tiles; ++tile) {
    double weight = 0;
    for (Size view = 0; view < views_; ++view) weight += alike ? 1 : weights_[tile * views_ + view];
    for (std::size_t i = 0; i < classes; ++i) {
      double of_tile = 0;
      for (Size view = 0; view < views_; ++view) of_tile += logits_[tile * views_ + view][i];
      mean[i] += weight / total * (of_tile / static_cast<double>(views_));
    }
  }
  if (!std::all_of(mean.begin(), mean.end(), [](double logit) { return std::isfinite(logit); }))
    throw Error(NNTURBO_BAD_NETWORK,
                "the network's class logits must be finite, got NaN or infinity: its weights are damaged");
  const double greatest = *std::max_element(mean.begin(), mean.end());
  double sum = 0;
  for (double& value : mean) sum += value = std::exp(value - greatest);
  for (double& value : mean) value /= sum;
  return mean;
}

float mean_focus(const Array& logits, const std::vector<Size>& channels, bool regions) {
  const Size voxels = logits.shape[0] * logits.plane_size();
  std::vector<double> of_plane(logits.shape[0]);
  parallel(logits.shape[0], [&](Size z) {
    for (Size at = z * logits.plane_size(); at < (z + 1) * logits.plane_size(); ++at) {
      const float* voxel = logits.values.data() + at;
      float shown = 0;
      if (regions) {
        for (const Size channel : channels) shown = std::max(shown, 1 / (1 + std::exp(-voxel[channel * voxels])));
      } else {
        float greatest = voxel[0], sum = 0;
        for (Size k = 1; k < logits.channels; ++k) greatest = std::max(greatest, voxel[k * voxels]);
        for (Size k = 0; k < logits.channels; ++k) sum += std::exp(voxel[k * voxels] - greatest);
        for (const Size channel : channels) shown += std::exp(voxel[channel * voxels] - greatest) / sum;
      }
      of_plane[z] += shown;
    }
  });
  double total = 0;
  for (const double shown : of_plane) total += shown;
  return static_cast<float>(total / static_cast<double>(voxels));
}

}  // namespace nnturbo
