"""A folder with the slices of one DICOM series -> one scan.

Slices are ordered by their position along the normal of the image plane; neither file names nor instance numbers count.
"""

import logging
import mmap
import re
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .errors import VolumeError
from .image_file import ImageSource
from .image_header import naming
from .itk import check_memory, check_pixels, read_information, read_voxels

_GDCM = "GDCMImageIO"
_SERIES, _DESCRIPTION, _POSITION = "0020|000e", "0008|103e", "0020|0032"
_PIXEL_DATA = b"\xe0\x7f\x10\x00"  # the tag (7fe0,0010) as it lies in a little-endian file
_LONG_KINDS = (b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV")
_SCAN_CLASSES = rb"1\.2\.840\.10008\.5\.1\.4\.1\.1\.(2|4|128)(\.1)?\0"  # CT, MR and PET slices

_FARTHEST_MM = 1e6
_SAME_POSITION_MM = 0.01
_UNEVEN = 0.01  # part of the usual slice distance by which one may differ
_SIDEWAYS = 0.5  # part of the in-plane spacing by which slices may drift

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """Header of one DICOM file that holds one image: size and spacing are (x, y), the rest as in `ImageSource`."""

    path: Path
    series: str
    description: str
    size: tuple[int, int]
    spacing: tuple[float, float]
    origin: tuple[float, float, float]
    direction: tuple[float, ...]
    dtype: np.dtype

    @property
    def normal(self) -> np.ndarray:
        """Unit vector along which slices are stacked: the third column of the direction."""
        return np.array(self.direction[2::3])

    @property
    def position_mm(self) -> float:
        """Place along the normal."""
        return float(np.dot(self.origin, self.normal))


def open_series(folder: Path) -> ImageSource:
    """Take the slices of a folder as one scan.

    Returns:
        The grid of the stacked slices, with a function that reads the voxels; rescale slope and intercept are applied.
        The spacing along z is the mean distance between slice positions, as in ITK; gaps are told in a warning.

    Raises:
        VolumeError: As `list_slices`.
    """
    slices = list_slices(folder)
    with naming(folder.name):
        first = slices[0]
        size = (*first.size, len(slices))
        dtype = np.result_type(*{part.dtype for part in slices})  # PET slices have slopes of their own
        check_memory(size, dtype)
        warnings, distance_mm = _check_positions(slices)
    return ImageSource(
        name=folder.name,
        size=size,
        spacing=(*first.spacing, distance_mm),
        origin=first.origin,
        direction=first.direction,
        voxels=lambda: _stack(folder.name, slices, dtype),
        warnings=warnings,
    )


def list_slices(folder: Path) -> list[Slice]:
    """Read the headers of all DICOM slices in a folder, check that they are one series, and put them in order.

    Files that are no DICOM images (a README, a DICOMDIR, reports) are skipped; subfolders are not searched.

    Args:
        folder: Existing folder with at least two slices of one series.

    Raises:
        VolumeError: If there are no slices, several series, duplicates, or slices that do not fit each other.
    """
    with naming(folder.name):
        files = sorted(path for path in folder.iterdir() if path.is_file())
        slices = [part for path in files if looks_like_dicom(path) and (part := _read_slice(path)) is not None]
        if not slices:
            raise VolumeError(
                f"a folder must hold the slices of one DICOM series, got {len(files)} other file(s) and no slice: "
                "pass the series' own folder, or for .nii.gz and other images the file itself"
            )
        _check_one_series(slices)
        _check_same_plane(slices)
    return sorted(slices, key=lambda part: part.position_mm)


def looks_like_dicom(path: Path) -> bool:
    """Recognise a preamble with its mark or, in old exports, a first tag of group 0002 or 0008."""
    with path.open("rb") as file:
        start = file.read(132)
    return start[128:] == b"DICM" or (start[:2] in (b"\x02\0", b"\x08\0") and start[3:4] == b"\0")


def _read_slice(path: Path) -> Slice | None:
    """Read the header of a DICOM file; None if it holds no image."""
    with naming(path.name):
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if content.find(_PIXEL_DATA) < 0 and re.search(_SCAN_CLASSES, content[:1024]) is None:
                logger.debug("%s: skipped, a DICOM file without an image", path)
                return None
            if _is_broken(content):
                raise VolumeError("the DICOM slice is cut off or damaged: export or copy it again")
        info = read_information(str(path), _GDCM)
        dtype = check_pixels(info)
        size, spacing = info.GetSize(), info.GetSpacing()
        if size[2] != 1 or not info.HasMetaDataKey(_POSITION):
            raise VolumeError(
                f"a DICOM file must hold one slice and its position (ImagePositionPatient), got {size[2]} slice(s), "
                f"position {'given' if info.HasMetaDataKey(_POSITION) else 'missing'}: convert the series to .nii.gz"
            )
    tags = {key: info.GetMetaData(key).strip("\0 ") for key in (_SERIES, _DESCRIPTION) if info.HasMetaDataKey(key)}
    return Slice(
        path=path,
        series=tags.get(_SERIES, ""),
        description=tags.get(_DESCRIPTION, ""),
        size=size[:2],
        spacing=spacing[:2],
        origin=info.GetOrigin(),
        direction=info.GetDirection(),
        dtype=dtype,
    )


def _is_broken(content: mmap.mmap) -> bool:
    """Walk over a file's elements and tell whether one is longer than the file.

    GDCM would take memory for whatever length an element claims, and seconds to find out.

    Note:
        DICOM PS3.5, section 7.1. Sequences and their items are stepped into, not over, so that no recursion is needed.
        Files that cannot be walked so (big-endian, deflated, sequences of unknown type) are left to GDCM.
    """
    place = 132 if content[128:132] == b"DICM" else 0
    is_explicit, is_dataset, in_pixels, syntax = True, place == 0, False, b""
    if is_dataset:
        is_explicit = re.fullmatch(rb"[A-Z]{2}", content[4:6]) is not None
    while place + 8 <= len(content):
        group, element, length = struct.unpack_from("<HHI", content, place)
        if not is_dataset and group != 2:
            is_dataset, is_explicit = True, syntax != b"1.2.840.10008.1.2"
            if syntax in (b"1.2.840.10008.1.2.2", b"1.2.840.10008.1.2.1.99"):
                return False
        kind = content[place + 4 : place + 6] if is_explicit and group != 0xFFFE else b""
        place += 8
        if kind in _LONG_KINDS:
            length = int.from_bytes(content[place : place + 4], "little")
            place += 4
        elif kind:
            if re.fullmatch(rb"[A-Z]{2}", kind) is None:
                return kind not in (b"??", b"\0\0")  # which some old exports have
            length >>= 16
        if length == 0xFFFFFFFF:
            if kind == b"UN":
                return False
            in_pixels = in_pixels or (group, element) == (0x7FE0, 0x0010)
        elif kind != b"SQ" and ((group, element) != (0xFFFE, 0xE000) or in_pixels):
            if (group, element) == (2, 0x10):
                syntax = content[place : place + length].rstrip(b"\0 ")
            place += length
        in_pixels = in_pixels and (group, element) != (0xFFFE, 0xE0DD)
    return in_pixels or place > len(content)


def _check_one_series(slices: list[Slice]) -> None:
    """Refuse several series, and list them so that the user can choose."""
    series: dict[str, list[Slice]] = {}
    for part in slices:
        series.setdefault(part.series, []).append(part)
    if len(series) > 1:
        listed = ", ".join(
            f"{uid or 'without UID'} ({parts[0].description or 'no description'}; {len(parts)} slices, "
            f"such as {parts[0].path.name})"
            for uid, parts in series.items()
        )
        raise VolumeError(
            f"a folder must hold one DICOM series, got {len(series)}: {listed}: "
            "move the one to predict into a folder of its own"
        )


def _check_same_plane(slices: list[Slice]) -> None:
    """Refuse slices of another size, in-plane spacing or orientation than the first."""
    first = slices[0]
    for part in slices:
        for what, mine, others, tolerance in (
            ("size", part.size, first.size, 0),
            ("spacing", part.spacing, first.spacing, 1e-3 * min(first.spacing)),
            ("orientation", part.direction, first.direction, 1e-3),
        ):
            if not np.allclose(mine, others, rtol=0, atol=tolerance):
                raise VolumeError(
                    f"all slices must have the same {what}, got {mine} in {part.path.name} and {others} in "
                    f"{first.path.name}: move localizers and other images out of the folder"
                )


def _check_positions(slices: list[Slice]) -> tuple[tuple[str, ...], float]:
    """Check the positions of sorted slices.

    Returns:
        Warnings about gaps and sideways drift, and the mean distance in mm.
    """
    if len(slices) < 2:
        raise VolumeError(f"a series must have at least two slices, got only {slices[0].path.name}: pass a 3D scan")
    positions = np.array([part.position_mm for part in slices])
    if not (np.abs(positions) < _FARTHEST_MM).all():
        raise VolumeError(f"slice positions must be below {_FARTHEST_MM:g} mm, got {positions[-1]}: export it again")
    distances = np.diff(positions)
    nearest = int(np.argmin(distances))
    if distances[nearest] < _SAME_POSITION_MM:
        raise VolumeError(
            f"every slice must have its own position, but {slices[nearest].path.name} and "
            f"{slices[nearest + 1].path.name} are both at {positions[nearest]:.2f} mm: remove copies, and pass phases "
            "or time points one by one"
        )
    usual_mm = float(np.sort(distances)[(len(distances) - 1) // 2])
    warnings = []
    gaps = [
        f"{positions[k]:.2f} to {positions[k + 1]:.2f} mm ({max(round(distances[k] / usual_mm) - 1, 0)} missing)"
        for k in np.flatnonzero(np.abs(distances - usual_mm) > _UNEVEN * usual_mm)
    ]
    if gaps:
        warnings.append(
            f"slice distance is uneven, usually {usual_mm:.4g} mm, but not at {', '.join(gaps[:5])}"
            f"{f' and {len(gaps) - 5} more' if len(gaps) > 5 else ''}: slices may be missing, positions are approximate"
        )
    sideways = np.array([part.origin for part in slices]) - np.outer(positions, slices[0].normal)
    drift_mm = float(np.abs(sideways - sideways[0]).max())
    if drift_mm > _SIDEWAYS * min(slices[0].spacing):
        warnings.append(f"slices shift sideways by up to {drift_mm:.1f} mm (tilted gantry?): they are stacked straight")
    return tuple(warnings), float(positions[-1] - positions[0]) / len(distances)


def _stack(name: str, slices: list[Slice], dtype: np.dtype) -> np.ndarray:
    """Read slice after slice into one array (Z, Y, X)."""
    voxels = np.empty((len(slices), *reversed(slices[0].size)), dtype)
    for index, part in enumerate(slices):
        with naming(f"{name}: {part.path.name}"):
            voxels[index] = read_voxels(str(part.path), _GDCM)[0]
    return voxels
