// Packs and runs single operations.

#include "operations.h"

#include <cstring>

namespace nnturbo {
namespace {

constexpr Size VOXELS_AT_ONCE = 4096;

Size rounded(Size count, Size step) { return (count + step - 1) / step * step; }

Size product(const int64_t* sizes) { return sizes[0] * sizes[1] * sizes[2]; }

// Numbers with zeros behind them; zeros alone where none are given.
Floats filled_up(const nnturbo_tensor& given, Size count) {
  Floats made = Floats::zeros(count);
  std::copy_n(given.data, given.count, made.data());
  return made;
}

// Channels of a weight as they lie in one or two inputs, each of them filled up to whole vectors.
struct Inputs {
  Size channels[2], padded[2];
  Size in_memory() const { return padded[0] + padded[1]; }
  Size place(Size channel) const { return channel < channels[0] ? channel : channel - channels[0] + padded[0]; }
  Size count() const { return channels[0] + channels[1]; }
};

// From (outputs, inputs, taps) to (panels, taps, inputs, columns).
Floats panels(const float* weight, Size outputs, const Inputs& inputs, Size taps, Size columns) {
  const Size depth = inputs.in_memory();
  Floats made = Floats::zeros(rounded(outputs, columns) * taps * depth);
  in_parallel((outputs + columns - 1) / columns, [&](Size panel) {
    for (Size output = panel * columns; output < std::min(outputs, (panel + 1) * columns); ++output)
      for (Size input = 0; input < inputs.count(); ++input)
        for (Size tap = 0; tap < taps; ++tap)
          made[((panel * taps + tap) * depth + inputs.place(input)) * columns + output % columns] =
              weight[(output * inputs.count() + input) * taps + tap];
  });
  return made;
}

// From (inputs, outputs, positions) to (positions, panels, inputs, columns).
Floats spread_panels(const float* weight, Size outputs, const Inputs& inputs, Size positions, Size columns) {
  const Size depth = inputs.in_memory(), all_panels = rounded(outputs, columns) / columns;
  Floats made = Floats::zeros(positions * all_panels * depth * columns);
  in_parallel(inputs.count(), [&](Size input) {
    for (Size output = 0; output < outputs; ++output)
      for (Size position = 0; position < positions; ++position)
        made[((position * all_panels + output / columns) * depth + inputs.place(input)) * columns + output % columns] =
            weight[(input * outputs + output) * positions + position];
  });
  return made;
}

// From (outputs, inputs, three for each of so many axes, taps) to panels for each position.
Floats transformed(const float* weight, Size outputs, const Inputs& inputs, Size axes, Size taps,
                   const Kernels& kernels) {
  constexpr Size FACTORS[] = {1, 3, 9, 27};
  const Size depth = inputs.in_memory(), all_taps = FACTORS[axes] * taps, padded = rounded(outputs, kernels.lanes);
  Floats made(kernels.weights_size(axes, taps, depth, padded)), apart;
  if (depth != inputs.count() || padded != outputs) {
    apart = Floats::zeros(padded * depth * all_taps);
    for (Size output = 0; output < outputs; ++output)
      for (Size input = 0; input < inputs.count(); ++input)
        std::copy_n(weight + (output * inputs.count() + input) * all_taps, all_taps,
                    apart.data() + (output * depth + inputs.place(input)) * all_taps);
    weight = apart.data();
  }
  kernels.transform_weights(axes, taps, depth, padded, weight, made.data());
  return made;
}

}  // namespace

bool goes_along_z(const nnturbo_operation& operation) {
  const int64_t *taps = operation.taps, *stride = operation.stride;
  return operation.transformed &&
         (taps[1] != 3 || taps[2] != 3 || stride[0] != 1 || stride[1] != 1 || stride[2] != 1);
}

Map first_input(const nnturbo_operation& operation, const std::vector<Map>& maps, Size lanes) {
  Map map = maps[operation.inputs[0]];
  const Size positions = product(operation.upsampling);
  if (positions == 0) return map;
  map.channels = operation.upsampling_weight.count / (map.channels * positions);
  map.padded = rounded(map.channels, lanes);
  for (int axis = 0; axis < 3; ++axis) map.size[axis] *= operation.upsampling[axis];
  return map;
}

void Panels::narrow(Size parts, Size depth, const Kernels& kernels) {
  const Size columns = kernels.columns, count = numbers_.size() / (parts * depth * columns);
  in_int16_ = Values<std::int16_t>(numbers_.size());
  scales_ = Floats(count * columns);
  kernels.narrow_panels(count, parts, depth, numbers_.data(), in_int16_.data(), scales_.data());
  numbers_ = Floats();
}

Weights Panels::weights() const {
  return scales_.size() ? Weights(in_int16_.data(), scales_.data()) : Weights(numbers_.data());
}

Operation::Operation(const nnturbo_operation& given, const std::vector<Map>& maps, const Kernels& kernels)
    : kernels_(&kernels), of_(given), normalises_(given.scale.count > 0) {
  const Map &from = maps[of_.inputs[0]], &to = maps[of_.output];
  const Size columns = kernels.columns;
  const Inputs inputs{{from.channels, 0}, {from.padded, 0}};
  if (of_.kind == NNTURBO_CONVOLUTION) {
    pack_convolution(maps);
  } else if (of_.kind == NNTURBO_TRANSPOSED_CONVOLUTION) {
    weight_ = Panels(spread_panels(of_.weight.data, to.channels, inputs, product(of_.stride), columns));
    if (of_.in_int16) weight_.narrow(1, from.padded, kernels);
    bias_ = filled_up(of_.bias, rounded(to.channels, columns));
  } else if (of_.kind == NNTURBO_PROJECTION) {
    weight_ = Panels(panels(of_.weight.data, to.channels, inputs, 1, columns));
    bias_ = filled_up(of_.bias, rounded(to.channels, columns));
  }
  of_.weight = of_.bias = of_.scale = of_.shift = of_.upsampling_weight = of_.upsampling_bias = {};
}

void Operation::pack_convolution(const std::vector<Map>& maps) {
  const Map &from = maps[of_.inputs[0]], &to = maps[of_.output];
  const Size columns = kernels_->columns;
  finer_ = first_input(of_, maps, kernels_->lanes);
  if (product(of_.upsampling)) {
    const Inputs coarse{{from.channels, 0}, {from.padded, 0}};
    upsampling_weight_ = Panels(
        spread_panels(of_.upsampling_weight.data, finer_.channels, coarse, product(of_.upsampling), columns));
    if (of_.in_int16) upsampling_weight_.narrow(1, from.padded, *kernels_);
    upsampling_bias_ = filled_up(of_.upsampling_bias, rounded(finer_.channels, columns));
  }
  Inputs inputs{{finer_.channels, 0}, {finer_.padded, 0}};
  if (of_.inputs[1] >= 0) {
    inputs.channels[1] = maps[of_.inputs[1]].channels;
    inputs.padded[1] = maps[of_.inputs[1]].padded;
  }
  if (!of_.transformed) {
    weight_ = Panels(panels(of_.weight.data, to.channels, inputs, product(of_.taps), columns));
    if (of_.in_int16) weight_.narrow(of_.taps[0] * of_.taps[1], of_.taps[2] * inputs.in_memory(), *kernels_);
  } else if (goes_along_z(of_)) {
    weight_ = Panels(transformed(of_.weight.data, to.channels, inputs, 1, of_.taps[1] * of_.taps[2], *kernels_));
  } else {
    const bool along_x_too = of_.taps[0] == 3 && !of_.in_int16;
    const Size axes = along_x_too ? 3 : 2, taps = along_x_too ? 1 : of_.taps[0];
    weight_ = Panels(transformed(of_.weight.data, to.channels, inputs, axes, taps, *kernels_));
    if (of_.in_int16) weight_.narrow(1, taps * inputs.in_memory(), *kernels_);
  }
  bias_ = filled_up(of_.bias, rounded(to.channels, columns));
  if (normalises_) {
    scale_ = filled_up(of_.scale, to.padded);
    shift_ = filled_up(of_.shift, to.padded);
  }
}

Size Operation::weight_bytes() const {
  Size bytes = weight_.bytes() + upsampling_weight_.bytes();
  for (const Floats* each : {&bias_, &scale_, &shift_, &upsampling_bias_}) bytes += each->bytes();
  return bytes;
}

void Operation::compute(const Memory& memory) const {
  const Map &from = memory.maps[of_.inputs[0]], &to = memory.maps[of_.output];
  const Size size[3] = {from.size[0] * memory.images, from.size[1], from.size[2]};
  switch (of_.kind) {
    case NNTURBO_CONVOLUTION:
      return convolve(memory);
    case NNTURBO_TRANSPOSED_CONVOLUTION:
      return kernels_->spread(size, of_.stride, from.padded, to.padded, memory.from(of_.inputs[0]), weight_.weights(),
                              bias_.data(), memory.to(of_.output));
    case NNTURBO_CONCATENATION:
      return concatenate(memory);
    case NNTURBO_AVERAGE_POOLING:
      return pool(memory);
    default:
      for (Size image = 0; image < memory.images; ++image)
        kernels_->project(from.voxels(), from.padded, to.channels,
                          memory.from(of_.inputs[0]) + image * from.voxels() * from.padded, weight_.weights(), bias_.data(),
                          memory.logits + image * to.voxels() * to.channels);
  }
}

void Operation::convolve(const Memory& memory) const {
  const Map &from = memory.maps[of_.inputs[0]], &to = memory.maps[of_.output];
  const float* const first = memory.from(of_.inputs[0]);
  float* const result = memory.to(of_.output);
  if (of_.transformed && !goes_along_z(of_)) {
    const bool coarse = product(of_.upsampling) != 0, two = of_.inputs[1] >= 0;
    kernels_->convolve(of_.taps[0], to.size[0] * memory.images, to.size[1], to.size[2], coarse ? nullptr : first,
                       finer_.padded, two ? memory.from(of_.inputs[1]) : nullptr,
                       two ? memory.maps[of_.inputs[1]].padded : 0, to.padded, weight_.weights(), bias_.data(), result,
                       coarse ? first : nullptr, from.padded, of_.upsampling, upsampling_weight_.weights(),
                       upsampling_bias_.data());
  } else {
    const Size size[3] = {from.size[0] * memory.images, from.size[1], from.size[2]};
    (goes_along_z(of_) ? kernels_->convolve_along_z : kernels_->convolve_directly)(
        size, of_.taps, of_.stride, from.padded, to.padded, first, weight_.weights(), bias_.data(), result);
  }
}

void Operation::normalise(const Memory& memory) const {
  if (!normalises_) return;
  const Map& to = memory.maps[of_.output];
  float* const result = memory.to(of_.output);
  const float* const residual = of_.residual < 0 ? nullptr : memory.from(of_.residual);
  for (Size image = 0; image < memory.images; ++image) {
    const Size offset = image * to.voxels() * to.padded;
    kernels_->normalise(to.voxels(), to.padded, scale_.data(), shift_.data(), of_.epsilon,
                        residual ? residual + offset : nullptr, of_.slope, result + offset);
  }
}

void Operation::concatenate(const Memory& memory) const {
  const Map& to = memory.maps[of_.output];
  const Size voxels = to.voxels() * memory.images;
  float* const result = memory.to(of_.output);
  in_parallel((voxels + VOXELS_AT_ONCE - 1) / VOXELS_AT_ONCE, [&](Size task) {
    for (Size voxel = task * VOXELS_AT_ONCE; voxel < std::min(voxels, (task + 1) * VOXELS_AT_ONCE); ++voxel) {
      float* place = result + voxel * to.padded;
      for (const Size input : of_.inputs) {
        const Map& from = memory.maps[input];
        place = std::copy_n(memory.from(input) + voxel * from.padded, from.channels, place);
      }
      std::fill(place, result + (voxel + 1) * to.padded, 0.0f);
    }
  });
}

void Operation::pool(const Memory& memory) const {
  const Map &from = memory.maps[of_.inputs[0]], &to = memory.maps[of_.output];
  const float* const values = memory.from(of_.inputs[0]);
  float* const result = memory.to(of_.output);
  const float count = static_cast<float>(product(of_.stride));
  const Size width = to.padded;
  in_parallel(to.size[0] * memory.images * to.size[1], [&](Size row) {
    const Size z = row / to.size[1], y = row % to.size[1];
    for (Size x = 0; x < to.size[2]; ++x) {
      float* const sums = result + (row * to.size[2] + x) * width;
      std::fill_n(sums, width, 0.0f);
      for (Size i = 0; i < of_.stride[0]; ++i)
        for (Size j = 0; j < of_.stride[1]; ++j)
          for (Size k = 0; k < of_.stride[2]; ++k) {
            const float* const voxel =
                values + (((z * of_.stride[0] + i) * from.size[1] + y * of_.stride[1] + j) * from.size[2] +
                          x * of_.stride[2] + k) * width;
            for (Size channel = 0; channel < width; ++channel) sums[channel] += voxel[channel];
          }
      for (Size channel = 0; channel < width; ++channel) sums[channel] /= count;
    }
  });
}

}  // namespace nnturbo
