#include "scan.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

namespace nnturbo {
namespace {

// Call `work` with a pointer of the voxels' own type.
template <class Work>
void as_stored(const ScanView& scan, const Work& work) {
  switch (scan.type) {
    case NNTURBO_INT8:
      return work(static_cast<const std::int8_t*>(scan.voxels));
    case NNTURBO_UINT8:
      return work(static_cast<const std::uint8_t*>(scan.voxels));
    case NNTURBO_INT16:
      return work(static_cast<const std::int16_t*>(scan.voxels));
    case NNTURBO_UINT16:
      return work(static_cast<const std::uint16_t*>(scan.voxels));
    case NNTURBO_INT32:
      return work(static_cast<const std::int32_t*>(scan.voxels));
    case NNTURBO_UINT32:
      return work(static_cast<const std::uint32_t*>(scan.voxels));
    case NNTURBO_INT64:
      return work(static_cast<const std::int64_t*>(scan.voxels));
    case NNTURBO_UINT64:
      return work(static_cast<const std::uint64_t*>(scan.voxels));
    case NNTURBO_FLOAT32:
      return work(static_cast<const float*>(scan.voxels));
    case NNTURBO_FLOAT64:
      return work(static_cast<const double*>(scan.voxels));
  }
}

bool plane_has_voxels(const ScanView& scan, int axis, Size index) {
  Box box{Range{0, scan.shape[0]}, Range{0, scan.shape[1]}, Range{0, scan.shape[2]}};
  box[axis] = {index, index + 1};
  const ScanView plane = scan.cropped(box);
  std::vector<std::uint8_t> flags(plane.shape[2]);
  for (Size z = 0; z < plane.shape[0]; ++z)
    for (Size y = 0; y < plane.shape[1]; ++y) {
      plane.mark_nonzero(z, y, flags.data());
      if (std::find(flags.begin(), flags.end(), 1) != flags.end()) return true;
    }
  return false;
}

}  // namespace

ScanView ScanView::of(const nnturbo_scan& scan) {
  ScanView view;
  view.voxels = scan.voxels;
  view.type = scan.type;
  view.channels = scan.channels;
  view.shape = {scan.z, scan.y, scan.x};
  view.strides = {scan.z * scan.y * scan.x, scan.y * scan.x, scan.x, 1};
  return view;
}

ScanView ScanView::transposed(const Triple& order) const {
  ScanView view = *this;
  for (int axis = 0; axis < 3; ++axis) {
    view.shape[axis] = shape[order[axis]];
    view.strides[axis + 1] = strides[order[axis] + 1];
  }
  return view;
}

ScanView ScanView::cropped(const Box& box) const {
  ScanView view = *this;
  for (int axis = 0; axis < 3; ++axis) {
    view.shape[axis] = box[axis].stop - box[axis].start;
    view.first += box[axis].start * strides[axis + 1];
  }
  return view;
}

void ScanView::read_line(Size channel, Size z, Size y, float* to) const {
  const Size start = first + channel * strides[0] + z * strides[1] + y * strides[2];
  as_stored(*this, [&](const auto* stored) {
    for (Size x = 0; x < shape[2]; ++x) to[x] = static_cast<float>(stored[start + x * strides[3]]);
  });
}

void ScanView::mark_nonzero(Size z, Size y, std::uint8_t* flags) const {
  std::fill_n(flags, shape[2], std::uint8_t{0});
  for (Size channel = 0; channel < channels; ++channel) {
    const Size start = first + channel * strides[0] + z * strides[1] + y * strides[2];
    as_stored(*this, [&](const auto* stored) {
      for (Size x = 0; x < shape[2]; ++x) flags[x] |= stored[start + x * strides[3]] != 0;
    });
  }
}

bool is_finite(const ScanView& scan) {
  bool finite = true;
  as_stored(scan, [&](const auto* stored) {
    if constexpr (std::is_floating_point_v<std::decay_t<decltype(*stored)>>) {
      const Size count = scan.channels * scan.shape[0] * scan.shape[1] * scan.shape[2];
      finite = std::all_of(stored, stored + count, [](auto value) { return std::isfinite(static_cast<float>(value)); });
    }
  });
  return finite;
}

Box nonzero_box(const ScanView& scan) {
  Box box;
  for (int axis = 0; axis < 3; ++axis) {
    Range& range = box[axis] = {0, scan.shape[axis]};
    while (range.start < range.stop && !plane_has_voxels(scan, axis, range.start)) ++range.start;
    if (range.start == range.stop) return {Range{0, scan.shape[0]}, Range{0, scan.shape[1]}, Range{0, scan.shape[2]}};
    while (!plane_has_voxels(scan, axis, range.stop - 1)) --range.stop;
  }
  return box;
}

// Voxels around the body that are connected to the border by faces are outside.
std::vector<std::uint8_t> filled_mask(const ScanView& scan) {
  const auto [depth, height, width] = scan.shape;
  std::vector<std::uint8_t> inside(depth * height * width);
  for (Size z = 0; z < depth; ++z)
    for (Size y = 0; y < height; ++y) scan.mark_nonzero(z, y, &inside[(z * height + y) * width]);
  constexpr std::uint8_t OUTSIDE = 2;
  std::vector<Size> reached;
  auto reach = [&](Size at) {
    if (inside[at] == 0) {
      inside[at] = OUTSIDE;
      reached.push_back(at);
    }
  };
  auto at_border = [](Size place, Size length) { return place == 0 || place == length - 1; };
  for (Size z = 0; z < depth; ++z)
    for (Size y = 0; y < height; ++y) {
      const bool whole_line = at_border(z, depth) || at_border(y, height);
      for (Size x = 0; x < width; x += whole_line ? 1 : std::max<Size>(width - 1, 1))
        reach((z * height + y) * width + x);
    }
  while (!reached.empty()) {
    const Size at = reached.back(), x = at % width, y = at / width % height, z = at / width / height;
    reached.pop_back();
    if (x > 0) reach(at - 1);
    if (x + 1 < width) reach(at + 1);
    if (y > 0) reach(at - width);
    if (y + 1 < height) reach(at + width);
    if (z > 0) reach(at - width * height);
    if (z + 1 < depth) reach(at + width * height);
  }
  for (std::uint8_t& flag : inside) flag = flag != OUTSIDE;
  return inside;
}

}  // namespace nnturbo
