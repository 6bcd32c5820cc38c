// Convolutions as sums over taps of products of matrices, with any odd number of taps and any strides, and transposed ones.

// A part of convolution.cpp, and like it local to each set of instructions: see kernels.h.

#pragma once

#include "products.h"

namespace nnturbo {
namespace {

constexpr Size ROWS_AT_ONCE = 192;
constexpr Size SHORT = 2;  // so many times ROWS

void copy_floats(const float* from, Size count, float* to) { std::memcpy(to, from, count * sizeof(float)); }
void clear_floats(float* to, Size count) { std::memset(to, 0, count * sizeof(float)); }

// Memory that goes with the block.
template <class Value>
class Array {
 public:
  explicit Array(Size count) : memory_(static_cast<Value*>(allocate(count * sizeof(Value)))) {}
  ~Array() { release(memory_); }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  Value* data() const { return memory_; }
  Value& operator[](Size index) const { return memory_[index]; }

 private:
  Value* memory_;
};

// So many parts, or a few more, so that all threads have as many. In int16 a part shares what its numbers are divided by,
// which must not depend on threads, nor on how many planes are computed at once.
Size shared_among_threads(Size parts, const Weights& weights) {
  return weights.in_int16 ? parts : (parts + threads() - 1) / threads() * threads();
}

// A convolution with any odd number of taps and any strides, zeros around it.
struct Direct {
  const float* from;
  Size size[3], channels, taps[3], stride[3], outputs;
  Weights weights;
  const float* bias;
  float* to;
  const float* zeros;  // as many as a line has values
  const Rows* lines;   // of the input, as they are multiplied, and after them zeros; none where all lines are short
  Size out(int axis) const { return (size[axis] + 2 * (taps[axis] / 2) - taps[axis]) / stride[axis] + 1; }
  Size line() const { return size[2] * channels; }
  bool is_short() const { return out(2) < SHORT * ROWS; }
};

// Some lines along x of outputs, plane by plane. Rows of a product are voxels of the input as they lie; where taps reach
// beyond its ends, they are copied, and so are those of short lines, which make whole blocks of rows together.
void direct_lines(const Direct& of, Size first_line, Size end_line) {
  const Size parts = of.taps[0] * of.taps[1], depth = of.taps[2] * of.channels, width = of.out(2);
  const Size padding = of.taps[2] / 2, stride = of.stride[2], lines = end_line - first_line;
  const Size first = of.is_short() ? width : least(width, (padding + stride - 1) / stride);
  const Size end = most(first, least(width, (of.size[2] + padding - of.taps[2]) / stride + 1));
  const Size outside = width - (end - first), copies = lines * outside;
  float* const copied = scratch(copies * (2 * parts * depth + COLUMNS));
  float* const products = copied + copies * parts * depth;
  const Array<Rows> rows(lines * parts), of_copies(parts);
  for (Size line = 0; line < lines; ++line)
    for (Size part = 0; part < parts; ++part) {
      const Size z = (first_line + line) / of.out(1), y = (first_line + line) % of.out(1);
      const Size from_z = z * of.stride[0] + part / of.taps[1] - of.taps[0] / 2;
      const Size from_y = y * of.stride[1] + part % of.taps[1] - of.taps[1] / 2;
      const bool inside = from_z >= 0 && from_z < of.size[0] && from_y >= 0 && from_y < of.size[1];
      const Size at_line = inside ? from_z * of.size[1] + from_y : of.size[0] * of.size[1];
      const float* const row = inside ? of.from + at_line * of.line() : of.zeros;
      if (!of.is_short()) rows[line * parts + part] = of.lines[at_line].from(-padding * of.channels);
      for (Size index = 0; index < outside; ++index) {
        const Size x = index < first ? index : end + index - first;
        float* const to = copied + ((line * outside + index) * parts + part) * depth;
        for (Size tap = 0; tap < of.taps[2]; ++tap) {
          const Size at = x * stride + tap - padding;
          if (at >= 0 && at < of.size[2])
            copy_floats(row + at * of.channels, of.channels, to + tap * of.channels);
          else
            clear_floats(to + tap * of.channels, of.channels);
        }
      }
    }
  const Rows all = rows_for(of.weights, copied, copies * parts * depth, products + copies * COLUMNS);
  for (Size part = 0; part < parts; ++part) of_copies[part] = all.from(part * depth);
  for (Size column = 0; column < of.outputs; column += COLUMNS) {
    const Weights weights = panel_of(of.weights, column / COLUMNS, parts * depth);
    const float* const bias = of.bias + column;
    float* const to = of.to + first_line * width * of.outputs + column;
    const Size columns = of.outputs - column;
    for (Size line = 0; line < lines; ++line)
      multiply_rows({rows.data() + line * parts, parts, stride * of.channels, weights, depth, bias,
                     to + line * width * of.outputs, of.outputs, columns},
                    first, end);
    multiply_rows({of_copies.data(), parts, parts * depth, weights, depth, bias, products, COLUMNS, columns}, 0, copies);
    for (Size copy = 0; copy < copies; ++copy) {
      const Size index = copy % outside, x = index < first ? index : end + index - first;
      copy_floats(products + copy * COLUMNS, least(columns, COLUMNS), to + (copy / outside * width + x) * of.outputs);
    }
  }
}

void convolve_directly(const Size* size, const Size* taps, const Size* stride, Size inputs, Size outputs,
                       const float* from, const Weights& weights, const float* bias, float* to) {
  Direct of{from, {size[0], size[1], size[2]}, inputs, {taps[0], taps[1], taps[2]},
            {stride[0], stride[1], stride[2]}, outputs, weights, bias, to, nullptr, nullptr};
  const Size lines = of.is_short() ? 0 : size[0] * size[1], line = of.line();
  const Array<float> zeros(line);
  const Array<std::int16_t> room(weights.in_int16 ? (lines + 1) * line : 0);
  const Array<Rows> as_multiplied(lines + 1);
  clear_floats(zeros.data(), line);
  in_parallel(lines + 1, [&](Size index) {
    as_multiplied[index] =
        rows_for(weights, index < lines ? from + index * line : zeros.data(), line, room.data() + index * line);
  });
  of.zeros = zeros.data();
  of.lines = as_multiplied.data();
  const Size all = of.out(0) * of.out(1), at_once = most(1, ROWS_AT_ONCE / of.out(2));
  const Size blocks = least(all, shared_among_threads((all + at_once - 1) / at_once, weights));
  in_parallel(blocks, [&](Size index) { direct_lines(of, index * all / blocks, (index + 1) * all / blocks); });
}

// A transposed convolution whose kernel equals its stride; weights are (stride, panels, inputs, COLUMNS).
struct Spread {
  const float* from;
  Size size[3], stride[3], inputs, outputs;  // size of what it comes from
  Weights weights;
  const float* bias;
};

// Planes from `first` to `end` of what it becomes, each voxel of the input as `stride` voxels.
void spread(const Spread& of, Size first, Size end, float* to) {
  const Size width = of.size[2] * of.stride[2];
  in_parallel((end - first) * of.size[1], [&](Size index) {
    const Size plane = index / of.size[1], y = index % of.size[1], z = first + plane;
    const Size count = of.size[2] * of.inputs;
    const Rows row = rows_for(of.weights, of.from + (z / of.stride[0] * of.size[1] + y) * count, count, scratch(count));
    for (Size j = 0; j < of.stride[1]; ++j)
      for (Size i = 0; i < of.stride[2]; ++i) {
        const Size position = (z % of.stride[0] * of.stride[1] + j) * of.stride[2] + i;
        float* start = to + (((plane * of.size[1] + y) * of.stride[1] + j) * width + i) * of.outputs;
        for (Size panel = 0; panel < panels(of.outputs); ++panel)
          multiply_rows({&row, 1, of.inputs, panel_of(of.weights, position * panels(of.outputs) + panel, of.inputs),
                         of.inputs, of.bias + panel * COLUMNS, start + panel * COLUMNS, of.stride[2] * of.outputs,
                         of.outputs - panel * COLUMNS},
                        0, of.size[2]);
      }
  });
}

void spread(const Size* size, const Size* stride, Size inputs, Size outputs, const float* from, const Weights& weights,
            const float* bias, float* to) {
  const Spread of{from, {size[0], size[1], size[2]}, {stride[0], stride[1], stride[2]}, inputs, outputs, weights, bias};
  spread(of, 0, size[0] * stride[0], to);
}

}  // namespace
}  // namespace nnturbo
