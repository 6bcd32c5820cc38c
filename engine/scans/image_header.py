"""Header of an image file -> where its voxels lie and how many bytes they must have.

ITK reads the voxels, but it must not be the first to read a header. A damaged header makes it crash (MetaImage), print
to stderr (NIfTI), or use a spacing of 1 mm without a message. So the fields that decide size, place and spacing are
checked here.
"""

import math
import struct
import zlib
from pathlib import Path

from ..errors import IncompleteFile, VolumeError
from .nifti import DATA_TYPES, HEADER_BYTES, NiftiHeader
from .text_header import locate_metaimage, locate_nrrd
from .voxel_data import EXPORT_AGAIN, GZIP_MAGIC, LONGEST_HEADER_BYTES, VoxelData, check_dimension

IMAGE_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd", ".gipl")
DETACHED_ENDINGS = (".nhdr", ".mhd")
"""Endings of headers that have their voxels in another file."""


def image_ending(path: Path) -> str:
    """Find which of `IMAGE_ENDINGS` a file name has.

    Raises:
        VolumeError: If it has none of them.
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
        Where the voxels are. ITK tells their number from the same header, later.

    Raises:
        VolumeError: If the header is not valid, or the file is not an image of plain numbers in 2D or 3D.
    """
    ending = image_ending(path)
    if ending in (".nii", ".nii.gz"):
        return _locate_nifti(path)
    if ending in (".mha", ".mhd"):
        return locate_metaimage(path)
    if ending in (".nrrd", ".nhdr"):
        return locate_nrrd(path)
    return _locate_gipl(path)


# ---- NIfTI: 348 or 540 bytes -----------------------------------------------------------------------------------------

_NIFTI_MARKS = {  # first four bytes: version and byte order
    size.to_bytes(4, "little" if order == "<" else "big"): (version, order)
    for version, size in HEADER_BYTES.items()
    for order in "<>"
}
_NIFTI_NOT_PLAIN = {32: "complex", 1792: "complex", 2048: "complex", 128: "colour (RGB)", 2304: "colour (RGBA)"}


def read_nifti(path: Path, versions: tuple[int, ...]) -> tuple[NiftiHeader, VoxelData]:
    """Read a NIfTI file's header and find its voxels.

    Args:
        path: Existing file that ends with .nii or .nii.gz.
        versions: Versions of the format to accept.

    Raises:
        VolumeError: If the header is not valid, or the file is not an image of plain numbers.
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
        raise VolumeError(f"this is not a NIfTI-{version} file: its header lacks the format's mark; {EXPORT_AGAIN}")
    if version == 2 and content[8:12] not in (b"\r\n\x1a\n", bytes(4)):
        raise VolumeError(f"the header is damaged, as by a transfer in text mode; {EXPORT_AGAIN}")
    header = NiftiHeader.parse(content, version, order)
    _nifti_dimension(header.dim)
    if header.datatype not in DATA_TYPES:
        kind = _NIFTI_NOT_PLAIN.get(header.datatype, f"type code {header.datatype}")
        raise VolumeError(f"voxels must be plain integers or floats, got {kind}: convert the image")
    if not 0 <= header.voxel_offset <= LONGEST_HEADER_BYTES:
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
        bytes_per_voxel=header.dtype.itemsize,
        float_type=header.dtype.str if header.dtype.kind == "f" else "",
        nifti=header,
    )


def _locate_nifti(path: Path) -> VoxelData:
    """Refuse also headers that ITK reads wrongly, or for which it prints to stderr."""
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
    """Accept two or three axes, and more only if their length is 1, as ITK does."""
    if not 1 <= dim[0] <= 7 or any(length < 1 for length in dim[1 : dim[0] + 1]):
        raise VolumeError(f"every axis must have a length of at least 1, the header says {dim}; {EXPORT_AGAIN}")
    axes = max((axis for axis in range(1, dim[0] + 1) if dim[axis] > 1), default=0)
    dimension = dim[0] if dim[0] < 3 or axes > 3 else 3
    check_dimension(dimension)
    return dimension


def _read_start(path: Path, is_gzip: bool, count: int) -> bytes:
    """Read the first `count` bytes, decompressed."""
    inflater = zlib.decompressobj(wbits=31)
    start = b""
    with path.open("rb") as file:
        try:
            while len(start) < count and (piece := inflater.unconsumed_tail or file.read(1 << 14)):
                start += inflater.decompress(piece, count - len(start)) if is_gzip else piece[: count - len(start)]
        except zlib.error as error:
            raise IncompleteFile(f"compressed data are damaged ({error}); {EXPORT_AGAIN}") from None
    if len(start) < count:
        raise IncompleteFile(
            f"the header must have {count} bytes, got {len(start)}: the file is cut off; {EXPORT_AGAIN}"
        )
    return start


# ---- GIPL: 256 bytes, big-endian -------------------------------------------------------------------------------------


def _locate_gipl(path: Path) -> VoxelData:
    with path.open("rb") as file:
        header = file.read(256)
    if len(header) < 256:
        raise IncompleteFile(f"a GIPL header has 256 bytes, got {len(header)}: the file is cut off; {EXPORT_AGAIN}")
    if header[252:] not in (b"\xef\xff\xe9\xb0", b"\x2a\xe3\x89\xb8"):
        raise VolumeError(f"this is not a GIPL file: its header lacks the format's mark; {EXPORT_AGAIN}")
    size = struct.unpack_from(">3H", header)
    if 0 in size[:2]:  # no third axis: 2D
        raise VolumeError(f"every axis must have a length of at least 1, the header says {size}; {EXPORT_AGAIN}")
    return VoxelData(path=path, offset=256, stored_bytes=path.stat().st_size - 256, compression="none")
