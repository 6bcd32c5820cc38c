// Convolutions of three taps along z that go by fours along it alone: the other axes may have any odd number of taps, and
// strides up to as many.

// A part of convolution.cpp, and like it local to each set of instructions: see kernels.h.

#pragma once

#include "transformed.h"

namespace nnturbo {
namespace {

// One block: OUT planes of `rows` times `width` voxels. Taps along y and x are summed.
void block_along_z(const Direct& of, Size z0, Size y0, Size rows, Size x0, Size width) {
  const Size rows_in = (rows - 1) * of.stride[1] + of.taps[1], width_in = (width - 1) * of.stride[2] + of.taps[2];
  const Size line = width_in * of.channels, count = rows_in * line, results = rows * width * of.outputs;
  float* const transformed = scratch(IN * (count + results));
  float* const products = transformed + IN * count;
  const Size first_x = x0 * of.stride[2] - of.taps[2] / 2;
  const Size begin = within(-first_x, 0, width_in) * of.channels;  // of those within the scan
  const Size end = within(of.size[2] - first_x, 0, width_in) * of.channels;
  for (Size row = 0; row < rows_in; ++row) {
    const Size y = y0 * of.stride[1] - of.taps[1] / 2 + row;
    const bool inside = y >= 0 && y < of.size[1];
    float* const to = transformed + row * line;
    for (int i = 0; i < IN; ++i) {
      clear_floats(to + i * count, inside ? begin : line);
      if (inside) clear_floats(to + i * count + end, line - end);
    }
    if (!inside) continue;
    const float* lines[IN];  // none outside of the scan
    for (int i = 0; i < IN; ++i) {
      const Size z = z0 + i - 1;
      lines[i] = z < 0 || z >= of.size[0] ? nullptr : of.from + (z * of.size[1] + y) * of.line() + first_x * of.channels;
    }
    for (Size at = begin; at < end; at += LANES) {
      Vector d[IN], v[IN];
      for (int i = 0; i < IN; ++i) d[i] = lines[i] ? load(lines[i] + at) : Vector{};
      transform_input(d, v);
      for (int i = 0; i < IN; ++i) store(to + i * count + at, v[i]);
    }
  }
  const Array<Rows> parts(of.taps[1]);
  const Size depth = of.taps[2] * of.channels;
  for (int position = 0; position < IN; ++position)
    for (Size panel = 0; panel < panels(of.outputs); ++panel)
      for (Size row = 0; row < rows; ++row) {
        for (Size part = 0; part < of.taps[1]; ++part)
          parts[part] = {transformed + position * count + (row * of.stride[1] + part) * line};
        multiply_rows({parts.data(), of.taps[1], of.stride[2] * of.channels,
                       panel_of(of.weights, position * panels(of.outputs) + panel, of.taps[1] * depth), depth, NOTHING,
                       products + position * results + row * width * of.outputs + panel * COLUMNS, of.outputs,
                       of.outputs - panel * COLUMNS},
                      0, width);
      }
  for (Size row = 0; row < rows; ++row)
    for (Size x = 0; x < width; ++x)
      for (Size channel = 0; channel < of.outputs; channel += LANES) {
        Vector m[IN], y[OUT];
        for (int i = 0; i < IN; ++i) m[i] = load(products + i * results + (row * width + x) * of.outputs + channel);
        transform_output(m, y);
        const Vector bias = load(of.bias + channel);
        for (Size plane = 0; plane < least(OUT, of.size[0] - z0); ++plane)
          store(of.to + (((z0 + plane) * of.out(1) + y0 + row) * of.out(2) + x0 + x) * of.outputs + channel,
                y[plane] + bias);
      }
}

void convolve_along_z(const Size* size, const Size* taps, const Size* stride, Size inputs, Size outputs,
                      const float* from, const Weights& weights, const float* bias, float* to) {
  const Direct of{from, {size[0], size[1], size[2]}, inputs, {taps[0], taps[1], taps[2]},
                  {stride[0], stride[1], stride[2]}, outputs, weights, bias, to, nullptr, nullptr};
  const Size height = of.out(1), width = of.out(2);
  const Size part_x = whole_rows(width, most(1, (width + PART_X / 2) / PART_X)), parts_x = (width + part_x - 1) / part_x;
  const Size rows = within(ROWS_OF_BLOCK / part_x, 1, height), parts_y = (height + rows - 1) / rows;
  in_parallel((size[0] + OUT - 1) / OUT * parts_y * parts_x, [&](Size index) {
    const Size x = index % parts_x * part_x, y = index / parts_x % parts_y * rows;
    block_along_z(of, index / (parts_x * parts_y) * OUT, y, least(rows, height - y), x, least(part_x, width - x));
  });
}

}  // namespace
}  // namespace nnturbo
