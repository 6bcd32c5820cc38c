"""Text headers (MetaImage and NRRD) -> where their voxels lie."""

import math
import re
from collections.abc import Callable
from pathlib import Path

from ..errors import IncompleteFile, VolumeError
from .detached import find_data_file
from .voxel_data import EXPORT_AGAIN, GZIP_MAGIC, LONGEST_HEADER_BYTES, VoxelData, check_dimension

_LONGEST_LINE_BYTES = 64 << 10

# ---- MetaImage: lines "Key = value"; the last one is ElementDataFile -------------------------------------------------

_INTEGER, _DECIMAL = r"-?\d{1,9}", r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?"
_META_NUMBERS = {  # key: count of numbers as a power of NDims, and the form of a number
    "DimSize": (1, _INTEGER),
    "ElementNumberOfChannels": (0, _INTEGER),
    "HeaderSize": (0, _INTEGER),
    "CompressedDataSize": (0, r"\d{1,18}"),
    **dict.fromkeys(("ElementSpacing", "ElementSize", "CenterOfRotation"), (1, _DECIMAL)),
    **dict.fromkeys(("Offset", "Position", "Origin"), (1, _DECIMAL)),
    **dict.fromkeys(("TransformMatrix", "Rotation", "Orientation"), (2, _DECIMAL)),
}
_META_SEVERAL = r"LIST|.*%"  # MetaIO takes every name with % as a pattern


def locate_metaimage(path: Path) -> VoxelData:
    """Check the header of a MetaImage file and find its voxels.

    Args:
        path: Existing file that ends with .mha or .mhd.

    Raises:
        VolumeError: As `image_header.locate_voxels` does.
    """
    lines, end = _header_lines(path, lambda line: line.startswith("ElementDataFile"))
    _check_end(lines, "ObjectType", lines[-1:] != [] and lines[-1].startswith("ElementDataFile"))
    fields: dict[str, str] = {}
    for line in lines:
        match = re.fullmatch(r"\s*(\S+)\s*[=:]\s*(.*?)\s*", line)
        if match is None or match[1] in fields or len(line) > 4000:  # MetaIO's buffers have a fixed size
            raise VolumeError(f"this is not a MetaImage file: bad line {line[:40]!r} in its header; {EXPORT_AGAIN}")
        fields[match[1]] = match[2]
    if not {"NDims", "DimSize", "ElementType", "ElementDataFile"} <= fields.keys():
        raise VolumeError(f"this is not a MetaImage file: its header is incomplete; {EXPORT_AGAIN}")
    if re.fullmatch(r"\d{1,2}", fields["NDims"]) is None:
        raise VolumeError(f"NDims must be 2 or 3, got {fields['NDims'][:40]!r}; {EXPORT_AGAIN}")
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
        raise IncompleteFile(f"the file is cut off: the header promises more bytes; {EXPORT_AGAIN}")
    return data


def _check_numbers(key: str, text: str, count: int, form: str) -> None:
    """Check a field of numbers: MetaIO reads text that it cannot parse as 0."""
    words = text.split()
    if len(words) != count or not all(re.fullmatch(form, word) and math.isfinite(float(word)) for word in words):
        raise VolumeError(f"{key} must be {count} finite number(s), got {text[:60]!r}; {EXPORT_AGAIN}")


# ---- NRRD: lines "field: value"; the last one is empty; https://teem.sourceforge.net/nrrd/format.html --------

_NRRD_SEVERAL = r"LIST|.*%\d*d"


def locate_nrrd(path: Path) -> VoxelData:
    """Check the header of an NRRD file and find its voxels.

    Args:
        path: Existing file that ends with .nrrd or .nhdr.

    Raises:
        VolumeError: As `image_header.locate_voxels` does.
    """
    lines, end = _header_lines(path, lambda line: not line)
    names_data = any(re.match(r"data ?file:", line) for line in lines)  # such a header may end without an empty line
    _check_end(lines, "NRRD000", lines[-1:] == [""] or names_data)
    if not lines or re.fullmatch(r"NRRD000[1-5]", lines[0]) is None:
        raise VolumeError(f"this is not an NRRD file: it does not begin with NRRD0001 to NRRD0005; {EXPORT_AGAIN}")
    # Without comments and the user's own keys.
    pairs = (line.split(":", 1) for line in lines[1:] if re.match(r"[^#:]+:(?!=)", line))
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


# ---- shared by both --------------------------------------------------------------------------------------------------


def _header_lines(path: Path, is_last: Callable[[str], bool]) -> tuple[list[str], int]:
    """Read the lines of a text header, including the last one, and count their bytes; stop at the file's end."""
    lines: list[str] = []
    with path.open("rb") as file:
        while file.tell() < LONGEST_HEADER_BYTES and (line := file.readline(_LONGEST_LINE_BYTES)):
            lines.append(line.decode("latin-1").rstrip("\r\n"))
            if is_last(lines[-1]) or b"\0" in line:
                break
        return lines, file.tell()


def _check_end(lines: list[str], mark: str, has_end: bool) -> None:
    """Check that a text header is complete.

    A file of another format passes: it is refused later, for what it is.

    Raises:
        IncompleteFile: If the lines begin as the format does, or with a part of its first word, and have no end.
    """
    begins_so = bool(lines) and bool(lines[0]) and mark.startswith(lines[0][: len(mark)])
    if begins_so and not has_end:
        raise IncompleteFile(f"the header has no end: the file is cut off; {EXPORT_AGAIN}")


def _text_format_data(path: Path, offset: int, is_compressed: bool) -> VoxelData:
    """Describe voxels that begin at a byte of a file and reach to its end."""
    compression = "none"
    if is_compressed:
        with path.open("rb") as file:
            file.seek(offset)
            compression = "gzip" if file.read(2) == GZIP_MAGIC else "zlib"
    return VoxelData(path=path, offset=offset, stored_bytes=path.stat().st_size - offset, compression=compression)
