#pragma once

#include <nifti1.h>

#include <array>
#include <cstdint>
#include <filesystem>
#include <vector>

namespace nnturbo {

/// A NIfTI file in memory. NIfTI's first axis is x and lies densest in memory, so its voxels are (Z, Y, X) as they are.
struct Scan {
  std::array<std::int64_t, 3> shape;  ///< (z, y, x)
  std::array<double, 3> spacing_mm;   ///< (z, y, x)
  std::vector<float> voxels;          ///< With the header's slope and intercept applied.
  nifti_1_header header;              ///< Says where the grid lies.
};

/// Reads one 3D image, NIfTI-1 in one file, compressed or not.
///
/// @throws Error  Where it is missing, damaged, cut off, or no 3D image of real numbers.
Scan read_scan(const std::filesystem::path& file);

/// Checks that a channel lies on the grid of the first one.
///
/// @throws Error  Where it does not.
void check_same_grid(const std::filesystem::path& file, const Scan& channel, const Scan& first);

/// Writes labels on a scan's grid, uint8 where they fit, else int16; the file appears under its name when complete.
///
/// @param labels  (Z, Y, X), as many as the scan has voxels.
/// @throws Error  Where they cannot be written; nothing is left behind then.
void write_labels(const std::filesystem::path& file, const std::int64_t* labels, const Scan& scan);

}  // namespace nnturbo
