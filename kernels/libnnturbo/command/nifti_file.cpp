#include "nifti_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>
#include <znzlib.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <type_traits>

namespace nnturbo {
namespace {

namespace fs = std::filesystem;

using Image = std::unique_ptr<nifti_image, decltype(&nifti_image_free)>;

constexpr char EXPORT_AGAIN[] = "; copy or export it again";
constexpr std::size_t CHUNK_VOXELS = 1 << 20;
constexpr double MOST_VOXELS = 1e12;
constexpr double SAME_SPACING = 1e-4;  // relative
constexpr double SAME_PLACE = 0.05;    // part of the smallest spacing

// The part of a name that chooses the format; the library would guess it from what lies beside the file.
std::string ending(const fs::path& file) {
  const std::string name = file.filename().string();
  for (const std::string known : {".nii.gz", ".nii"})
    if (name.size() > known.size() && name.compare(name.size() - known.size(), known.size(), known) == 0) return known;
  throw NiftiError(file.string() + ": the name must end with .nii.gz or .nii; rename or convert it");
}

// A file, compressed or not, closed at the end of its scope.
class ZipFile {
 public:
  ZipFile(const fs::path& file, const char* mode) : file_(znzopen(file.c_str(), mode, ending(file) == ".nii.gz")) {}
  ~ZipFile() { close(); }
  ZipFile(const ZipFile&) = delete;
  ZipFile& operator=(const ZipFile&) = delete;

  bool read(void* to, std::size_t bytes) { return file_ && znzread(to, 1, bytes, file_) == bytes; }
  bool write(const void* from, std::size_t bytes) { return file_ && znzwrite(from, 1, bytes, file_) == bytes; }
  bool close() { return file_ && znzclose(file_) == 0; }

  bool skip(std::int64_t bytes) {
    char skipped[4096];
    for (; bytes > 0; bytes -= sizeof skipped)
      if (!read(skipped, std::min<std::int64_t>(bytes, sizeof skipped))) return false;
    return true;
  }

 private:
  znzFile file_;
};

// Fields that NIfTI-1 and NIfTI-2 have under the same names.
struct Fields {
  int version;
  std::array<std::int64_t, 4> dim;   // number of axes, x, y, z
  std::array<std::int64_t, 4> rest;  // lengths of further axes
  std::array<double, 3> pixdim;      // x, y, z
  double slope, intercept, offset;
  int datatype, units;
};

template <class Header>
Fields fields_of(const Header& header, int version) {
  Fields fields{};
  fields.version = version;
  std::copy_n(header.dim, 4, fields.dim.begin());
  for (int axis = 0; axis < 3; ++axis) {
    fields.rest[axis] = header.dim[0] > 3 + axis ? header.dim[4 + axis] : 1;
    fields.pixdim[axis] = header.pixdim[1 + axis];
  }
  fields.rest[3] = header.dim[0] > 6 ? header.dim[7] : 1;
  fields.slope = header.scl_slope;
  fields.intercept = header.scl_inter;
  fields.offset = static_cast<double>(header.vox_offset);
  fields.datatype = header.datatype;
  fields.units = XYZT_TO_SPACE(header.xyzt_units);
  return fields;
}

// The size of a number, and the function that makes floats of many.
struct Type {
  std::size_t bytes;
  void (*convert)(char* stored, std::size_t count, bool swapped, double slope, double intercept, float* to);
};

template <class Stored>
void convert(char* stored, std::size_t count, bool swapped, double slope, double intercept, float* to) {
  if (swapped && sizeof(Stored) > 1) nifti_swap_Nbytes(static_cast<std::int64_t>(count), sizeof(Stored), stored);
  const bool scales = slope != 1 || intercept != 0;
  for (std::size_t i = 0; i < count; ++i) {
    Stored value;
    std::memcpy(&value, stored + i * sizeof(Stored), sizeof(Stored));
    to[i] = scales ? static_cast<float>(static_cast<double>(value) * slope + intercept) : static_cast<float>(value);
  }
}

template <class Stored>
constexpr Type type() {
  return {sizeof(Stored), convert<Stored>};
}

Type type_of(const fs::path& file, int datatype) {
  switch (datatype) {
    case DT_UINT8:
      return type<std::uint8_t>();
    case DT_INT8:
      return type<std::int8_t>();
    case DT_UINT16:
      return type<std::uint16_t>();
    case DT_INT16:
      return type<std::int16_t>();
    case DT_UINT32:
      return type<std::uint32_t>();
    case DT_INT32:
      return type<std::int32_t>();
    case DT_UINT64:
      return type<std::uint64_t>();
    case DT_INT64:
      return type<std::int64_t>();
    case DT_FLOAT32:
      return type<float>();
    case DT_FLOAT64:
      return type<double>();
    default:
      throw NiftiError(file.string() + ": voxels must be plain integers or floats, got " +
                       nifti_datatype_string(datatype) + "; convert the image");
  }
}

void check_fields(const fs::path& file, const Fields& fields) {
  const auto [axes, x, y, z] = fields.dim;
  if (!(axes >= 3 && axes <= 7 && x >= 1 && y >= 1 && z >= 1) ||
      std::any_of(fields.rest.begin(), fields.rest.end(), [](std::int64_t length) { return length != 1; }))
    throw NiftiError(file.string() + ": an image must be 3D, got " + std::to_string(axes) +
                     " axes; pass one 3D file per channel");
  if (!(1.0 * x * y * z <= MOST_VOXELS))
    throw NiftiError(file.string() + ": an image must have at most 10^12 voxels; correct the header");
  const double least = fields.version == 1 ? 352 : 544;
  if (!(fields.offset >= least && fields.offset <= MOST_VOXELS && fields.offset == std::floor(fields.offset)))
    throw NiftiError(file.string() + ": voxels must begin behind the header, at byte " +
                     std::to_string(static_cast<int>(least)) + " or later; correct the header");
  if (!std::isfinite(fields.intercept) && std::isfinite(fields.slope) && fields.slope != 0)
    throw NiftiError(file.string() + ": scl_inter must be finite; correct the header");
}

// mm along (z, y, x), as nnU-Net takes them from a reader.
std::array<double, 3> spacing_of(const fs::path& file, const Fields& fields, const std::string& reader) {
  const bool by_nibabel = reader.rfind("NibabelIO", 0) == 0;
  const double mm = by_nibabel ? 1 : fields.units == NIFTI_UNITS_METER ? 1e3 : fields.units == NIFTI_UNITS_MICRON ? 1e-3 : 1;
  std::array<double, 3> spacing;
  for (int axis = 0; axis < 3; ++axis) {
    double step = fields.pixdim[2 - axis];
    if (by_nibabel) step = step == 0 ? 1 : std::abs(step);
    if (!std::isfinite(step) || step <= 0)
      throw NiftiError(file.string() + ": spacing must be finite and above 0 mm, got " + std::to_string(step) +
                       "; correct the header");
    spacing[axis] = step * mm;
  }
  return spacing;
}

std::vector<float> read_voxels(const fs::path& file, const Fields& fields, bool swapped) {
  const Type type = type_of(file, fields.datatype);
  const auto count = static_cast<std::size_t>(fields.dim[1] * fields.dim[2] * fields.dim[3]);
  const bool scales = std::isfinite(fields.slope) && fields.slope != 0;  // a slope of 0 means that there is none
  std::vector<float> voxels;
  std::vector<char> chunk(CHUNK_VOXELS * type.bytes);
  ZipFile stream(file, "rb");
  bool complete = stream.skip(static_cast<std::int64_t>(fields.offset));
  while (complete && voxels.size() < count) {  // memory is touched only for what the file really has
    const std::size_t read = voxels.size(), more = std::min(CHUNK_VOXELS, count - read);
    complete = stream.read(chunk.data(), more * type.bytes);
    if (!complete) break;
    if (voxels.capacity() < read + more) voxels.reserve(std::min(count, 2 * (read + more)));
    voxels.resize(read + more);
    type.convert(chunk.data(), more, swapped, scales ? fields.slope : 1, scales ? fields.intercept : 0, &voxels[read]);
  }
  // The checksum is at the end of what is compressed: reading on verifies it.
  char behind;
  if (complete) while (stream.read(&behind, 1)) {}
  if (!complete || !stream.close())
    throw NiftiError(file.string() + ": the header promises " + std::to_string(count * type.bytes) +
                     " bytes of voxels, and the file has less or is damaged" + EXPORT_AGAIN);
  return voxels;
}

std::array<double, 12> affine_of(const nifti_image& image) {
  std::array<double, 12> rows{};
  const auto& matrix = image.sform_code > 0 ? image.sto_xyz : image.qto_xyz;
  std::copy_n(&matrix.m[0][0], 12, rows.begin());
  return rows;
}

// Put a header into this machine's order of bytes, which the library leaves to others; whether it was in another one.
template <class Header>
bool put_in_order(Header& header, int version) {
  const bool swapped = header.sizeof_hdr != sizeof(Header);
  if (swapped) swap_nifti_header(&header, version);
  return swapped;
}

// A header for labels on the same grid.
template <class Header>
Header of_labels(Header header) {
  header.dim[0] = 3;
  std::fill(header.dim + 4, header.dim + 8, 1);
  header.scl_slope = header.scl_inter = header.cal_min = header.cal_max = 0;
  header.intent_code = 0;
  std::memset(header.intent_name, 0, sizeof header.intent_name);
  std::memset(header.descrip, 0, sizeof header.descrip);
  std::memset(header.aux_file, 0, sizeof header.aux_file);
  header.vox_offset = sizeof(Header) + 4;
  return header;
}

nifti_image* converted(const nifti_1_header& header, const fs::path& file) {
  return nifti_convert_n1hdr2nim(header, file.c_str());
}

nifti_image* converted(const nifti_2_header& header, const fs::path& file) {
  return nifti_convert_n2hdr2nim(header, file.c_str());
}

// Take what a file's header says, once its fields are known to be good: the library trusts them when it converts it.
// No image comes of a header whose voxels lie elsewhere. Gives whether it was in another order of bytes.
template <class Header>
bool take_header(const fs::path& file, void* header, NiftiScan& scan, Fields& fields, Image& image) {
  constexpr int version = std::is_same_v<Header, nifti_1_header> ? 1 : 2;
  auto& stored = *static_cast<Header*>(header);
  const bool swapped = put_in_order(stored, version);
  fields = fields_of(stored, version);
  check_fields(file, fields);
  scan.header = of_labels(stored);
  if (stored.magic[1] == '+') image.reset(converted(stored, file));
  return swapped;
}

// A temporary file in the folder of the final one; removed unless it was renamed to it.
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

  // Give the file its name, once its content is on the disk.
  void commit() {
    // mkstemps makes files private; a result has the permissions any new file would have.
    const mode_t mask = umask(0);
    umask(mask);
    if (fsync(descriptor_) != 0 || fchmod(descriptor_, 0666 & ~mask) != 0 ||
        std::rename(path_.c_str(), target_.c_str()) != 0)
      fail();
    path_.clear();
  }

  [[noreturn]] void fail() const {
    throw NiftiError(target_.string() + ": this file cannot be written (" + std::strerror(errno) +
                     "); check the folder and the space on the disk");
  }

 private:
  fs::path target_, path_;
  int descriptor_ = -1;
};

template <class Header>
void write(const fs::path& file, Header header, const void* labels, int bytes, std::size_t count) {
  header.datatype = bytes == 1 ? DT_UINT8 : DT_UINT16;
  header.bitpix = static_cast<short>(8 * bytes);
  const char nothing_appended[4] = {};
  TemporaryFile temporary(file);
  ZipFile stream(temporary.path(), "wb");
  const bool written = stream.write(&header, sizeof header) &&
                       stream.write(nothing_appended, sizeof nothing_appended) && stream.write(labels, count * bytes);
  if (!written || !stream.close()) temporary.fail();
  temporary.commit();
}

}  // namespace

NiftiScan read_nifti(const fs::path& file, const std::string& reader) {
  ending(file);
  std::error_code absent;
  if (!fs::is_regular_file(file, absent))
    throw NiftiError(file.string() + ": there is no such file; check the path");
  nifti_set_debug_level(0);  // what is wrong is said in our own words
  int version = 0;
  const std::unique_ptr<void, decltype(&std::free)> header(nifti_read_header(file.c_str(), &version, 0), &std::free);
  if (!header || version < 1)
    throw NiftiError(file.string() + ": this must be a NIfTI file, and its header is not one" + EXPORT_AGAIN);
  NiftiScan scan;
  Fields fields{};
  Image image(nullptr, &nifti_image_free);
  const bool swapped = version == 1 ? take_header<nifti_1_header>(file, header.get(), scan, fields, image)
                                    : take_header<nifti_2_header>(file, header.get(), scan, fields, image);
  scan.spacing_mm = spacing_of(file, fields, reader);
  if (!image)
    throw NiftiError(file.string() + ": this must be a NIfTI file with header and voxels together" + EXPORT_AGAIN);
  scan.affine = affine_of(*image);
  for (int axis = 0; axis < 3; ++axis) scan.shape[axis] = fields.dim[3 - axis];
  scan.voxels = read_voxels(file, fields, swapped);
  return scan;
}

void check_same_grid(const fs::path& file, const NiftiScan& channel, const NiftiScan& first) {
  bool same = channel.shape == first.shape;
  for (int axis = 0; axis < 3; ++axis)
    same = same && std::abs(channel.spacing_mm[axis] / first.spacing_mm[axis] - 1) <= SAME_SPACING;
  const double smallest = *std::min_element(first.spacing_mm.begin(), first.spacing_mm.end());
  for (std::size_t i = 0; i < first.affine.size(); ++i)
    same = same && std::abs(channel.affine[i] - first.affine[i]) <= SAME_PLACE * smallest;
  if (!same)
    throw NiftiError(file.string() +
                     ": all channels must have the same shape, spacing, origin and direction, and this one differs from "
                     "the first; resample the channels to one grid");
}

void write_nifti_labels(const fs::path& file, const void* labels, int bytes, const NiftiScan& grid) {
  const auto count = static_cast<std::size_t>(grid.shape[0] * grid.shape[1] * grid.shape[2]);
  std::visit([&](const auto& header) { write(file, header, labels, bytes, count); }, grid.header);
}

}  // namespace nnturbo
