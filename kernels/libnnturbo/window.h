// The tiles that cover a grid.

#pragma once

#include "plan.h"

namespace nnturbo {

// First voxels of the tiles along one axis, spread evenly (nnU-Net: compute_steps_for_sliding_window).
std::vector<Size> tile_positions(Size length, Size patch, double step);

// Weights of each tile along one axis, Gaussian, divided by their sum over all tiles at each voxel.
std::vector<std::vector<float>> axis_weights(Size length, Size patch, const std::vector<Size>& positions);

// Tiles that cover the network's grid, padded where it is smaller than a patch.
struct Window {
  Triple shape, padded, before;  // of the grid; with padding; voxels of padding before the grid
  std::array<std::vector<Size>, 3> starts;  // first voxels of tiles, in the padded grid
  std::array<std::vector<std::vector<float>>, 3> weights;

  Window(const Plan& plan, const Triple& shape, double tile_step_size, Size views);

  Size rows() const { return static_cast<Size>(starts[0].size()); }
  Size tiles_of_row() const { return static_cast<Size>(starts[1].size() * starts[2].size()); }
};

}  // namespace nnturbo
