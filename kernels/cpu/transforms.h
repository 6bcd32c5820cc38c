// Winograd's transforms of inputs, products and weights.

// A part of convolution.cpp, and like it local to each set of instructions: see kernels.h.

#pragma once

#include "direct.h"

namespace nnturbo {
namespace {

constexpr int OUT = 4, IN = 6;            // F(4, 3)
constexpr int PAIR_OUT = 2, PAIR_IN = 4;  // F(2, 3)

const float NOTHING[COLUMNS] = {};

// Size of each of so many parts, so that only the last has less than whole blocks of rows.
constexpr Size whole_rows(Size count, Size parts) {
  const Size each = (count + parts - 1) / parts;
  return parts == 1 ? count : (each + ROWS - 1) / ROWS * ROWS;
}

// Six values of an input row become the six that are multiplied.
inline void transform_input(const Vector d[IN], Vector v[IN]) {
  v[0] = 4.0f * d[0] - 5.0f * d[2] + d[4];
  const Vector a = d[4] - 4.0f * d[2], b = d[3] - 4.0f * d[1];
  v[1] = a + b;
  v[2] = a - b;
  const Vector c = d[4] - d[2], e = 2.0f * (d[3] - d[1]);
  v[3] = c + e;
  v[4] = c - e;
  v[5] = 4.0f * d[1] - 5.0f * d[3] + d[5];
}

// Six products become four outputs.
inline void transform_output(const Vector m[IN], Vector y[OUT]) {
  const Vector a = m[1] + m[2], b = m[1] - m[2], c = m[3] + m[4], e = m[3] - m[4];
  y[0] = m[0] + a + c;
  y[1] = b + 2.0f * e;
  y[2] = a + 4.0f * c;
  y[3] = b + 8.0f * e + m[5];
}

// For two outputs, value `index` of the four that are multiplied comes from two of four inputs.
inline Vector pair_input(const float* from, Size step, int index) {
  switch (index) {
    case 0: return load(from) - load(from + 2 * step);
    case 1: return load(from + step) + load(from + 2 * step);
    case 2: return load(from + 2 * step) - load(from + step);
    default: return load(from + step) - load(from + 3 * step);
  }
}

// Four products become two outputs.
inline void pair_output(const float* from, Size step, float* to, Size to_step) {
  const Vector m1 = load(from + step), m2 = load(from + 2 * step);
  store(to, load(from) + m1 + m2);
  store(to + to_step, m1 - m2 - load(from + 3 * step));
}

// Matrices of weights: six for each of one or two axes that go by fours, and four times as many with a third by pairs.
constexpr Size positions(Size axes) { return axes == 1 ? IN : axes == 2 ? IN * IN : IN * IN * PAIR_IN; }

Size weights_size(Size axes, Size taps, Size inputs, Size outputs) {
  return positions(axes) * taps * inputs * whole_panels(outputs);
}

template <int AXES>
void transform_weights_along(Size taps, Size inputs, Size outputs, const float* from, float* to) {
  static const double G[IN][3] = {{1.0 / 4, 0, 0},           {-1.0 / 6, -1.0 / 6, -1.0 / 6}, {-1.0 / 6, 1.0 / 6, -1.0 / 6},
                                  {1.0 / 24, 1.0 / 12, 1.0 / 6}, {1.0 / 24, -1.0 / 12, 1.0 / 6}, {0, 0, 1}};
  static const double G_OF_PAIRS[PAIR_IN][3] = {{1, 0, 0}, {0.5, 0.5, 0.5}, {0.5, -0.5, 0.5}, {0, 0, 1}};
  constexpr Size FOURS = AXES == 1 ? 3 : 9, BY_FOURS = positions(AXES == 1 ? 1 : 2);
  const Size rest = AXES == 3 ? 3 : taps, all = panels(outputs);
  double factors[BY_FOURS][FOURS];
  for (Size position = 0; position < BY_FOURS; ++position)
    for (Size at = 0; at < FOURS; ++at)
      factors[position][at] = AXES == 1 ? G[position][at] : G[position / IN][at / 3] * G[position % IN][at % 3];
  struct Columns {
    double of[COLUMNS];
  };
  in_parallel(all, [&](Size panel) {
    const Array<Columns> kernels(rest * FOURS), sums(rest);
    for (Size index = 0; index < rest * FOURS; ++index) kernels[index] = {};
    for (Size input = 0; input < inputs; ++input) {
      for (Size lane = 0; lane < least(COLUMNS, outputs - panel * COLUMNS); ++lane) {
        const float* kernel = from + ((panel * COLUMNS + lane) * inputs + input) * rest * FOURS;
        for (Size at = 0; at < rest * FOURS; ++at) kernels[at % rest * FOURS + at / rest].of[lane] = kernel[at];
      }
      for (Size position = 0; position < BY_FOURS; ++position) {
        for (Size tap = 0; tap < rest; ++tap)
          for (int lane = 0; lane < COLUMNS; ++lane) {
            double sum = 0;
            for (Size at = 0; at < FOURS; ++at) sum += factors[position][at] * kernels[tap * FOURS + at].of[lane];
            sums[tap].of[lane] = sum;
          }
        if constexpr (AXES == 3) {
          for (Size index = 0; index < PAIR_IN; ++index) {
            float* const place = to + (((position * PAIR_IN + index) * all + panel) * inputs + input) * COLUMNS;
            for (int lane = 0; lane < COLUMNS; ++lane) {
              double sum = 0;
              for (int tap = 0; tap < 3; ++tap) sum += G_OF_PAIRS[index][tap] * sums[tap].of[lane];
              place[lane] = static_cast<float>(sum);
            }
          }
        } else {
          for (Size tap = 0; tap < rest; ++tap) {
            float* const place = to + (((position * all + panel) * rest + tap) * inputs + input) * COLUMNS;
            for (int lane = 0; lane < COLUMNS; ++lane) place[lane] = static_cast<float>(sums[tap].of[lane]);
          }
        }
      }
    }
  });
}

void transform_weights(Size axes, Size taps, Size inputs, Size outputs, const float* from, float* to) {
  if (axes == 1) return transform_weights_along<1>(taps, inputs, outputs, from, to);
  if (axes == 2) return transform_weights_along<2>(taps, inputs, outputs, from, to);
  transform_weights_along<3>(taps, inputs, outputs, from, to);
}

}  // namespace
}  // namespace nnturbo
