// Turns finished planes of logits into labels on the scan's own grid.

#pragma once

#include <deque>

#include "preprocessing.h"

namespace nnturbo {

class LabelPlanes {
 public:
  LabelPlanes(const Case& scan, const Plan& plan);

  // Take the planes [first, last) of (K, Z, Y, X) with so much padding before them along y and x; planes come in
  // ascending z. Each plane of the scan is written as soon as its input planes have come.
  void add(const Array& logits, Size first, Size last, const Triple& before);

  // Labels on the scan's grid and axes, in the bytes of `LabelScheme::type`; (Z, Y, X).
  std::vector<std::uint8_t> take() { return std::move(labels_); }

 private:
  void add_in_plane(const Array& logits, Size first, Size last, const Triple& before);
  void make_planes();
  void add_to_whole(const Array& logits, Size first, Size last, const Triple& before);
  void label_line(Size z, Size y, const std::vector<const float*>& planes, const float* weights);

  const Case& case_;
  const LabelScheme& scheme_;
  std::vector<std::uint8_t> labels_;
  std::array<Size, 3> steps_{};  // in the labels, along the network's axes
  Size first_place_ = 0;         // of the crop's first voxel
  std::deque<std::vector<float>> held_;  // (K, Y, X) of the scan's grid along y and x, of planes that wait for others
  Size held_from_ = 0, made_ = 0;
  Array whole_;  // all logits, where a map clips
  Size come_ = 0;
};

// Millilitres of each label or region.
std::vector<double> volumes_ml(const std::vector<std::uint8_t>& labels, const LabelScheme& scheme,
                               const Spacing& spacing);

}  // namespace nnturbo
