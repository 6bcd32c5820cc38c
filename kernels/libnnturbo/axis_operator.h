// A linear map along one axis of a volume, stored as a band; every resampling function has this form here.

#pragma once

#include "array.h"

namespace nnturbo {

// `out[i] = sum over t of weights[i * taps + t] * data[first[i] + t]`.
struct AxisOperator {
  Size n_in = 0, taps = 1;
  std::vector<Size> first;  // ascending
  std::vector<float> weights;

  Size n_out() const { return static_cast<Size>(first.size()); }
  // Whether each output is one of the inputs, unchanged.
  bool is_selection() const;
  bool is_identity() const;
  // Inputs of the outputs [start, stop).
  Range inputs_of(Size start, Size stop) const { return {first[start], first[stop - 1] + taps}; }

  static AxisOperator identity(Size n);
};

// A number at a column of a matrix.
struct Entry {
  Size column;
  double weight;
};

// The narrowest band that holds the given entries of each row; columns may repeat, and are clamped to the axis. Sums
// below `drop_below` are left out.
AxisOperator band_of_entries(Size n_in, const std::vector<std::vector<Entry>>& rows, double drop_below);

// Apply an operator along an axis that is not the densest: `count` numbers lie together, and the next input `step`
// further. Writes outputs [start, stop); the first input in `from` is number `offset`.
void apply_across(const AxisOperator& axis, Size start, Size stop, Size offset, const float* from, Size step,
                  Size count, float* to);

// Apply an operator along the densest axis of `lines` lines; `scratch` has as many floats as `scratch_along` says.
void apply_along(const AxisOperator& axis, Size lines, const float* from, float* scratch, float* to);
Size scratch_along(const AxisOperator& axis);

}  // namespace nnturbo
