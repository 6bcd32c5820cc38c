// Compares every function of the kernels with plain loops in float64, for processors and systems without torch; the
// instructions to use are the program's argument, and where they are not here it ends with status 77.

#include "../../kernels/cpu/program.h"
#include "plain_loops.h"

#include <cstdio>

namespace {

int faults = 0;

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

void check(const Size size[3]) {
  const Size voxels = size[0] * size[1] * size[2], lanes = kernels()->lanes, outputs = kernels()->columns + lanes;
  const Floats bias = noise(outputs);
  for (Size taps : {1, 3}) {
    const Shape of{{size[0], size[1], size[2]}, {taps, 3, 3}, {1, 1, 1}, lanes + outputs, outputs};
    const Floats one = noise(voxels * lanes), weight = noise(outputs * (lanes + outputs) * taps * 9);
    const Size axes = taps == 3 ? 3 : 2;
    Floats other = noise(voxels * outputs), transformed(kernels()->weights_size(axes, 1, lanes + outputs, outputs));
    kernels()->transform_weights(axes, 1, lanes + outputs, outputs, weight.data(), transformed.data());
    const Doubles expected = convolved(of, joined(one, lanes, other, outputs), weight, bias);
    Floats got(voxels * outputs);
    kernels()->convolve(taps, size[0], size[1], size[2], one.data(), lanes, other.data(), outputs, outputs,
                     transformed.data(), bias.data(), got.data(), nullptr, 0, nullptr, nullptr, nullptr);
    compare("convolve", got, expected);
    kernels()->convolve(taps, size[0], size[1], size[2], one.data(), lanes, other.data(), outputs, outputs,
                     transformed.data(), bias.data(), other.data(), nullptr, 0, nullptr, nullptr, nullptr);
    compare("convolve over its input", other, expected);
  }
  for (const auto& taps : {std::vector<Size>{3, 3, 3}, {3, 1, 1}, {3, 1, 5}, {3, 31, 3}})
    for (const auto& stride : {std::vector<Size>{1, 2, 2}, {1, 1, 1}, {1, 3, 1}}) {
      if (stride[1] > taps[1] || stride[2] > taps[2]) continue;
      const Size in_plane = taps[1] * taps[2];
      const Shape of{{size[0], size[1], size[2]}, {3, taps[1], taps[2]}, {1, stride[1], stride[2]}, 2 * lanes, outputs};
      const Floats from = noise(voxels * 2 * lanes), weight = noise(outputs * 2 * lanes * 3 * in_plane);
      Floats transformed(kernels()->weights_size(1, in_plane, 2 * lanes, outputs)), got(of.results());
      kernels()->transform_weights(1, in_plane, 2 * lanes, outputs, weight.data(), transformed.data());
      kernels()->convolve_along_z(size, taps.data(), stride.data(), 2 * lanes, outputs, from.data(), transformed.data(),
                                  bias.data(), got.data());
      compare("convolve_along_z", got, convolved(of, from, weight, bias));
    }
  const Size taps[3] = {3, 1, 5}, stride[3] = {2, 1, 3};
  const Floats from = noise(voxels * 5), weight = noise(outputs * 5 * 15), of_spread = noise(6 * outputs * 5);
  const Shape strided{{size[0], size[1], size[2]}, {3, 1, 5}, {2, 1, 3}, 5, outputs};
  const Doubles expected = convolved(strided, from, weight, bias);
  Floats got(expected.size());
  kernels()->convolve_directly(size, taps, stride, 5, outputs, from.data(), panels(weight, outputs, 5, 15).data(),
                            bias.data(), got.data());
  compare("convolve_directly", got, expected);
  const Doubles finer = spread(from, size, stride, 5, outputs, of_spread, bias);
  Floats fine(finer.size());
  kernels()->spread(size, stride, 5, outputs, from.data(), spread_panels(of_spread, 6, outputs, 5).data(), bias.data(),
                 fine.data());
  compare("spread", fine, finer);
  const Shape pointwise{{size[0], size[1], size[2]}, {1, 1, 1}, {1, 1, 1}, 5, 3};
  const Doubles logits = convolved(pointwise, from, weight, bias);
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
  for (const auto& size : {std::vector<Size>{2, 3, 5}, {5, 4, 13}, {9, 7, 26}, {3, 5, 75}}) check(size.data());
  std::printf("%s: %d faults\n", nnturbo_variant(), faults);
  return faults != 0;
}
