// Compares every function of the kernels with plain loops in float64, for processors and systems without torch; the
// instructions to use are the program's argument, and where they are not here it ends with status 77.

#include "../../kernels/cpu/kernels.h"
#include "../../kernels/cpu/program.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

namespace {

using nnturbo::kernels;
using nnturbo::Size;

using Floats = std::vector<float>;
using Doubles = std::vector<double>;

std::mt19937 luck(20261126);
int faults = 0;

Floats noise(Size count) {
  std::normal_distribution<float> normal;
  Floats values(count);
  for (float& value : values) value = normal(luck);
  return values;
}

void compare(const char* what, const Floats& got, const Doubles& expected) {
  double furthest = 0, scale = 0;
  for (std::size_t index = 0; index < expected.size(); ++index) {
    furthest = std::max(furthest, std::fabs(got[index] - expected[index]));
    scale = std::max(scale, std::fabs(expected[index]));
  }
  if (!(furthest <= 3e-5 * scale) || got.size() != expected.size()) {
    std::printf("%s is off by %g of %g\n", what, furthest, scale);
    ++faults;
  }
}

// Channels last; weights (outputs, inputs, z, y, x).
Doubles convolved(const Floats& from, const Size size[3], Size inputs, const Floats& weight, const Size taps[3],
                  const Size stride[3], const Floats& bias, Size outputs) {
  Size out[3];
  for (int axis = 0; axis < 3; ++axis) out[axis] = (size[axis] + 2 * (taps[axis] / 2) - taps[axis]) / stride[axis] + 1;
  Doubles to;
  for (Size z = 0; z < out[0]; ++z)
    for (Size y = 0; y < out[1]; ++y)
      for (Size x = 0; x < out[2]; ++x)
        for (Size output = 0; output < outputs; ++output) {
          double sum = bias[output];
          for (Size i = 0; i < taps[0]; ++i)
            for (Size j = 0; j < taps[1]; ++j)
              for (Size k = 0; k < taps[2]; ++k) {
                const Size at[3] = {z * stride[0] + i - taps[0] / 2, y * stride[1] + j - taps[1] / 2,
                                    x * stride[2] + k - taps[2] / 2};
                if (at[0] < 0 || at[1] < 0 || at[2] < 0 || at[0] >= size[0] || at[1] >= size[1] || at[2] >= size[2])
                  continue;
                for (Size input = 0; input < inputs; ++input)
                  sum += double(from[((at[0] * size[1] + at[1]) * size[2] + at[2]) * inputs + input]) *
                         weight[(((output * inputs + input) * taps[0] + i) * taps[1] + j) * taps[2] + k];
              }
          to.push_back(sum);
        }
  return to;
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

Floats joined(const Floats& one, Size channels_one, const Floats& other, Size channels_other) {
  Floats both;
  for (std::size_t voxel = 0; voxel < one.size() / channels_one; ++voxel) {
    both.insert(both.end(), &one[voxel * channels_one], &one[voxel * channels_one] + channels_one);
    both.insert(both.end(), &other[voxel * channels_other], &other[voxel * channels_other] + channels_other);
  }
  return both;
}

// Each voxel becomes `stride` voxels: an instance of a convolution per place; weights (stride, outputs, inputs).
Doubles spread(const Floats& from, const Size size[3], const Size stride[3], Size inputs, Size outputs,
               const Floats& weight, const Floats& bias) {
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

void check(const Size size[3]) {
  const Size voxels = size[0] * size[1] * size[2], lanes = kernels()->lanes, outputs = kernels()->columns + lanes;
  const Size one_step[3] = {1, 1, 1};
  const Floats bias = noise(outputs);
  for (Size taps : {1, 3}) {
    const Size all_taps[3] = {taps, 3, 3};
    const Floats one = noise(voxels * lanes), weight = noise(outputs * (lanes + outputs) * taps * 9);
    Floats other = noise(voxels * outputs), transformed(kernels()->weights_size(taps, lanes + outputs, outputs));
    kernels()->transform_weights(taps, lanes + outputs, outputs, weight.data(), transformed.data());
    const Doubles expected = convolved(joined(one, lanes, other, outputs), size, lanes + outputs, weight, all_taps,
                                       one_step, bias, outputs);
    Floats got(voxels * outputs);
    kernels()->convolve(taps, size[0], size[1], size[2], one.data(), lanes, other.data(), outputs, outputs,
                     transformed.data(), bias.data(), got.data(), nullptr, 0, nullptr, nullptr, nullptr);
    compare("convolve", got, expected);
    kernels()->convolve(taps, size[0], size[1], size[2], one.data(), lanes, other.data(), outputs, outputs,
                     transformed.data(), bias.data(), other.data(), nullptr, 0, nullptr, nullptr, nullptr);
    compare("convolve over its input", other, expected);
  }
  const Size taps[3] = {3, 1, 5}, stride[3] = {2, 1, 3};
  const Floats from = noise(voxels * 5), weight = noise(outputs * 5 * 15), of_spread = noise(6 * outputs * 5);
  const Doubles expected = convolved(from, size, 5, weight, taps, stride, bias, outputs);
  Floats got(expected.size());
  kernels()->convolve_directly(size, taps, stride, 5, outputs, from.data(), panels(weight, outputs, 5, 15).data(),
                            bias.data(), got.data());
  compare("convolve_directly", got, expected);
  const Doubles finer = spread(from, size, stride, 5, outputs, of_spread, bias);
  Floats packed, fine(finer.size());
  for (Size place = 0; place < 6; ++place) {
    const Floats here(&of_spread[place * outputs * 5], &of_spread[place * outputs * 5] + outputs * 5);
    const Floats panel = panels(here, outputs, 5, 1);
    packed.insert(packed.end(), panel.begin(), panel.end());
  }
  kernels()->spread(size, stride, 5, outputs, from.data(), packed.data(), bias.data(), fine.data());
  compare("spread", fine, finer);
  const Doubles logits = convolved(from, size, 5, weight, one_step, one_step, bias, 3);
  Doubles planar(logits.size());
  for (Size voxel = 0; voxel < voxels; ++voxel)
    for (Size output = 0; output < 3; ++output) planar[output * voxels + voxel] = logits[voxel * 3 + output];
  Floats projected(planar.size()), padded(kernels()->columns, 0.0f);
  std::copy_n(bias.begin(), 3, padded.begin());
  kernels()->project(voxels, 5, 3, from.data(), panels(weight, 3, 5, 1).data(), padded.data(), projected.data());
  compare("project", projected, planar);
  Floats values = noise(voxels * outputs);
  const Floats residual = noise(voxels * outputs), scale = noise(outputs);
  Doubles normal(values.size());
  for (Size channel = 0; channel < outputs; ++channel) {
    double mean = 0, variance = 0;
    for (Size voxel = 0; voxel < voxels; ++voxel) mean += values[voxel * outputs + channel] / double(voxels);
    for (Size voxel = 0; voxel < voxels; ++voxel)
      variance += std::pow(values[voxel * outputs + channel] - mean, 2) / voxels;
    for (Size voxel = 0; voxel < voxels; ++voxel) {
      const Size at = voxel * outputs + channel;
      const double value =
          (values[at] - mean) / std::sqrt(variance + 1e-5) * scale[channel] + bias[channel] + residual[at];
      normal[at] = value > 0 ? value : 0.01 * value;
    }
  }
  kernels()->normalise(voxels, outputs, scale.data(), bias.data(), 1e-5f, residual.data(), 0.01f, values.data());
  compare("normalise", values, normal);
}

}  // namespace

int main(int, char** arguments) {
  if (nnturbo_use(arguments[1])) return 77;
  const nnturbo::Threads working(3);
  for (const auto& size : {std::vector<Size>{2, 3, 5}, {5, 4, 13}, {9, 7, 26}}) check(size.data());
  std::printf("%s: %d faults\n", nnturbo_variant(), faults);
  return faults != 0;
}
