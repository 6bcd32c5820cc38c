// Weights with which nnU-Net's resampling functions read samples along an axis.

#include <algorithm>
#include <cmath>

#include "resampling.h"

namespace nnturbo {
namespace {

constexpr Size SPLINE_PADDING = 12;  // samples by which scipy.ndimage repeats the edge before it filters
constexpr double SPLINE_ROUNDING = 3e-9;  // first power of a pole that is left out; below float32 rounding
constexpr double SPLINE_LEAST = 1e-8;     // weights below are left out

// The filter from samples to coefficients of a B-spline; its response to an impulse is sum of gain * pole^|n|.
struct Prefilter {
  std::vector<double> poles, gains;
  Size reach = 0;  // samples on each side on which a coefficient depends
};

// Unser, Aldroubi, Eden: B-spline signal processing, part II, 1993.
std::vector<double> spline_poles(Size order) {
  switch (order) {
    case 2:
      return {std::sqrt(8.0) - 3};
    case 3:
      return {std::sqrt(3.0) - 2};
    case 4:
      return {std::sqrt(664 - std::sqrt(438976.0)) + std::sqrt(304.0) - 19,
              std::sqrt(664 + std::sqrt(438976.0)) - std::sqrt(304.0) - 19};
    default:
      return {std::sqrt(67.5 - std::sqrt(4436.25)) + std::sqrt(26.25) - 6.5,
              std::sqrt(67.5 + std::sqrt(4436.25)) - std::sqrt(26.25) - 6.5};
  }
}

// The filter is `d * z^m / product over j of (z - p_j) * (z - 1 / p_j)` with m poles of absolute value below 1; its
// residue at p_i is the gain.
Prefilter prefilter(Size order) {
  constexpr double DENOMINATORS[] = {0, 0, 8, 6, 384, 120};  // 1 / least value of the B-spline at whole numbers
  Prefilter filter;
  filter.poles = spline_poles(order);
  double slowest = 0;
  for (const double pole : filter.poles) {
    double others = 1;
    for (const double other : filter.poles)
      if (other != pole) others *= (pole - other) * (pole - 1 / other);
    const double numerator = DENOMINATORS[order] * std::pow(pole, static_cast<double>(filter.poles.size()) - 1);
    filter.gains.push_back(numerator / (pole - 1 / pole) / others);
    slowest = std::max(slowest, std::abs(pole));
  }
  filter.reach = static_cast<Size>(std::log(SPLINE_ROUNDING) / std::log(slowest));
  return filter;
}

// `sum over k of (-1)^k * binomial(n + 1, k) * max(0, (n + 1) / 2 - |x| - k)^n / n!`
double b_spline(Size order, double x) {
  double total = 0, binomial = 1, factorial = 1;
  for (Size k = 0; k <= order; ++k) {
    const double base = std::max(0.0, (order + 1) / 2.0 - std::abs(x) - k);
    total += binomial * std::pow(base, static_cast<double>(order));
    binomial = -binomial * (order + 1 - k) / (k + 1);
    factorial *= std::max<Size>(k, 1);
  }
  return total / factorial;
}

// The samples and weights of a spline of order 2 to 5 at a coordinate:
// `c[k] = sum over poles p with gains g, and j, of g * (p^|k-j| + p^(k+j+1) + p^(2N-k-j-1)) * s[j]` over the signal s
// whose edges are repeated 12 times (length N) and then reflected; the value at x adds order + 1 of these coefficients
// with the weights of the B-spline (scipy ndimage.zoom with grid_mode, skimage.transform.resize).
std::vector<Entry> spline_entries(Size n_in, double x, Size order, const Prefilter& filter) {
  const Size length = n_in + 2 * SPLINE_PADDING;
  const auto nearest = static_cast<Size>(std::floor(order % 2 == 0 ? x + 0.5 : x));
  auto power = [](double pole, Size exponent) { return std::pow(pole, static_cast<double>(std::abs(exponent))); };
  std::vector<Entry> entries;
  for (Size at = nearest - order / 2; at <= nearest - order / 2 + order; ++at) {
    const double spline = b_spline(order, x - at);
    const Size k = at + SPLINE_PADDING;
    for (Size j = std::max<Size>(0, k - filter.reach); j <= std::min(length - 1, k + filter.reach); ++j) {
      double response = 0;
      for (std::size_t i = 0; i < filter.poles.size(); ++i) {
        const double p = filter.poles[i];
        response += filter.gains[i] * (power(p, k - j) + power(p, k + j + 1) + power(p, 2 * length - k - j - 1));
      }
      entries.push_back({j - SPLINE_PADDING, spline * response});
    }
  }
  return entries;
}

// Places for the entries of each output; throws std::bad_alloc where they do not fit into this machine's memory.
std::vector<std::vector<Entry>> rows_of(Size n_out, Size entries) {
  constexpr Size OF_ENTRY = sizeof(Entry) / sizeof(float), OF_ROW = 16;  // floats, with what the system adds
  count_that_fits({n_out, OF_ROW + OF_ENTRY * entries});
  return std::vector<std::vector<Entry>>(n_out);
}

AxisOperator selection(Size n_in, std::vector<Size> first) {
  AxisOperator axis;
  axis.n_in = n_in;
  axis.weights.assign(first.size(), 1.0f);
  axis.first = std::move(first);
  return axis;
}

}  // namespace

// Coordinates are `(i + 0.5) * n_in / n_out - 0.5`.
AxisOperator spline_operator(Size n_in, Size n_out, Size order) {
  if (n_in == n_out) return AxisOperator::identity(n_in);
  const double scale = static_cast<double>(n_in) / static_cast<double>(n_out);
  if (order == 0) {
    std::vector<Size> first(n_out);
    for (Size i = 0; i < n_out; ++i) {
      const double x = (i + 0.5) * scale - 0.5;
      first[i] = std::clamp<Size>(static_cast<Size>(std::floor(x + 0.5)), 0, n_in - 1);
    }
    return selection(n_in, std::move(first));
  }
  const Prefilter filter = order > 1 ? prefilter(order) : Prefilter{};
  auto rows = rows_of(n_out, (order + 1) * (2 * filter.reach + 1));
  for (Size i = 0; i < n_out; ++i) {
    double x = (i + 0.5) * scale - 0.5;
    if (order > 1) {
      rows[i] = spline_entries(n_in, x, order, filter);
      continue;
    }
    x = std::clamp(x, 0.0, static_cast<double>(n_in - 1));
    const Size left = std::min(static_cast<Size>(std::floor(x)), std::max<Size>(n_in - 2, 0));
    rows[i] = {{left, 1 - (x - left)}, {left + 1, x - left}};
  }
  return band_of_entries(n_in, rows, order > 1 ? SPLINE_LEAST : 0.0);
}

// torch computes coordinates in float32.
AxisOperator torch_operator(Size n_in, Size n_out, const std::string& mode) {
  if (n_in == n_out) return AxisOperator::identity(n_in);
  const float scale = static_cast<float>(n_in) / static_cast<float>(n_out);
  if (mode != "linear") {
    const float middle = mode == "nearest" ? 0.0f : 0.5f;
    std::vector<Size> first(n_out);
    for (Size i = 0; i < n_out; ++i) {
      const float x = (static_cast<float>(i) + middle) * scale;
      first[i] = std::min(static_cast<Size>(std::floor(x)), n_in - 1);
    }
    return selection(n_in, std::move(first));
  }
  auto rows = rows_of(n_out, 2);
  for (Size i = 0; i < n_out; ++i) {
    const float x = std::max(std::fma(scale, static_cast<float>(i) + 0.5f, -0.5f), 0.0f);
    const Size left = std::min(static_cast<Size>(x), n_in - 1), right = std::min(left + 1, n_in - 1);
    const float share = std::min(std::max(x - static_cast<float>(left), 0.0f), 1.0f);
    rows[i] = {{left, static_cast<double>(1.0f - share)}, {right, static_cast<double>(share)}};
  }
  return band_of_entries(n_in, rows, 0.0);
}

}  // namespace nnturbo
