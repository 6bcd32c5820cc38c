#include "axis_operator.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "fused.h"

namespace nnturbo {
namespace {

constexpr Size LANES = 32;  // columns whose sums are in registers

}  // namespace

bool AxisOperator::is_selection() const {
  return taps == 1 && std::all_of(weights.begin(), weights.end(), [](float weight) { return weight == 1; });
}

bool AxisOperator::is_identity() const {
  if (!is_selection() || n_in != n_out()) return false;
  for (Size i = 0; i < n_in; ++i)
    if (first[i] != i) return false;
  return true;
}

AxisOperator AxisOperator::identity(Size n) {
  AxisOperator axis;
  axis.n_in = n;
  axis.first.resize(n);
  std::iota(axis.first.begin(), axis.first.end(), Size{0});
  axis.weights.assign(n, 1.0f);
  return axis;
}

AxisOperator band_of_entries(Size n_in, const std::vector<std::vector<Entry>>& rows, double drop_below) {
  const Size n_out = static_cast<Size>(rows.size());
  std::vector<std::vector<double>> dense(n_out);  // each row from its own lowest column on
  std::vector<Size> lows(n_out), first(n_out), last(n_out);
  Size highest = 0;
  for (Size i = 0; i < n_out; ++i) {
    auto clamped = [&](const Entry& entry) { return std::clamp<Size>(entry.column, 0, n_in - 1); };
    Size low = n_in, high = 0;
    for (const Entry& entry : rows[i]) {
      low = std::min(low, clamped(entry));
      high = std::max(high, clamped(entry));
    }
    highest = std::max(highest, high);
    lows[i] = low;
    dense[i].resize(high - low + 1);
    for (const Entry& entry : rows[i]) dense[i][clamped(entry) - low] += entry.weight;
    auto kept = [&](double weight) { return std::abs(weight) > drop_below; };
    const auto from = std::find_if(dense[i].begin(), dense[i].end(), kept);
    const auto to = std::find_if(dense[i].rbegin(), dense[i].rend(), kept);
    first[i] = low + (from - dense[i].begin());
    last[i] = high - (to - dense[i].rbegin());
  }
  AxisOperator axis;
  axis.n_in = n_in;
  for (Size i = n_out - 2; i >= 0; --i) first[i] = std::min(first[i], first[i + 1]);  // ascending, also with rounding
  for (Size i = 0; i < n_out; ++i) axis.taps = std::max(axis.taps, last[i] - first[i] + 1);
  axis.weights.resize(n_out * axis.taps);
  for (Size i = 0; i < n_out; ++i) {
    first[i] = std::min(first[i], highest + 1 - axis.taps);
    for (Size t = 0; t < axis.taps; ++t) {
      const Size at = first[i] + t - lows[i];
      if (at >= 0 && at < static_cast<Size>(dense[i].size()))
        axis.weights[i * axis.taps + t] = static_cast<float>(dense[i][at]);
    }
  }
  axis.first = std::move(first);
  return axis;
}

namespace {

// to[c] = sum over t of weights[t] * from[t * step + c]: one product after the other, each rounded once with its sum.
FUSED void combine(const float* weights, Size taps, const float* from, Size step, Size count, float* to) {
  Size c = 0;
  for (; c + LANES <= count; c += LANES) {
    float sums[LANES] = {};
    for (Size t = 0; t < taps; ++t)
      for (Size i = 0; i < LANES; ++i) sums[i] = __builtin_fmaf(weights[t], from[t * step + c + i], sums[i]);
    std::memcpy(to + c, sums, sizeof sums);
  }
  for (; c < count; ++c) {
    float sum = 0;
    for (Size t = 0; t < taps; ++t) sum = __builtin_fmaf(weights[t], from[t * step + c], sum);
    to[c] = sum;
  }
}

}  // namespace

void apply_across(const AxisOperator& axis, Size start, Size stop, Size offset, const float* from, Size step,
                  Size count, float* to) {
  const bool selects = axis.is_selection();
  for (Size i = start; i < stop; ++i, to += count) {
    const float* inputs = from + (axis.first[i] - offset) * step;
    if (selects)
      std::memcpy(to, inputs, count * sizeof(float));
    else
      combine(&axis.weights[i * axis.taps], axis.taps, inputs, step, count, to);
  }
}

Size scratch_along(const AxisOperator& axis) { return LANES * (axis.n_in + axis.n_out()); }

void apply_along(const AxisOperator& axis, Size lines, const float* from, float* scratch, float* to) {
  const Size n_in = axis.n_in, n_out = axis.n_out();
  if (axis.is_selection()) {
    for (Size line = 0; line < lines; ++line)
      for (Size i = 0; i < n_out; ++i) to[line * n_out + i] = from[line * n_in + axis.first[i]];
    return;
  }
  float *turned = scratch, *results = scratch + LANES * n_in;
  for (Size line = 0; line < lines; line += LANES) {
    const Size held = std::min(LANES, lines - line);
    for (Size i = 0; i < n_in; ++i)
      for (Size l = 0; l < LANES; ++l) turned[i * LANES + l] = l < held ? from[(line + l) * n_in + i] : 0;
    apply_across(axis, 0, n_out, 0, turned, LANES, LANES, results);
    for (Size l = 0; l < held; ++l)
      for (Size i = 0; i < n_out; ++i) to[(line + l) * n_out + i] = results[i * LANES + l];
  }
}

}  // namespace nnturbo
