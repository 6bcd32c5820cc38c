// Calls every function of the kernels on tensors of exactly their size, for sanitizers to watch; the instructions to use
// are the program's argument, and where they are not here it ends with status 77.

#include "../../kernels/cpu/kernels.h"
#include "../../kernels/cpu/program.h"

#include <array>
#include <cstdint>
#include <cstdio>
#include <vector>

namespace {

using nnturbo::kernels;
using nnturbo::Size;

std::vector<float> ones(std::int64_t count) { return std::vector<float>(count, 1.0f); }

std::int64_t whole_panels(std::int64_t outputs) {
  const std::int64_t columns = kernels()->columns;
  return (outputs + columns - 1) / columns * columns;
}

}  // namespace

int main(int, char** arguments) {
  if (nnturbo_use(arguments[1])) return 77;
  const nnturbo::Threads working(3);
  const std::int64_t inputs = kernels()->lanes, outputs = kernels()->columns + inputs;
  for (const auto& size : {std::array<std::int64_t, 3>{1, 1, 1}, {2, 3, 5}, {5, 4, 13}, {9, 7, 26}, {4, 8, 6}}) {
    const std::int64_t voxels = size[0] * size[1] * size[2];
    const auto bias = ones(outputs);
    for (std::int64_t taps : {1, 3}) {
      const auto one = ones(voxels * inputs), other = ones(voxels * inputs), weight = ones(outputs * 2 * inputs * taps * 9);
      auto transformed = ones(kernels()->weights_size(taps, 2 * inputs, outputs)), out = ones(voxels * outputs);
      kernels()->transform_weights(taps, 2 * inputs, outputs, weight.data(), transformed.data());
      kernels()->convolve(taps, size[0], size[1], size[2], one.data(), inputs, other.data(), inputs, outputs,
                       transformed.data(), bias.data(), out.data(), nullptr, 0, nullptr, nullptr, nullptr);
      // From coarser voxels, and over the last input.
      const std::int64_t stride[3] = {2, 1, 3}, finer[3] = {24 * size[0], size[1], 3 * size[2]};
      const auto coarse = ones(12 * voxels * 5), spread = ones(6 * whole_panels(inputs) * 5);
      auto over = ones(72 * voxels * inputs);
      kernels()->transform_weights(taps, 2 * inputs, inputs, weight.data(), transformed.data());
      kernels()->convolve(taps, finer[0], finer[1], finer[2], nullptr, inputs, over.data(), inputs, inputs,
                       transformed.data(), bias.data(), over.data(), coarse.data(), 5, stride, spread.data(),
                       bias.data());
    }
    for (std::int64_t taps : {1, 3, 5})
      for (std::int64_t step : {1, 2, 3}) {
        const std::int64_t all_taps[3] = {taps, 3, taps}, stride[3] = {step, 1, step};
        std::int64_t results = 1;
        for (int axis = 0; axis < 3; ++axis)
          results *= (size[axis] + 2 * (all_taps[axis] / 2) - all_taps[axis]) / stride[axis] + 1;
        const auto from = ones(voxels * 3), weight = ones(whole_panels(outputs) * 3 * taps * 3 * taps);
        auto out = ones(results * outputs);
        kernels()->convolve_directly(size.data(), all_taps, stride, 3, outputs, from.data(), weight.data(), bias.data(),
                                  out.data());
        auto fine = ones(voxels * step * step * outputs);
        const auto spread = ones(step * step * whole_panels(outputs) * 3);
        kernels()->spread(size.data(), stride, 3, outputs, from.data(), spread.data(), bias.data(), fine.data());
      }
    auto normalised = ones(voxels * outputs), logits = ones(voxels * 5);
    const auto residual = ones(voxels * outputs), weight = ones(inputs * whole_panels(5));
    kernels()->normalise(voxels, outputs, bias.data(), bias.data(), 1e-5f, residual.data(), 0.01f, normalised.data());
    kernels()->project(voxels, inputs, 5, ones(voxels * inputs).data(), weight.data(),
                    ones(whole_panels(5)).data(), logits.data());
  }
  std::puts("done");
}
