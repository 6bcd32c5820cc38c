// A scan as the caller holds it, seen along the network's axes and cropped, without a copy.

#pragma once

#include "array.h"
#include "include/nnturbo.h"

namespace nnturbo {

struct ScanView {
  const void* voxels = nullptr;
  nnturbo_type type = NNTURBO_FLOAT32;
  Size channels = 0;
  Triple shape{};
  std::array<Size, 4> strides{};  // of channel, z, y, x, in voxels
  Size first = 0;                 // place of the first voxel

  // The whole scan along its own axes.
  static ScanView of(const nnturbo_scan& scan);
  // With axis `order[i]` of this view as axis i.
  ScanView transposed(const Triple& order) const;
  ScanView cropped(const Box& box) const;

  // Read the voxels of a line along x as float32.
  void read_line(Size channel, Size z, Size y, float* to) const;

  // Whether any channel is not zero there; `width` flags of a line along x.
  void mark_nonzero(Size z, Size y, std::uint8_t* flags) const;
};

// Whether all voxels are finite, as float32 too.
bool is_finite(const ScanView& scan);

// Smallest box around all voxels with a channel that is not zero; the whole scan if all voxels are zero.
Box nonzero_box(const ScanView& scan);

// Voxels with a channel that is not zero, and enclosed holes, (Z, Y, X) (nnU-Net: create_nonzero_mask).
std::vector<std::uint8_t> filled_mask(const ScanView& scan);

}  // namespace nnturbo
