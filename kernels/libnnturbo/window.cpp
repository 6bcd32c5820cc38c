#include "window.h"

#include <algorithm>
#include <cmath>

#include "error.h"

namespace nnturbo {
namespace {

constexpr double MOST_TILES = 1e7, MOST_RUNS = 1e12;  // along an axis; of the network

[[noreturn]] void fail(const std::string& what) {
  throw Error(NNTURBO_BAD_ARGUMENT, "tile_step_size must give at most " + what + ": choose a greater one");
}

}  // namespace

std::vector<Size> tile_positions(Size length, Size patch, double step) {
  const double further = std::ceil((length - patch) / (patch * step));
  if (!(further < MOST_TILES)) fail("10^7 tiles along an axis");
  const Size count = static_cast<Size>(further) + 1;
  std::vector<Size> positions(count);
  if (count == 1) return positions;
  const double actual_step = static_cast<double>(length - patch) / (count - 1);
  for (Size i = 0; i < count; ++i) positions[i] = static_cast<Size>(std::nearbyint(actual_step * i));
  return positions;
}

// nnU-Net filters an impulse at `patch // 2` with a Gaussian of sigma `patch / 8` in all axes at once
// (compute_gaussian). That filter is separable, and its truncation at 4 sigma lies at the patch's edge.
std::vector<std::vector<float>> axis_weights(Size length, Size patch, const std::vector<Size>& positions) {
  count_that_fits({static_cast<Size>(positions.size()), patch});
  std::vector<double> weight(patch), total(length);
  for (Size i = 0; i < patch; ++i) {
    const double distance = static_cast<double>(i - patch / 2) / (patch / 8.0);
    weight[i] = std::exp(-0.5 * distance * distance);
  }
  for (const Size start : positions)
    for (Size i = 0; i < patch; ++i) total[start + i] += weight[i];
  std::vector<std::vector<float>> shares;
  for (const Size start : positions) {
    std::vector<float>& share = shares.emplace_back(patch);
    for (Size i = 0; i < patch; ++i) share[i] = static_cast<float>(weight[i] / total[start + i]);
  }
  return shares;
}

Window::Window(const Plan& plan, const Triple& shape, double tile_step_size, Size views) : shape(shape) {
  for (int axis = 0; axis < 3; ++axis) {
    const Size patch = plan.patch_size[axis];
    padded[axis] = std::max(shape[axis], patch);
    before[axis] = (padded[axis] - shape[axis]) / 2;
    // The patch of a 2d configuration is one plane deep: each plane is a row of tiles.
    const double step = plan.slicewise && axis == 0 ? 1.0 : tile_step_size;
    starts[axis] = tile_positions(padded[axis], patch, step);
  }
  double runs = static_cast<double>(views);
  for (const auto& along : starts) runs *= static_cast<double>(along.size());
  if (runs > MOST_RUNS) fail("10^12 runs of the network");
  for (int axis = 0; axis < 3; ++axis) weights[axis] = axis_weights(padded[axis], plan.patch_size[axis], starts[axis]);
  for (auto& of_row : weights[0])
    for (float& weight : of_row) weight /= static_cast<float>(views);
}

}  // namespace nnturbo
