// Combines a multi-task network's class logits of tiles into one answer per case.

#pragma once

#include "plan.h"

namespace nnturbo {

// A case's logits are `sum_t w[t] c[t] / sum_t w[t]`: c[t] is the mean of the class logits over the views of tile t, and
// w[t] the mean probability of a voxel of these views to belong to the focus. If all weights are 0, every tile has the
// same weight. Padding is part of a tile.
class Votes {
 public:
  Votes(const ClassificationScheme& scheme, bool regions, Size views)
      : scheme_(scheme), regions_(regions), views_(views), latest_(scheme.class_names.size()) {}

  // Where the network puts the class logits of the next view.
  float* next_logits() { return latest_.data(); }
  // Count that view; all views of one tile come before those of the next. `logits` are (K, *patch).
  void add(const Array& logits);

  // Probabilities of the classes, adding up to 1; throws Error where class logits are not finite.
  std::vector<double> probabilities() const;

 private:
  const ClassificationScheme& scheme_;
  const bool regions_;
  const Size views_;
  std::vector<float> latest_;
  std::vector<std::vector<double>> logits_;  // of each view
  std::vector<double> weights_;
};

// Mean probability of a voxel to belong to the focus: probabilities of labels are added; of overlapping regions, the
// greatest is taken.
float mean_focus(const Array& logits, const std::vector<Size>& channels, bool regions);

}  // namespace nnturbo
