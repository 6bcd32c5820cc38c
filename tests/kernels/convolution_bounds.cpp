// Calls every function of the kernels on tensors of exactly their size, in float32 and in int16 where that is multiplied,
// for sanitizers to watch; the instructions to use are the program's argument, and where they are not here it ends with
// status 77.

#include "../../kernels/cpu/kernels.h"
#include "../../kernels/cpu/program.h"

#include <array>
#include <cstdint>
#include <cstdio>
#include <vector>

namespace {

using nnturbo::kernels;
using nnturbo::Size;
using nnturbo::Weights;

std::vector<float> ones(Size count) { return std::vector<float>(count, 1.0f); }

Size panels(Size outputs) { return (outputs + kernels()->columns - 1) / kernels()->columns; }
Size whole_panels(Size outputs) { return panels(outputs) * kernels()->columns; }

// Weights of so many panels, of (parts, depth, columns) each.
class Panels {
 public:
  Panels(Size count, Size parts, Size depth, bool in_int16) : values_(ones(count * parts * depth * kernels()->columns)) {
    narrow(count, parts, depth, in_int16);
  }
  Panels(std::vector<float> values, Size count, Size depth, bool in_int16) : values_(std::move(values)) {
    narrow(count, 1, depth, in_int16);
  }
  Weights weights() const { return scales_.empty() ? Weights(values_.data()) : Weights(narrowed_.data(), scales_.data()); }

 private:
  void narrow(Size count, Size parts, Size depth, bool in_int16) {
    if (!in_int16) return;
    narrowed_.resize(values_.size());
    scales_.resize(count * kernels()->columns);
    kernels()->narrow_panels(count, parts, depth, values_.data(), narrowed_.data(), scales_.data());
  }

  std::vector<float> values_, scales_;
  std::vector<std::int16_t> narrowed_;
};

Panels transformed(Size taps, Size inputs, Size outputs, bool in_int16) {
  const Size axes = taps == 3 && !in_int16 ? 3 : 2, rest = in_int16 ? taps : 1;
  auto made = ones(kernels()->weights_size(axes, rest, inputs, outputs));
  kernels()->transform_weights(axes, rest, inputs, outputs, ones(outputs * inputs * taps * 9).data(), made.data());
  const Size count = made.size() / (rest * inputs * kernels()->columns);
  return Panels(std::move(made), count, rest * inputs, in_int16);
}

void convolve(const std::array<Size, 3>& size, Size taps, bool in_int16) {
  const Size inputs = kernels()->lanes, outputs = kernels()->columns + inputs, voxels = size[0] * size[1] * size[2];
  const auto bias = ones(outputs), one = ones(voxels * inputs), other = ones(voxels * inputs);
  auto out = ones(voxels * outputs);
  const Panels weight = transformed(taps, 2 * inputs, outputs, in_int16);
  kernels()->convolve(taps, size[0], size[1], size[2], one.data(), inputs, other.data(), inputs, outputs,
                      weight.weights(), bias.data(), out.data(), nullptr, 0, nullptr, nullptr, nullptr);
  // From coarser voxels, and over the last input.
  const Size stride[3] = {2, 1, 3}, finer[3] = {24 * size[0], size[1], 3 * size[2]}, few = in_int16 ? inputs : 5;
  const auto coarse = ones(12 * voxels * few);
  const Panels spread(6 * panels(inputs), 1, few, in_int16), square = transformed(taps, 2 * inputs, inputs, in_int16);
  auto over = ones(72 * voxels * inputs);
  kernels()->convolve(taps, finer[0], finer[1], finer[2], nullptr, inputs, over.data(), inputs, inputs,
                      square.weights(), bias.data(), over.data(), coarse.data(), few, stride, spread.weights(),
                      bias.data());
}

void convolve_directly(const std::array<Size, 3>& size, Size taps, Size step, bool in_int16) {
  const Size outputs = kernels()->columns + kernels()->lanes, voxels = size[0] * size[1] * size[2];
  const Size all_taps[3] = {taps, 3, taps}, stride[3] = {step, 1, step}, inputs = in_int16 ? kernels()->lanes : 3;
  Size results = 1;
  for (int axis = 0; axis < 3; ++axis)
    results *= (size[axis] + 2 * (all_taps[axis] / 2) - all_taps[axis]) / stride[axis] + 1;
  const auto from = ones(voxels * inputs), bias = ones(outputs);
  const Panels weight(panels(outputs), 3 * taps, taps * inputs, in_int16);
  auto out = ones(results * outputs);
  kernels()->convolve_directly(size.data(), all_taps, stride, inputs, outputs, from.data(), weight.weights(),
                               bias.data(), out.data());
  auto fine = ones(voxels * step * step * outputs);
  const Panels spread(step * step * panels(outputs), 1, inputs, in_int16);
  kernels()->spread(size.data(), stride, inputs, outputs, from.data(), spread.weights(), bias.data(), fine.data());
}

void convolve_along_z(const std::array<Size, 3>& size, Size taps, Size step) {
  const Size inputs = kernels()->lanes, outputs = kernels()->columns + inputs, voxels = size[0] * size[1] * size[2];
  const Size all_taps[3] = {3, taps, taps}, stride[3] = {1, step, step};
  Size results = size[0];
  for (int axis = 1; axis < 3; ++axis) results *= (size[axis] - 1) / step + 1;
  const auto from = ones(voxels * inputs), bias = ones(outputs);
  auto weight = ones(kernels()->weights_size(1, taps * taps, inputs, outputs)), out = ones(results * outputs);
  kernels()->transform_weights(1, taps * taps, inputs, outputs, ones(outputs * inputs * 3 * taps * taps).data(),
                               weight.data());
  kernels()->convolve_along_z(size.data(), all_taps, stride, inputs, outputs, from.data(), weight.data(), bias.data(),
                              out.data());
}

void check(const std::array<Size, 3>& size, bool in_int16) {
  for (Size taps : {1, 3}) convolve(size, taps, in_int16);
  for (Size taps : {1, 3, 5})
    for (Size step : {1, 2, 3}) convolve_directly(size, taps, step, in_int16);
}

void check_rest(const std::array<Size, 3>& size) {
  for (Size taps : {1, 3, 5, 31})
    for (Size step : {1, 2, 3})
      if (step <= taps) convolve_along_z(size, taps, step);
  const Size inputs = kernels()->lanes, outputs = kernels()->columns + inputs, voxels = size[0] * size[1] * size[2];
  auto normalised = ones(voxels * outputs), logits = ones(voxels * 5);
  const auto bias = ones(outputs), residual = ones(voxels * outputs), weight = ones(inputs * whole_panels(5));
  kernels()->normalise(voxels, outputs, bias.data(), bias.data(), 1e-5f, residual.data(), 0.01f, normalised.data());
  kernels()->project(voxels, inputs, 5, ones(voxels * inputs).data(), weight.data(), ones(whole_panels(5)).data(),
                     logits.data());
}

}  // namespace

int main(int, char** arguments) {
  if (nnturbo_use(arguments[1])) return 77;
  const nnturbo::Threads working(3);
  for (const auto& size : {std::array<Size, 3>{1, 1, 1}, {2, 3, 5}, {5, 4, 13}, {9, 7, 26}, {4, 8, 6}}) {
    check(size, false);
    if (nnturbo_multiplies_int16()) check(size, true);
    check_rest(size);
  }
  for (const auto& size : {std::array<Size, 3>{2, 3, 75}, {1, 9, 41}}) {  // of several parts along x
    check(size, false);
    if (nnturbo_multiplies_int16()) check(size, true);
    check_rest(size);
  }
  std::puts("done");
}
