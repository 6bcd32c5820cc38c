// The classification heads of engine/model/heads.py: from features and logits of a tile to class logits.

#pragma once

#include "operations.h"

#include <vector>

namespace nnturbo {

class Head {
 public:
  // Throws std::invalid_argument where its tensors do not fit the features.
  Head(const nnturbo_head& given, const std::vector<Map>& maps, Size logits);

  // For each tile.
  void run(const Memory& memory, float* class_logits) const;

  Size classes() const { return classes_; }

 private:
  using Doubles = std::vector<double>;
  using Numbers = std::vector<float>;

  Doubles answer(const Memory& memory, Size image) const;
  Numbers focus(const float* logits, const Map& map) const;
  void pool(const Map& map, const float* features, const Numbers& inside, Doubles& pooled) const;
  void attend(const Map& map, const float* features, const Numbers& inside, Size first, Doubles& pooled) const;

  Size kind_, logits_, classes_;
  bool regions_;
  std::vector<Size> features_, focus_channels_;
  std::vector<Numbers> tensors_;
};

}  // namespace nnturbo
