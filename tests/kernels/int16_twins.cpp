// Compares convolutions in int16 with plain loops: those of lines that are rounded by themselves with the same rounding,
// and all of them with float64, within what the rounding allows. The instructions to use are the program's argument, and
// where they, or such products, are not here it ends with status 77.

#include "../../kernels/cpu/program.h"
#include "plain_loops.h"

#include <cstdint>
#include <cstdio>

namespace {

using nnturbo::Weights;

constexpr double MOST = 16383;  // that a row holds, see products.h
constexpr Size CHUNK = 96;      // products whose sum is a whole number there
constexpr Size WIDE = 24;       // results along x from which on lines are rounded by themselves
constexpr double OF_FLOAT32 = 3e-5;  // as the same functions in float32 are allowed, see convolution_twins.cpp
int faults = 0;

void require(bool holds, const char* what, double got, double most) {
  if (holds) return;
  if (++faults < 20) std::printf("%s is off by %g, which is more than %g\n", what, got, most);
}

// Numbers with zeros in place of the channels from `used` on, as those that fill vectors have.
Floats with_zeros(Floats values, Size channels, Size used) {
  for (std::size_t index = 0; index < values.size(); ++index)
    if (static_cast<Size>(index) % channels >= used) values[index] = 0;
  return values;
}

// What the numbers of a column are multiplied by, so that no sum of CHUNK products leaves 32 bits; 0 where all are zero.
double factor_of(const Doubles& column, Size depth) {
  double largest = 0, largest_sum = 0;
  for (std::size_t part = 0; part < column.size(); part += depth)
    for (Size chunk = 0; chunk < depth; chunk += CHUNK) {
      double sum = 0;
      for (Size k = chunk; k < std::min(depth, chunk + CHUNK); ++k) {
        largest = std::max(largest, std::fabs(column[part + k]));
        sum += std::fabs(column[part + k]);
      }
      largest_sum = std::max(largest_sum, sum);
    }
  return largest == 0 ? 0 : std::min((2147483647 / MOST - CHUNK / 2.0) / largest_sum, 32767 / largest);
}

// Panels of (parts, depth, columns) as the kernels make whole numbers of them, held to the plain way.
class Narrowed {
 public:
  Narrowed(const Floats& packed, Size parts, Size depth)
      : rows_(parts * depth), whole_(packed.size()), scales_(packed.size() / rows_) {
    const Size columns = kernels()->columns, panels = packed.size() / (rows_ * columns);
    kernels()->narrow_panels(panels, parts, depth, packed.data(), whole_.data(), scales_.data());
    for (Size panel = 0; panel < panels; ++panel)
      for (Size column = 0; column < columns; ++column) {
        const auto at = [&](Size row) { return packed[(panel * rows_ + row) * columns + column]; };
        Doubles values(rows_);
        for (Size row = 0; row < rows_; ++row) values[row] = at(row);
        const double by = factor_of(values, depth), scale = by ? 1 / by : 0;
        const double got = scales_[panel * columns + column];
        require(std::fabs(got - scale) <= 1e-7 * scale, "the scale of a column", got - scale, 1e-7 * scale);
        for (Size row = 0; row < rows_; ++row)
          require(whole(panel, row, column) == std::nearbyint(values[row] * by), "a weight in int16",
                  whole(panel, row, column) - values[row] * by, 0.5);
      }
  }

  std::int16_t whole(Size panel, Size row, Size column) const {
    const Size columns = kernels()->columns;
    return whole_[panel * rows_ * columns + (row / 2 * columns + column) * 2 + row % 2];
  }
  double scale(Size panel, Size column) const { return scales_[panel * kernels()->columns + column]; }
  Weights weights() const { return {whole_.data(), scales_.data()}; }

 private:
  const Size rows_;
  std::vector<std::int16_t> whole_;
  Floats scales_;
};

// Each line of so many numbers divided by its largest, rounded, and multiplied again.
Doubles rounded_lines(const Floats& from, Size line) {
  Doubles rounded(from.size());
  for (std::size_t start = 0; start < from.size(); start += line) {
    float largest = 0;
    for (Size index = 0; index < line; ++index) largest = std::max(largest, std::fabs(from[start + index]));
    const double by = largest > 0 ? static_cast<float>(MOST) / largest : 0, scale = largest / static_cast<float>(MOST);
    for (Size index = 0; index < line; ++index) rounded[start + index] = std::nearbyint(from[start + index] * by) * scale;
  }
  return rounded;
}

// Weights (places, outputs, inputs, parts, taps along x) as they are in int16; columns are those of a place and output.
Doubles rounded_weights(const Floats& weight, Size inputs, Size parts, Size taps) {
  Doubles rounded(weight.size());
  const Size depth = taps * inputs;
  for (std::size_t start = 0; start < weight.size(); start += parts * depth) {
    const auto place = [&](Size row) {
      return start + (row % inputs * parts + row / depth) * taps + row % depth / inputs;
    };
    Doubles column(parts * depth);
    for (Size row = 0; row < parts * depth; ++row) column[row] = weight[place(row)];
    const double by = factor_of(column, depth);
    const double scale = by ? static_cast<float>(1 / by) : 0;
    for (Size row = 0; row < parts * depth; ++row) rounded[place(row)] = std::nearbyint(column[row] * by) * scale;
  }
  return rounded;
}

// How far rounding may take each result, and the variance of that, if all remainders are equally likely.
struct Allowed {
  Doubles furthest, variance;
  explicit Allowed(Size results) : furthest(results), variance(results) {}

  // Of a product of two numbers that are rounded to multiples of two steps; nothing of zeros, which stay zeros.
  void add(Size result, double value, double step, double weight, double weight_step, double factor = 1) {
    if (value == 0 || weight == 0) return;
    const double by_weight = std::fabs(value) * weight_step, by_value = std::fabs(weight) * step;
    furthest[result] += std::fabs(factor) * (by_weight / 2 + by_value / 2 + step * weight_step / 4);
    variance[result] += factor * factor * (by_weight * by_weight + by_value * by_value) / 12;
  }
};

void compare(const char* what, const Floats& got, const Doubles& exact, const Allowed& allowed) {
  double scale = 0, squares = 0, expected = 0;
  for (const double value : exact) scale = std::max(scale, std::fabs(value));
  for (std::size_t index = 0; index < exact.size(); ++index) {
    const double off = std::fabs(got[index] - exact[index]), most = allowed.furthest[index] + OF_FLOAT32 * scale;
    require(off <= most, what, off, most);
    squares += off * off;
    expected += allowed.variance[index] + std::pow(OF_FLOAT32 * scale, 2) / 100;
  }
  require(squares <= 2.25 * expected, what, std::sqrt(squares / exact.size()), std::sqrt(expected / exact.size()));
}

void compare_twin(const char* what, const Floats& got, const Doubles& twin) {
  double scale = 0;
  for (const double value : twin) scale = std::max(scale, std::fabs(value));
  for (std::size_t index = 0; index < twin.size(); ++index)
    require(std::fabs(got[index] - twin[index]) <= 2e-6 * scale, what, std::fabs(got[index] - twin[index]), 2e-6 * scale);
}

double largest_of(const Floats& values) {
  double largest = 0;
  for (const float value : values) largest = std::max(largest, double(std::fabs(value)));
  return largest;
}

void check_direct(const Size size[3]) {
  const auto random = [](Size end) { return static_cast<Size>(luck() % end); };
  const Size lanes = kernels()->lanes, used = 1 + random(2 * lanes), inputs = (used + lanes - 1) / lanes * lanes;
  const Shape of{{size[0], size[1], size[2]}, {1 + 2 * random(2), 1 + 2 * random(3), 1 + 2 * random(3)},
                 {1 + random(2), 1 + random(3), 1 + random(2)}, inputs, (1 + random(4)) * lanes};
  const Size parts = of.taps[0] * of.taps[1], depth = of.taps[2] * inputs, all_taps = parts * of.taps[2];
  const Floats from = with_zeros(noise(size[0] * size[1] * size[2] * inputs), inputs, used);
  const Floats weight = noise(of.outputs * inputs * all_taps), bias = noise(of.outputs);
  const Narrowed narrowed(panels(weight, of.outputs, inputs, all_taps), parts, depth);
  Floats got(of.results());
  kernels()->convolve_directly(of.size, of.taps, of.stride, inputs, of.outputs, from.data(), narrowed.weights(),
                               bias.data(), got.data());
  Allowed allowed(of.results());
  const double step = largest_of(from) / MOST;
  each_product(of, [&](Size result, Size value, Size other) {
    const Size output = result % of.outputs, columns = kernels()->columns;
    allowed.add(result, from[value], step, weight[other], narrowed.scale(output / columns, output % columns));
  });
  compare("convolve_directly", got, convolved(of, from, weight, bias), allowed);
  if (of.out(2) < WIDE) return;
  const Doubles twin =
      convolved(of, rounded_lines(from, size[2] * inputs), rounded_weights(weight, inputs, parts, of.taps[2]), bias);
  Floats inside;
  Doubles of_twin;  // where no tap reaches beyond a line
  for (Size result = 0; result < of.results(); ++result) {
    const Size first = result / of.outputs % of.out(2) * of.stride[2] - of.taps[2] / 2;
    if (first < 0 || first + of.taps[2] > size[2]) continue;
    inside.push_back(got[result]);
    of_twin.push_back(twin[result]);
  }
  compare_twin("convolve_directly, as it rounds", inside, of_twin);
}

void check_spread(const Size size[3], const Size stride[3]) {
  const Size lanes = kernels()->lanes, used = 1 + static_cast<Size>(luck() % (3 * lanes));
  const Size inputs = (used + lanes - 1) / lanes * lanes, outputs = kernels()->columns + lanes;
  const Size places = stride[0] * stride[1] * stride[2];
  const Floats from = with_zeros(noise(size[0] * size[1] * size[2] * inputs), inputs, used);
  const Floats weight = noise(places * outputs * inputs), bias = noise(outputs);
  const Narrowed narrowed(spread_panels(weight, places, outputs, inputs), 1, inputs);
  Floats got(from.size() / inputs * places * outputs);
  kernels()->spread(size, stride, inputs, outputs, from.data(), narrowed.weights(), bias.data(), got.data());
  const Doubles lines = rounded_lines(from, size[2] * inputs), columns = rounded_weights(weight, inputs, 1, 1);
  compare_twin("spread, as it rounds", got, spread(lines, size, stride, inputs, outputs, columns, bias));
}

// F(4, 3): four outputs of six inputs (Lavin and Gray, arXiv:1509.09308).
constexpr int OUT = 4, IN = 6;
constexpr double OF_INPUT[IN][IN] = {{4, 0, -5, 0, 1, 0},  {0, -4, -4, 1, 1, 0}, {0, 4, -4, -1, 1, 0},
                                     {0, -2, -1, 2, 1, 0}, {0, 2, -1, -2, 1, 0}, {0, 4, 0, -5, 0, 1}};
constexpr double OF_OUTPUT[OUT][IN] = {{1, 1, 1, 1, 1, 0}, {0, 1, -1, 2, -2, 0}, {0, 1, 1, 4, 4, 0}, {0, 1, -1, 8, -8, 1}};

// A convolution by fewer products: along two axes in tiles, along the third (x in 3D, z in 2D) tap by tap.
struct Tiled {
  Shape of;
  int one, other, rest;
  explicit Tiled(const Shape& of) : of(of), one(of.taps[0] == 3 ? 0 : 1), other(one + 1), rest(of.taps[0] == 3 ? 2 : 0) {}
  Size tiles(int axis) const { return (of.size[axis] + OUT - 1) / OUT; }
  Size place(const Size at[3], Size channels) const { return ((at[0] * of.size[1] + at[1]) * of.size[2] + at[2]) * channels; }

  // The inputs of a tile at a place along the third axis, (positions, inputs); zeros outside.
  Doubles transformed(const Floats& from, Size tile_one, Size tile_other, Size third) const {
    Doubles made(IN * IN * of.inputs);
    for (int i = 0; i < IN; ++i)
      for (int j = 0; j < IN; ++j) {
        Size at[3];
        at[one] = tile_one * OUT + i - 1, at[other] = tile_other * OUT + j - 1, at[rest] = third;
        if (std::any_of(at, at + 3, [](Size index) { return index < 0; })) continue;
        if (at[0] >= of.size[0] || at[1] >= of.size[1] || at[2] >= of.size[2]) continue;
        for (int position = 0; position < IN * IN; ++position)
          for (Size input = 0; input < of.inputs; ++input)
            made[position * of.inputs + input] += OF_INPUT[position / IN][i] * OF_INPUT[position % IN][j] *
                                                  from[place(at, of.inputs) + input];
      }
    return made;
  }
};

// Of a result, what its products' errors become: sums over positions, of which each has a step for all tiles.
Allowed allowed_by(const Tiled& tiled, const Floats& from, const Floats& packed, const Narrowed& narrowed) {
  const Shape& of = tiled.of;
  const Size taps = of.taps[tiled.rest], depth = taps * of.inputs, columns = kernels()->columns;
  const Size panel_count = (of.outputs + columns - 1) / columns, length = of.size[tiled.rest];
  const Size tiles = tiled.tiles(tiled.one) * tiled.tiles(tiled.other);
  std::vector<Doubles> inputs;
  Doubles steps(IN * IN);
  for (Size index = 0; index < tiles * length; ++index) {
    const Size tile = index / length;
    inputs.push_back(tiled.transformed(from, tile / tiled.tiles(tiled.other), tile % tiled.tiles(tiled.other), index % length));
    for (std::size_t at = 0; at < inputs.back().size(); ++at)
      steps[at / of.inputs] = std::max(steps[at / of.inputs], std::fabs(inputs.back()[at]) / MOST);
  }
  Allowed allowed(of.results());
  for (Size index = 0; index < tiles * length; ++index)
    for (Size output = 0; output < of.outputs; ++output) {
      const Size tile = index / length, panel = output / columns, column = output % columns;
      Allowed products(IN * IN);
      for (int position = 0; position < IN * IN; ++position)
        for (Size row = 0; row < depth; ++row) {
          const Size third = index % length + row / of.inputs - taps / 2;
          if (third < 0 || third >= length) continue;
          products.add(position, inputs[tile * length + third][position * of.inputs + row % of.inputs], steps[position],
                       packed[((position * panel_count + panel) * depth + row) * columns + column],
                       narrowed.scale(position * panel_count + panel, column));
        }
      for (int result = 0; result < OUT * OUT; ++result) {
        Size at[3];
        at[tiled.one] = tile / tiled.tiles(tiled.other) * OUT + result / OUT;
        at[tiled.other] = tile % tiled.tiles(tiled.other) * OUT + result % OUT;
        at[tiled.rest] = index % length;
        if (at[tiled.one] >= of.size[tiled.one] || at[tiled.other] >= of.size[tiled.other]) continue;
        const Size place = tiled.place(at, of.outputs) + output;
        for (int position = 0; position < IN * IN; ++position) {
          const double factor = OF_OUTPUT[result / OUT][position / IN] * OF_OUTPUT[result % OUT][position % IN];
          allowed.furthest[place] += std::fabs(factor) * products.furthest[position];
          allowed.variance[place] += factor * factor * products.variance[position];
        }
      }
    }
  return allowed;
}

void check_by_fewer_products(const Size size[3], Size taps) {
  const Size lanes = kernels()->lanes, voxels = size[0] * size[1] * size[2];
  const Size outputs = (1 + static_cast<Size>(luck() % 3)) * lanes;
  const Shape of{{size[0], size[1], size[2]}, {taps, 3, 3}, {1, 1, 1}, lanes + outputs, outputs};
  const Floats one = with_zeros(noise(voxels * lanes), lanes, 1 + luck() % lanes);
  Floats other = with_zeros(noise(voxels * outputs), outputs, outputs - luck() % lanes);
  const Floats weight = noise(outputs * of.inputs * taps * 9), bias = noise(outputs);
  const Floats both = joined(one, lanes, other, outputs);
  Floats packed(kernels()->weights_size(2, taps, of.inputs, outputs)), got(of.results());
  kernels()->transform_weights(2, taps, of.inputs, outputs, weight.data(), packed.data());
  const Narrowed narrowed(packed, 1, taps * of.inputs);
  const auto convolve_to = [&](float* to) {
    kernels()->convolve(taps, size[0], size[1], size[2], one.data(), lanes, other.data(), outputs, outputs,
                        narrowed.weights(), bias.data(), to, nullptr, 0, nullptr, nullptr, nullptr);
  };
  convolve_to(got.data());
  compare(taps == 3 ? "convolve" : "convolve planes", got, convolved(of, both, weight, bias),
          allowed_by(Tiled(of), both, packed, narrowed));
  convolve_to(other.data());
  require(other == got, "convolve over its input", 1, 0);
}

}  // namespace

int main(int, char** arguments) {
  if (nnturbo_use(arguments[1]) || !nnturbo_multiplies_int16()) return 77;
  const nnturbo::Threads working(3);
  for (int round = 0; round < 60; ++round) {
    const Size depth = round % 3 ? 1 + static_cast<Size>(luck() % 6) : 1;  // one plane is a 2D network's
    const Size size[3] = {depth, 1 + static_cast<Size>(luck() % 9), 1 + static_cast<Size>(luck() % (round % 2 ? 20 : 60))};
    const Size stride[3] = {1 + static_cast<Size>(luck() % 2), 1 + static_cast<Size>(luck() % 3), 2};
    check_direct(size);
    check_spread(size, stride);
    check_by_fewer_products(size, round % 3 == 1 ? 3 : 1);
  }
  std::printf("%s: %d faults\n", nnturbo_variant(), faults);
  return faults != 0;
}
