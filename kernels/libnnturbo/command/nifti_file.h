// NIfTI files in and out, by NIfTI's own C library.

#pragma once

#include <nifti2_io.h>

#include <array>
#include <cstdint>
#include <filesystem>
#include <stdexcept>
#include <string>
#include <variant>
#include <vector>

namespace nnturbo {

// The text is one line: what must hold, what came, and what to do.
class NiftiError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// A NIfTI file in memory. NIfTI's first axis is x and lies densest in memory, so its voxels are (Z, Y, X) as they are.
struct NiftiScan {
  std::array<std::int64_t, 3> shape{};  // (z, y, x)
  std::array<double, 3> spacing_mm{};   // (z, y, x)
  std::vector<float> voxels;            // with the header's slope and intercept applied
  std::variant<nifti_1_header, nifti_2_header> header;  // for labels on this grid; says where it lies
  std::array<double, 12> affine{};      // the same as three rows of four numbers in mm
};

// Read one 3D image, NIfTI-1 or NIfTI-2 in one file, compressed or not, as one of nnU-Net's readers does: through
// nibabel, units are ignored.
NiftiScan read_nifti(const std::filesystem::path& file, const std::string& reader);

// Check that a channel lies on the grid of the first one.
void check_same_grid(const std::filesystem::path& file, const NiftiScan& channel, const NiftiScan& first);

// Write labels (Z, Y, X) of 1 or 2 bytes on a scan's grid; the file gets its name when it is complete.
void write_nifti_labels(const std::filesystem::path& file, const void* labels, int bytes, const NiftiScan& grid);

}  // namespace nnturbo
