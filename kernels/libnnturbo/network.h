// A network, ready to run.

#pragma once

#include "array.h"

namespace nnturbo {

class Network {
 public:
  virtual ~Network() = default;

  // Run a tile (C, *patch), averaging over the model's folds.
  //   seg_logits    (K, *patch)
  //   class_logits  (S); null for networks without a classification head
  virtual void run(const float* tile, float* seg_logits, float* class_logits) const = 0;
};

}  // namespace nnturbo
