// What the stages of the path around the network pass to each other. Axes are (C, Z, Y, X), spatial ones (z, y, x).

#pragma once

#include <array>
#include <vector>

#include "../cpu/kernels.h"

namespace nnturbo {

using Triple = std::array<Size, 3>;
using Spacing = std::array<double, 3>;  // mm

// Half-open range of voxels along an axis.
struct Range {
  Size start, stop;
};

using Box = std::array<Range, 3>;

// The product of sizes; throws std::bad_alloc where as many floats do not fit into this machine's memory.
std::size_t count_that_fits(const std::vector<Size>& sizes);

// Dense numbers (C, Z, Y, X).
struct Array {
  Size channels = 0;
  Triple shape{};
  std::vector<float> values;

  Array() = default;
  Array(Size channels, const Triple& shape)
      : channels(channels), shape(shape), values(count_that_fits({channels, shape[0], shape[1], shape[2]})) {}

  Size plane_size() const { return shape[1] * shape[2]; }
  float* plane(Size channel, Size z) { return values.data() + (channel * shape[0] + z) * plane_size(); }
  const float* plane(Size channel, Size z) const { return values.data() + (channel * shape[0] + z) * plane_size(); }
};

// Do tasks 0 to `tasks` - 1 with all threads.
template <class Work>
void parallel(Size tasks, const Work& work) {
  run(tasks, [](const void* context, Size index) { (*static_cast<const Work*>(context))(index); }, &work);
}

}  // namespace nnturbo
