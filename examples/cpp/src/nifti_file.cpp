#include "nifti_file.h"

#include <fcntl.h>
#include <nifti1_io.h>
#include <nnturbo/error.h>
#include <sys/stat.h>
#include <unistd.h>
#include <znzlib.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <string>

namespace nnturbo {
namespace {

namespace fs = std::filesystem;

using Image = std::unique_ptr<nifti_image, decltype(&nifti_image_free)>;

constexpr char kExportAgain[] = "; copy or export it again";
constexpr std::size_t kHeaderBytes = 352;  // the header proper and four bytes that say that nothing is appended
constexpr std::size_t kChunkBytes = 1 << 24;
constexpr double kSameSpacing = 1e-4;  // relative
constexpr double kSamePlace = 0.05;    // part of the smallest spacing

/// The part of a name that chooses the format; libnifti would guess it from what lies beside the file.
std::string ending(const fs::path& file) {
  const std::string name = file.filename().string();
  for (const std::string known : {".nii.gz", ".nii"}) {
    if (name.size() > known.size() && name.compare(name.size() - known.size(), known.size(), known) == 0) return known;
  }
  throw Error(file.string() + ": the name must end with .nii.gz or .nii; rename or convert it");
}

/// A file of libnifti, closed at the end of its scope.
class ZipFile {
 public:
  ZipFile(const fs::path& file, const char* mode) : file_(znzopen(file.c_str(), mode, nifti_is_gzfile(file.c_str()))) {}
  ~ZipFile() { close(); }
  ZipFile(const ZipFile&) = delete;
  ZipFile& operator=(const ZipFile&) = delete;

  bool seek(std::int64_t offset) { return file_ && znzseek(file_, offset, SEEK_SET) >= 0; }
  bool read(void* to, std::size_t bytes) { return file_ && znzread(to, 1, bytes, file_) == bytes; }
  bool write(const void* from, std::size_t bytes) { return file_ && znzwrite(from, 1, bytes, file_) == bytes; }
  bool close() { return file_ && znzclose(file_) == 0; }

 private:
  znzFile file_;
};

/// The spacing as the file has it, (x, y, z); libnifti's own copy has 1 mm in place of numbers that mean nothing.
std::array<float, 3> stored_spacing(const fs::path& file) {
  const std::unique_ptr<nifti_1_header, decltype(&std::free)> header(nifti_read_header(file.c_str(), nullptr, 1),
                                                                     &std::free);
  return header ? std::array<float, 3>{header->pixdim[1], header->pixdim[2], header->pixdim[3]}
                : std::array<float, 3>{};
}

double mm_per_unit(int xyz_units) {
  switch (xyz_units) {
    case NIFTI_UNITS_METER:
      return 1e3;
    case NIFTI_UNITS_MICRON:
      return 1e-3;
    default:
      return 1;
  }
}

Image read_header(const fs::path& file) {
  ending(file);
  if (!fs::is_regular_file(file)) throw Error(file.string() + ": there is no such file; check the path");
  nifti_set_debug_level(0);  // what is wrong is said in our own words
  Image image(nifti_image_read(file.c_str(), 0), &nifti_image_free);
  if (!image || image->nifti_type != NIFTI_FTYPE_NIFTI1_1) {
    throw Error(file.string() + ": this must be a NIfTI-1 file, and its header is not one" + kExportAgain);
  }
  if (image->ndim < 3 || image->nx < 1 || image->ny < 1 || image->nz < 1 ||
      image->nvox != static_cast<std::size_t>(image->nx) * image->ny * image->nz) {
    throw Error(file.string() + ": an image must be 3D, got " + std::to_string(image->ndim) +
                "D; pass one 3D file per channel");
  }
  for (const float step : stored_spacing(file)) {
    if (!std::isfinite(step) || step <= 0) {
      throw Error(file.string() + ": spacing must be finite and above 0 mm, got " + std::to_string(step) +
                  "; correct the header");
    }
  }
  return image;
}

template <typename Stored>
std::vector<float> to_float(const std::vector<char>& bytes, double slope, double intercept) {
  std::vector<float> values(bytes.size() / sizeof(Stored));
  const auto* stored = reinterpret_cast<const Stored*>(bytes.data());
  const bool scaled = slope != 0 && (slope != 1 || intercept != 0);  // a slope of 0 means that there is none
  std::transform(stored, stored + values.size(), values.begin(), [=](Stored value) {
    return static_cast<float>(scaled ? static_cast<double>(value) * slope + intercept : value);
  });
  return values;
}

using Converter = std::vector<float> (*)(const std::vector<char>& bytes, double slope, double intercept);

Converter converter(const fs::path& file, int datatype) {
  switch (datatype) {
    case DT_UINT8:
      return to_float<std::uint8_t>;
    case DT_INT8:
      return to_float<std::int8_t>;
    case DT_UINT16:
      return to_float<std::uint16_t>;
    case DT_INT16:
      return to_float<std::int16_t>;
    case DT_UINT32:
      return to_float<std::uint32_t>;
    case DT_INT32:
      return to_float<std::int32_t>;
    case DT_UINT64:
      return to_float<std::uint64_t>;
    case DT_INT64:
      return to_float<std::int64_t>;
    case DT_FLOAT32:
      return to_float<float>;
    case DT_FLOAT64:
      return to_float<double>;
    default:
      throw Error(file.string() + ": voxels must be plain integers or floats, got " + nifti_datatype_string(datatype) +
                  "; convert the image");
  }
}

/// Not by nifti_image_load, which puts 0 in place of NaN, and in place of what a file lacks.
std::vector<char> read_bytes(const fs::path& file, const nifti_image& image) {
  const std::size_t promised = image.nvox * image.nbyper;
  std::vector<char> bytes;
  bytes.reserve(promised);
  ZipFile stream(file, "rb");
  bool complete = stream.seek(image.iname_offset);
  while (complete && bytes.size() < promised) {  // memory is touched only for what the file really has
    const std::size_t read = bytes.size(), chunk = std::min(kChunkBytes, promised - read);
    bytes.resize(read + chunk);
    complete = stream.read(bytes.data() + read, chunk);
  }
  if (!complete) {
    throw Error(file.string() + ": the header promises " + std::to_string(promised) +
                " bytes of voxels, and the file has less or is damaged" + kExportAgain);
  }
  if (image.byteorder != nifti_short_order()) nifti_swap_Nbytes(image.nvox, image.swapsize, bytes.data());
  return bytes;
}

/// A NIfTI-1 header for labels on the same grid.
nifti_1_header label_header(nifti_image& image) {
  image.ndim = image.dim[0] = 3;
  image.scl_slope = image.scl_inter = image.cal_min = image.cal_max = 0;
  image.intent_code = 0;
  image.intent_name[0] = image.descrip[0] = image.aux_file[0] = '\0';
  nifti_1_header header = nifti_convert_nim2nhdr(&image);
  header.vox_offset = kHeaderBytes;
  return header;
}

/// Where voxels lie, as three rows of four numbers in mm.
std::array<double, 12> affine(const nifti_1_header& header) {
  std::array<double, 12> rows{};
  if (header.sform_code > 0) {
    std::copy_n(header.srow_x, 4, rows.begin());
    std::copy_n(header.srow_y, 4, rows.begin() + 4);
    std::copy_n(header.srow_z, 4, rows.begin() + 8);
  } else if (header.qform_code > 0) {
    const mat44 matrix = nifti_quatern_to_mat44(header.quatern_b, header.quatern_c, header.quatern_d, header.qoffset_x,
                                                header.qoffset_y, header.qoffset_z, header.pixdim[1], header.pixdim[2],
                                                header.pixdim[3], header.pixdim[0]);
    std::copy_n(&matrix.m[0][0], 12, rows.begin());
  }
  return rows;
}

/// A temporary file in the folder of the final one; removed unless it was renamed to it.
class TemporaryFile {
 public:
  explicit TemporaryFile(const fs::path& target) : target_(target) {
    const std::string suffix = ending(target);
    std::string name = ((target.has_parent_path() ? target.parent_path() : ".") / ".writing-XXXXXX").string() + suffix;
    descriptor_ = mkstemps(name.data(), static_cast<int>(suffix.size()));
    if (descriptor_ < 0) fail();
    path_ = name;
  }

  ~TemporaryFile() {
    if (descriptor_ >= 0) ::close(descriptor_);
    std::error_code ignored;
    if (!path_.empty()) fs::remove(path_, ignored);
  }
  TemporaryFile(const TemporaryFile&) = delete;
  TemporaryFile& operator=(const TemporaryFile&) = delete;

  const fs::path& path() const { return path_; }

  /// Gives the file its name, once its content is on the disk.
  void commit() {
    // mkstemps makes files private; a result has the permissions any new file would have.
    const mode_t mask = umask(0);
    umask(mask);
    if (fsync(descriptor_) != 0 || fchmod(descriptor_, 0666 & ~mask) != 0 ||
        std::rename(path_.c_str(), target_.c_str()) != 0) {
      fail();
    }
    path_.clear();
  }

  [[noreturn]] void fail() const {
    throw Error(target_.string() + ": this file cannot be written (" + std::strerror(errno) +
                "); check the folder and the space on the disk");
  }

 private:
  fs::path target_, path_;
  int descriptor_ = -1;
};

template <typename Stored>
void write_as(const fs::path& file, nifti_1_header header, std::int16_t datatype, const std::int64_t* labels,
              std::size_t count) {
  header.datatype = datatype;
  header.bitpix = 8 * sizeof(Stored);
  const std::vector<Stored> stored(labels, labels + count);
  const char nothing_appended[4] = {};
  TemporaryFile temporary(file);
  ZipFile stream(temporary.path(), "wb");
  const bool written = stream.write(&header, sizeof header) &&
                       stream.write(nothing_appended, sizeof nothing_appended) &&
                       stream.write(stored.data(), count * sizeof(Stored));
  if (!written || !stream.close()) temporary.fail();
  temporary.commit();
}

}  // namespace

Scan read_scan(const fs::path& file) {
  const Image image = read_header(file);
  Scan scan{};
  scan.shape = {image->nz, image->ny, image->nx};
  const double mm = mm_per_unit(image->xyz_units);
  scan.spacing_mm = {image->dz * mm, image->dy * mm, image->dx * mm};
  const Converter to_float = converter(file, image->datatype);
  scan.voxels = to_float(read_bytes(file, *image), image->scl_slope, image->scl_inter);
  scan.header = label_header(*image);
  return scan;
}

void check_same_grid(const fs::path& file, const Scan& channel, const Scan& first) {
  bool same = channel.shape == first.shape;
  for (int axis = 0; axis < 3; ++axis) {
    same = same && std::abs(channel.spacing_mm[axis] / first.spacing_mm[axis] - 1) <= kSameSpacing;
  }
  const auto here = affine(channel.header), there = affine(first.header);
  const double smallest = *std::min_element(first.header.pixdim + 1, first.header.pixdim + 4);
  for (std::size_t i = 0; i < here.size(); ++i) same = same && std::abs(here[i] - there[i]) <= kSamePlace * smallest;
  if (!same) {
    throw Error(file.string() +
                ": all channels must have the same shape, spacing, origin and direction, and this one differs from the "
                "first; resample the channels to one grid");
  }
}

void write_labels(const fs::path& file, const std::int64_t* labels, const Scan& scan) {
  const std::size_t count = scan.voxels.size();
  const auto [least, greatest] = std::minmax_element(labels, labels + count);
  if (*least < 0 || *greatest > std::numeric_limits<std::int16_t>::max()) {
    throw Error(file.string() + ": labels must be 0 to 32767, got " + std::to_string(*least) + " to " +
                std::to_string(*greatest) + "; the model is not one of nnU-Net's");
  }
  if (*greatest <= std::numeric_limits<std::uint8_t>::max()) {
    write_as<std::uint8_t>(file, scan.header, DT_UINT8, labels, count);
  } else {
    write_as<std::int16_t>(file, scan.header, DT_INT16, labels, count);
  }
}

}  // namespace nnturbo
