"""Header of an image file -> where its voxels lie and how many bytes they must have.

ITK reads the voxels, but it must not see a header first: a damaged one makes it crash (MetaImage), print to stderr
(NIfTI) or silently use a spacing of 1 mm. So the few fields that decide size, place and spacing are checked here.
"""

import contextlib
import errno
import math
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import IncompleteFile, VolumeError
from .detached import find_data_file
from .nifti import HEADER_BYTES, NiftiHeader

IMAGE_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd", ".gipl")
DETACHED_ENDINGS = (".nhdr", ".mhd")
"""Of headers with their voxels in another file."""

GZIP_MAGIC = b"\x1f\x8b"
_LONGEST_HEADER_BYTES = 16 << 20
_LONGEST_LINE_BYTES = 64 << 10
_EXPORT_AGAIN = "export or copy the file again"
_PASSING = {
    getattr(errno, name, None)
    for name in (
        "EIO", "ESTALE", "ETIMEDOUT", "EAGAIN", "EBUSY", "EINTR", "ENOMEM", "EMFILE", "ENFILE", "ECONNRESET",
        "ENOTCONN", "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH", "EREMOTEIO",
    )
} - {None}  # fmt: skip
"""What a network file system or a full machine answers at one time and not at another."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VoxelData:
    """Place and form of the voxels of one image file.

    Attributes:
        path: File that holds the voxels: the image file itself, or the data file that its header names.
        offset: Bytes in `path` before the voxels, or before the compressed stream that holds them.
        stored_bytes: Bytes in `path` from `offset` on.
        compression: "none", "gzip" or "zlib".
        prefix: What the stream decompresses to before the first voxel (the header of a .nii.gz).
        bytes_per_voxel: Stored bytes per voxel; 0 where they are those of ITK's pixel type.
        float_type: Stored type where ITK hides NaN and infinity, as numpy names it; empty elsewhere.
        nifti: The header, of a NIfTI file.
    """

    path: Path
    offset: int
    stored_bytes: int
    compression: str
    prefix: bytes = b""
    bytes_per_voxel: int = 0
    float_type: str = ""
    nifti: NiftiHeader | None = None


@contextlib.contextmanager
def naming(name: str) -> Iterator[None]:
    """Put a file's or folder's name before the text of errors, so that what checks need not know it.

    Raises:
        VolumeError: In place of a `VolumeError` or `OSError` from inside.
    """
    try:
        yield
    except VolumeError as error:
        raise type(error)(f"{name}: {error}", transient=error.transient) from None
    except OSError as error:
        reason = error.strerror or error
        raise VolumeError(f"{name}: the system cannot read it: {reason}", transient=error.errno in _PASSING) from None


def image_ending(path: Path) -> str:
    """Find the image format's ending of a file name, in lower case.

    Raises:
        VolumeError: If no format that is read here has the file's ending.
    """
    for ending in IMAGE_ENDINGS:
        if path.name.lower().endswith(ending):
            return ending
    raise VolumeError(
        f"an image must end with one of {', '.join(IMAGE_ENDINGS)}, or be a folder with the slices of one "
        "DICOM series; convert it, or pass the folder"
    )


def locate_voxels(path: Path) -> VoxelData:
    """Check the header of an image file and find its voxels.

    Args:
        path: Existing file with one of `IMAGE_ENDINGS`.

    Returns:
        Where the voxels are. Their number is not known yet: ITK tells it from the same header.

    Raises:
        VolumeError: If the header is not one of the format, or describes what is no image of plain numbers in 2D or 3D.
    """
    ending = image_ending(path)
    if ending in (".nii", ".nii.gz"):
        return _locate_nifti(path)
    if ending in (".mha", ".mhd"):
        return _locate_metaimage(path)
    if ending in (".nrrd", ".nhdr"):
        return _locate_nrrd(path)
    return _locate_gipl(path)


# ---- NIfTI: 348 or 540 bytes -----------------------------------------------------------------------------------------

_NIFTI_MARKS = {  # first four bytes: version and byte order
    size.to_bytes(4, "little" if order == "<" else "big"): (version, order)
    for version, size in HEADER_BYTES.items()
    for order in "<>"
}
_NIFTI_BYTES = {2: 1, 4: 2, 8: 4, 16: 4, 64: 8, 256: 1, 512: 2, 768: 4, 1024: 8, 1280: 8}  # by datatype code
_NIFTI_NOT_PLAIN = {32: "complex", 1792: "complex", 2048: "complex", 128: "colour (RGB)", 2304: "colour (RGBA)"}


def read_nifti(path: Path, versions: tuple[int, ...]) -> tuple[NiftiHeader, VoxelData]:
    """Read a NIfTI file's header and find its voxels.

    Args:
        path: Existing file that ends with .nii or .nii.gz.
        versions: Of the format, that are taken.

    Raises:
        VolumeError: If the header is not one of the format, or describes what is no 3D image of plain numbers.
    """
    with path.open("rb") as file:
        is_gzip = file.read(2) == GZIP_MAGIC
    if is_gzip and path.name.lower().endswith(".nii"):
        raise VolumeError("the file is gzip-compressed, but its name ends with .nii: end it with .nii.gz")
    content = _read_start(path, is_gzip, HEADER_BYTES[1])
    version, order = _NIFTI_MARKS.get(content[:4], (1, ""))
    if version not in versions:
        raise VolumeError(f"the file must be NIfTI-1, got NIfTI-{version}: save it as NIfTI-1, .nrrd or .mha")
    content = _read_start(path, is_gzip, HEADER_BYTES[version])
    mark = content[344:348] if version == 1 else content[4:8]
    if not order or mark != f"n+{version}\0".encode():
        raise VolumeError(f"this is not a NIfTI-{version} file: its header lacks the format's mark; {_EXPORT_AGAIN}")
    if version == 2 and content[8:12] not in (b"\r\n\x1a\n", bytes(4)):
        raise VolumeError(f"the header is damaged, as by a transfer in text mode; {_EXPORT_AGAIN}")
    header = NiftiHeader.parse(content, version, order)
    _nifti_dimension(header.dim)
    if header.datatype not in _NIFTI_BYTES:
        kind = _NIFTI_NOT_PLAIN.get(header.datatype, f"type code {header.datatype}")
        raise VolumeError(f"voxels must be plain integers or floats, got {kind}: convert the image")
    if not 0 <= header.voxel_offset <= _LONGEST_HEADER_BYTES:
        raise VolumeError(
            f"voxels must begin within 16 MiB, the header says byte {header.voxel_offset}: correct the header"
        )
    offset = max(int(header.voxel_offset), len(content))
    return header, VoxelData(
        path=path,
        offset=0 if is_gzip else offset,
        stored_bytes=path.stat().st_size - (0 if is_gzip else offset),
        compression="gzip" if is_gzip else "none",
        prefix=_read_start(path, is_gzip, offset) if is_gzip else b"",
        bytes_per_voxel=_NIFTI_BYTES[header.datatype],
        float_type={16: f"{order}f4", 64: f"{order}f8"}.get(header.datatype, ""),
        nifti=header,
    )


def _locate_nifti(path: Path) -> VoxelData:
    """Refuse also what ITK reads wrongly or with noise."""
    header, data = read_nifti(path, versions=(1,))
    spacing = header.pixdim[1 : 1 + _nifti_dimension(header.dim)]
    if not all(math.isfinite(step_mm) and step_mm > 0 for step_mm in spacing):
        raise VolumeError(f"spacing must be finite and above 0 mm, got {spacing} (x, y, z): correct the header")
    qform = (*header.quaternion, *header.qoffset)
    for code, placed in ((header.qform_code, qform), (header.sform_code, header.sform)):
        if code > 0 and not all(map(math.isfinite, placed)):
            raise VolumeError(f"origin and direction must be finite, got {placed}: correct the header")
    return data


def _nifti_dimension(dim: tuple[int, ...]) -> int:
    """Accept two or three axes, and further ones only of length 1, as ITK does."""
    if not 1 <= dim[0] <= 7 or any(length < 1 for length in dim[1 : dim[0] + 1]):
        raise VolumeError(f"every axis must have a length of at least 1, the header says {dim}; {_EXPORT_AGAIN}")
    axes = max((axis for axis in range(1, dim[0] + 1) if dim[axis] > 1), default=0)
    dimension = dim[0] if dim[0] < 3 or axes > 3 else 3
    check_dimension(dimension)
    return dimension


def check_dimension(dimension: int) -> None:
    """Refuse images that are neither 3D nor 2D.

    Raises:
        VolumeError: If `dimension` is another.
    """
    if dimension not in (2, 3):
        raise VolumeError(f"an image must be 3D, or 2D, got {dimension}D: pass one 3D file per channel or time point")


def _read_start(path: Path, is_gzip: bool, count: int) -> bytes:
    """Read the first `count` bytes, decompressed."""
    inflater = zlib.decompressobj(wbits=31)
    start = b""
    with path.open("rb") as file:
        try:
            while len(start) < count and (piece := inflater.unconsumed_tail or file.read(1 << 14)):
                start += inflater.decompress(piece, count - len(start)) if is_gzip else piece[: count - len(start)]
        except zlib.error as error:
            raise IncompleteFile(f"compressed data are damaged ({error}); {_EXPORT_AGAIN}") from None
    if len(start) < count:
        raise IncompleteFile(
            f"the header must have {count} bytes, got {len(start)}: the file is cut off; {_EXPORT_AGAIN}"
        )
    return start


# ---- MetaImage: lines "Key = value", ElementDataFile is the last one -------------------------------------------------

_INTEGER, _DECIMAL = r"-?\d{1,9}", r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?"
_META_NUMBERS = {  # key: how many numbers it must have, as a power of NDims, and their form
    "DimSize": (1, _INTEGER),
    "ElementNumberOfChannels": (0, _INTEGER),
    "HeaderSize": (0, _INTEGER),
    "CompressedDataSize": (0, r"\d{1,18}"),
    **dict.fromkeys(("ElementSpacing", "ElementSize", "CenterOfRotation"), (1, _DECIMAL)),
    **dict.fromkeys(("Offset", "Position", "Origin"), (1, _DECIMAL)),
    **dict.fromkeys(("TransformMatrix", "Rotation", "Orientation"), (2, _DECIMAL)),
}
_META_SEVERAL = r"LIST|.*%"  # MetaIO takes every name with % for a pattern


def _locate_metaimage(path: Path) -> VoxelData:
    lines, end = _header_lines(path, lambda line: line.startswith("ElementDataFile"))
    _check_end(lines, "ObjectType", lines[-1:] != [] and lines[-1].startswith("ElementDataFile"))
    fields: dict[str, str] = {}
    for line in lines:
        match = re.fullmatch(r"\s*(\S+)\s*[=:]\s*(.*?)\s*", line)
        if match is None or match[1] in fields or len(line) > 4000:  # MetaIO's own buffers are of a fixed size
            raise VolumeError(f"this is not a MetaImage file: bad line {line[:40]!r} in its header; {_EXPORT_AGAIN}")
        fields[match[1]] = match[2]
    if not {"NDims", "DimSize", "ElementType", "ElementDataFile"} <= fields.keys():
        raise VolumeError(f"this is not a MetaImage file: its header is incomplete; {_EXPORT_AGAIN}")
    if re.fullmatch(r"\d{1,2}", fields["NDims"]) is None:
        raise VolumeError(f"NDims must be 2 or 3, got {fields['NDims'][:40]!r}; {_EXPORT_AGAIN}")
    dimension = int(fields["NDims"])
    check_dimension(dimension)
    for key in _META_NUMBERS.keys() & fields.keys():
        power, form = _META_NUMBERS[key]
        _check_numbers(key, fields[key], dimension**power, form)
    compressed = fields.get("CompressedData", "False")[:1] in ("T", "t", "1")
    is_inside = fields["ElementDataFile"] in ("LOCAL", "Local", "local")
    if fields.get("HeaderSize") == "-1" and not (compressed or is_inside):
        del fields["HeaderSize"]  # the voxels are the last bytes of the data file
    for key, only in (("ElementNumberOfChannels", "1"), ("HeaderSize", "0"), ("BinaryData", "True")):
        if fields.get(key, only).lower() != only.lower():
            raise VolumeError(f"{key} must be {only}, got {fields[key][:40]!r}: convert the image")
    if any(int(size) < 1 for size in fields["DimSize"].split()):
        raise VolumeError(f"every axis must have a length of at least 1, got DimSize {fields['DimSize']}")
    data_file = path if is_inside else find_data_file(path, fields["ElementDataFile"], _META_SEVERAL)
    data = _text_format_data(data_file, end if is_inside else 0, compressed)
    if compressed and int(fields.get("CompressedDataSize", 0)) > data.stored_bytes:
        raise IncompleteFile(f"the file is cut off: the header promises more bytes; {_EXPORT_AGAIN}")
    return data


def _check_numbers(key: str, text: str, count: int, form: str) -> None:
    """Check a field of numbers: MetaIO itself takes what it cannot parse for 0."""
    words = text.split()
    if len(words) != count or not all(re.fullmatch(form, word) and math.isfinite(float(word)) for word in words):
        raise VolumeError(f"{key} must be {count} finite number(s), got {text[:60]!r}; {_EXPORT_AGAIN}")


# ---- NRRD: lines "field: value", an empty line is the last one, https://teem.sourceforge.net/nrrd/format.html --------

_NRRD_SEVERAL = r"LIST|.*%\d*d"


def _locate_nrrd(path: Path) -> VoxelData:
    lines, end = _header_lines(path, lambda line: not line)
    names_data = any(re.match(r"data ?file:", line) for line in lines)  # behind which a header may just end
    _check_end(lines, "NRRD000", lines[-1:] == [""] or names_data)
    if not lines or re.fullmatch(r"NRRD000[1-5]", lines[0]) is None:
        raise VolumeError(f"this is not an NRRD file: it does not begin with NRRD0001 to NRRD0005; {_EXPORT_AGAIN}")
    pairs = (line.split(":", 1) for line in lines[1:] if re.match(r"[^#:]+:(?!=)", line))  # no comments, no user's keys
    fields = {key.lower().replace(" ", ""): value.strip() for key, value in pairs}
    for key in ("spacings", "spacedirections", "spaceorigin"):
        if re.search(r"nan|inf", fields.get(key, ""), re.IGNORECASE):
            raise VolumeError(f"{key} must be finite, got {fields[key][:60]!r}: correct the header")
    encoding = fields.get("encoding", "").lower()
    if encoding not in ("raw", "gzip", "gz"):
        raise VolumeError(f"encoding must be raw or gzip, got {encoding[:40]!r}: convert the image")
    is_inside = "datafile" not in fields
    if fields.get("byteskip") == "-1" and encoding == "raw" and not is_inside:
        del fields["byteskip"]  # the voxels are the last bytes of the data file
    for key in ("lineskip", "byteskip"):
        if fields.get(key, "0") != "0":
            raise VolumeError(f"{key} must be 0, got {fields[key][:40]!r}: convert the image")
    data_file = path if is_inside else find_data_file(path, fields["datafile"], _NRRD_SEVERAL)
    return _text_format_data(data_file, end if is_inside else 0, encoding != "raw")


# ---- shared by the text formats --------------------------------------------------------------------------------------


def _header_lines(path: Path, is_last: Callable[[str], bool]) -> tuple[list[str], int]:
    """Read the lines of a text header, up to and with the last one or the file's end, and the bytes they take."""
    lines: list[str] = []
    with path.open("rb") as file:
        while file.tell() < _LONGEST_HEADER_BYTES and (line := file.readline(_LONGEST_LINE_BYTES)):
            lines.append(line.decode("latin-1").rstrip("\r\n"))
            if is_last(lines[-1]) or b"\0" in line:
                break
        return lines, file.tell()


def _check_end(lines: list[str], mark: str, has_end: bool) -> None:
    """Tell a text header that is cut off from a file of another kind.

    Raises:
        IncompleteFile: If the lines begin as the format does, or a file that is cut off within its first word, and do
            not come to the header's end.
    """
    begins_so = bool(lines) and bool(lines[0]) and mark.startswith(lines[0][: len(mark)])
    if begins_so and not has_end:
        raise IncompleteFile(f"the header has no end: the file is cut off; {_EXPORT_AGAIN}")


def _text_format_data(path: Path, offset: int, is_compressed: bool) -> VoxelData:
    """Describe the voxels from a place in a file on."""
    compression = "none"
    if is_compressed:
        with path.open("rb") as file:
            file.seek(offset)
            compression = "gzip" if file.read(2) == GZIP_MAGIC else "zlib"
    return VoxelData(path=path, offset=offset, stored_bytes=path.stat().st_size - offset, compression=compression)


# ---- GIPL: 256 bytes, big-endian -------------------------------------------------------------------------------------


def _locate_gipl(path: Path) -> VoxelData:
    with path.open("rb") as file:
        header = file.read(256)
    if len(header) < 256:
        raise IncompleteFile(f"a GIPL header has 256 bytes, got {len(header)}: the file is cut off; {_EXPORT_AGAIN}")
    if header[252:] not in (b"\xef\xff\xe9\xb0", b"\x2a\xe3\x89\xb8"):
        raise VolumeError(f"this is not a GIPL file: its header lacks the format's mark; {_EXPORT_AGAIN}")
    size = struct.unpack_from(">3H", header)
    if 0 in size[:2]:  # no third axis: 2D
        raise VolumeError(f"every axis must have a length of at least 1, the header says {size}; {_EXPORT_AGAIN}")
    return VoxelData(path=path, offset=256, stored_bytes=path.stat().st_size - 256, compression="none")
