// Plain loops in float64 that the functions of the kernels are compared with; for programs of one file.

#pragma once

#include "../../kernels/cpu/kernels.h"

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

namespace {

using nnturbo::kernels;
using nnturbo::Size;

using Floats = std::vector<float>;
using Doubles = std::vector<double>;

std::mt19937 luck(20261126);

Floats noise(Size count) {
  std::normal_distribution<float> normal;
  Floats values(count);
  for (float& value : values) value = normal(luck);
  return values;
}

// A convolution; maps are channels last, weights (outputs, inputs, z, y, x).
struct Shape {
  Size size[3], taps[3], stride[3], inputs, outputs;
  Size out(int axis) const { return (size[axis] + 2 * (taps[axis] / 2) - taps[axis]) / stride[axis] + 1; }
  Size results() const { return out(0) * out(1) * out(2) * outputs; }
};

// Call `work` with the places of each result, and of a value and a weight that are multiplied for it.
template <class Work>
void each_product(const Shape& of, const Work& work) {
  Size result = 0;
  for (Size z = 0; z < of.out(0); ++z)
    for (Size y = 0; y < of.out(1); ++y)
      for (Size x = 0; x < of.out(2); ++x)
        for (Size output = 0; output < of.outputs; ++output, ++result)
          for (Size i = 0; i < of.taps[0]; ++i)
            for (Size j = 0; j < of.taps[1]; ++j)
              for (Size k = 0; k < of.taps[2]; ++k) {
                const Size at[3] = {z * of.stride[0] + i - of.taps[0] / 2, y * of.stride[1] + j - of.taps[1] / 2,
                                    x * of.stride[2] + k - of.taps[2] / 2};
                if (at[0] < 0 || at[1] < 0 || at[2] < 0 || at[0] >= of.size[0] || at[1] >= of.size[1] ||
                    at[2] >= of.size[2])
                  continue;
                for (Size input = 0; input < of.inputs; ++input)
                  work(result, ((at[0] * of.size[1] + at[1]) * of.size[2] + at[2]) * of.inputs + input,
                       (((output * of.inputs + input) * of.taps[0] + i) * of.taps[1] + j) * of.taps[2] + k);
              }
}

template <class Number>
Doubles convolved(const Shape& of, const std::vector<Number>& from, const std::vector<Number>& weight,
                  const Floats& bias) {
  Doubles to(of.results());
  for (Size result = 0; result < of.results(); ++result) to[result] = bias[result % of.outputs];
  each_product(of, [&](Size result, Size value, Size other) { to[result] += double(from[value]) * weight[other]; });
  return to;
}

// Each voxel becomes `stride` voxels: an instance of a convolution per place; weights (stride, outputs, inputs).
template <class Number>
Doubles spread(const std::vector<Number>& from, const Size size[3], const Size stride[3], Size inputs, Size outputs,
               const std::vector<Number>& weight, const Floats& bias) {
  Doubles to;
  for (Size z = 0; z < size[0] * stride[0]; ++z)
    for (Size y = 0; y < size[1] * stride[1]; ++y)
      for (Size x = 0; x < size[2] * stride[2]; ++x) {
        const Size place = (z % stride[0] * stride[1] + y % stride[1]) * stride[2] + x % stride[2];
        const Size voxel = (z / stride[0] * size[1] + y / stride[1]) * size[2] + x / stride[2];
        for (Size output = 0; output < outputs; ++output) {
          double sum = bias[output];
          for (Size input = 0; input < inputs; ++input)
            sum += double(from[voxel * inputs + input]) * weight[(place * outputs + output) * inputs + input];
          to.push_back(sum);
        }
      }
  return to;
}

Floats joined(const Floats& one, Size channels_one, const Floats& other, Size channels_other) {
  Floats both;
  for (std::size_t voxel = 0; voxel < one.size() / channels_one; ++voxel) {
    both.insert(both.end(), &one[voxel * channels_one], &one[voxel * channels_one] + channels_one);
    both.insert(both.end(), &other[voxel * channels_other], &other[voxel * channels_other] + channels_other);
  }
  return both;
}

// From (outputs, inputs, taps) to (panels, taps, inputs, columns).
Floats panels(const Floats& weight, Size outputs, Size inputs, Size taps) {
  const Size columns = kernels()->columns, count = (outputs + columns - 1) / columns;
  Floats packed(count * taps * inputs * columns, 0.0f);
  for (Size output = 0; output < outputs; ++output)
    for (Size input = 0; input < inputs; ++input)
      for (Size tap = 0; tap < taps; ++tap)
        packed[((output / columns * taps + tap) * inputs + input) * columns + output % columns] =
            weight[(output * inputs + input) * taps + tap];
  return packed;
}

// Panels of (places, outputs, inputs), one place after the other.
Floats spread_panels(const Floats& weight, Size places, Size outputs, Size inputs) {
  Floats packed;
  for (Size place = 0; place < places; ++place) {
    const Floats here(&weight[place * outputs * inputs], &weight[place * outputs * inputs] + outputs * inputs);
    const Floats panel = panels(here, outputs, inputs, 1);
    packed.insert(packed.end(), panel.begin(), panel.end());
  }
  return packed;
}

}  // namespace
