"""A folder with the slices of one DICOM series -> one scan.

Slices are ordered by their position along the normal of the image plane. File names and instance numbers are ignored.
"""

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..errors import VolumeError
from .dicom_files import DicomFile, find_slices, summary
from .dicom_header import Header
from .dicom_pixels import PixelFormat, check_pixel_data, read_format, read_stored, rescale
from .image_file import ImageSource
from .itk import check_memory
from .voxel_data import naming

_FARTHEST_MM = 1e6
_SAME_POSITION_MM = 0.01
_UNEVEN = 0.01  # largest deviation, as a part of the usual slice distance
_SIDEWAYS = 0.5  # largest drift of slices, as a part of the in-plane spacing
_SKEW = 0.01  # cosine between rows and columns, which should be 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """One slice of a scan: size and spacing are (x, y), the rest as in `ImageSource`."""

    path: Path
    header: Header = field(repr=False)
    pixels: PixelFormat
    spacing: tuple[float, float]
    origin: tuple[float, float, float]
    direction: tuple[float, ...]

    @property
    def size(self) -> tuple[int, int]:
        """Pixels along (x, y)."""
        return self.pixels.columns, self.pixels.rows

    @property
    def normal(self) -> np.ndarray:
        """Unit vector from slice to slice: the third column of the direction."""
        return np.array(self.direction[2::3])

    @property
    def position_mm(self) -> float:
        """Position along the normal."""
        return float(np.dot(self.origin, self.normal))


def open_series(folder: Path) -> ImageSource:
    """Take the slices of a folder as one scan.

    Returns:
        The grid of the stacked slices, with a function that reads the voxels; rescale slope and intercept are applied.
        The spacing along z is the mean distance between slice positions, as in ITK. Warnings name files that are left
        out, gaps and, after the voxels are read, padding.

    Raises:
        VolumeError: As `list_slices`.
    """
    slices, left_out = list_slices(folder)
    with naming(folder.name):
        first = slices[0]
        size = (*first.size, len(slices))
        dtype = np.result_type(*{part.pixels.dtype for part in slices})  # PET slices have slopes of their own
        check_memory(size, dtype)
        about_positions, distance_mm = _check_positions(slices)
    warnings = [*left_out, *_check_rescaling(slices), *about_positions]
    return ImageSource(
        name=folder.name,
        size=size,
        spacing=(*first.spacing, distance_mm),
        origin=first.origin,
        direction=first.direction,
        voxels=lambda: _stack(folder.name, slices, dtype, warnings),
        warnings=warnings,
    )


def list_slices(folder: Path) -> tuple[list[Slice], tuple[str, ...]]:
    """Read the headers of all DICOM slices in a folder, check that they are one series, and put them in order.

    Args:
        folder: Existing folder with at least two slices of one series. Other files are left out; subfolders are not
            searched.

    Returns:
        The slices, and warnings about files that are left out.

    Raises:
        VolumeError: If there are no slices or several series, or if slices are damaged or do not fit together.
    """
    with naming(folder.name):
        found, warnings = find_slices(folder)
        slices = [_read_slice(part) for part in found]
        _check_same_plane(slices)
    return sorted(slices, key=lambda part: part.position_mm), warnings


def _read_slice(file: DicomFile) -> Slice:
    header = file.header
    with naming(file.path.name):
        frames, position = header.decimals("NumberOfFrames", 1) or (1,), header.decimals("ImagePositionPatient", 3)
        if frames != (1,) or position is None:
            raise VolumeError(
                "a DICOM file must hold one slice and its position (ImagePositionPatient), got "
                f"{frames[0]:g} slice(s), position {'missing' if position is None else 'given'}: convert the series to "
                ".nii.gz"
            )
        pixels = read_format(header)
        check_pixel_data(header, pixels)
        row_mm, column_mm = _read_spacing(header)
        return Slice(
            path=file.path,
            header=header,
            pixels=pixels,
            spacing=(column_mm, row_mm),
            origin=(position[0], position[1], position[2]),
            direction=_read_direction(header),
        )


def _read_spacing(header: Header) -> tuple[float, float]:
    """Read the distances of rows and of columns in mm."""
    spacing = header.decimals("PixelSpacing", 2)
    if spacing is None or not all(0 < step_mm < _FARTHEST_MM for step_mm in spacing):
        raise VolumeError(
            f"a slice must tell the distance of its pixels (PixelSpacing, above 0 mm), got {spacing or 'nothing'}: "
            "export the series again"
        )
    return spacing[0], spacing[1]


def _read_direction(header: Header) -> tuple[float, ...]:
    """Read the direction of the axes (x, y, z), as nine cosines.

    Note:
        As in ITK, itkGDCMImageIO.cxx: if the two are not exactly at a right angle, columns keep their direction.
    """
    cosines = header.decimals("ImageOrientationPatient", 6)
    if cosines is None:
        raise VolumeError(
            "a slice must tell how it is turned (ImageOrientationPatient), but that is missing: export the series "
            "again, or convert it to .nii.gz with a program that knows"
        )
    row, column = np.array(cosines[:3]), np.array(cosines[3:])
    lengths = np.linalg.norm(row), np.linalg.norm(column)
    if not (np.abs(np.subtract(lengths, 1)) < _SKEW).all() or not abs(row @ column) < _SKEW:
        raise VolumeError(
            f"ImageOrientationPatient must be two unit vectors at a right angle, got {cosines}: export the series again"
        )
    column = column / lengths[1]
    normal = np.cross(row, column)
    normal /= np.linalg.norm(normal)
    return tuple(np.stack([np.cross(column, normal), column, normal], axis=1).ravel().tolist())


def _check_same_plane(slices: list[Slice]) -> None:
    """Refuse slices whose size, in-plane spacing or orientation differs from the first slice."""
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


def _check_positions(slices: list[Slice]) -> tuple[list[str], float]:
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
    return warnings, float(positions[-1] - positions[0]) / len(distances)


def _check_rescaling(slices: list[Slice]) -> list[str]:
    """Warn if slices have no slope and intercept although CT and PET must have them, or other slices do."""
    without = [part for part in slices if not part.pixels.is_rescaled]
    if not without or (len(without) == len(slices) and without[0].header.text("Modality") not in ("CT", "PT")):
        return []
    names = summary(part.path.name for part in without)
    return [f"RescaleSlope and RescaleIntercept are missing in {names}: stored values are taken as they are"]


def _stack(name: str, slices: list[Slice], dtype: np.dtype, warnings: list[str]) -> np.ndarray:
    """Read slice after slice into one array (Z, Y, X), and add warnings about padding and extra bits."""
    voxels = np.empty((len(slices), *reversed(slices[0].size)), dtype)
    padding: dict[tuple[int, int], int] = {}
    with_more = []
    with tempfile.TemporaryDirectory(prefix="slices-") as scratch:
        for index, part in enumerate(slices):
            with naming(f"{name}: {part.path.name}"):
                stored = read_stored(part.path, part.header, part.pixels, Path(scratch) / "slice.dcm")
                count, has_more = rescale(stored, part.pixels, voxels[index])
            if part.pixels.padding is not None and count:
                padding[part.pixels.padding] = padding.get(part.pixels.padding, 0) + count
            if has_more:
                with_more.append(part.path.name)
    if padding:
        values = summary(f"{first}" if first == last else f"{first} to {last}" for first, last in padding)
        warnings.append(
            f"{sum(padding.values())} of {voxels.size} voxels hold the stored value of padding (PixelPaddingValue "
            f"{values}) and were not measured: they are rescaled like all others"
        )
    if with_more:
        warnings.append(
            f"bits above BitsStored are set in {summary(with_more)} (overlays?): by the standard they are no part of "
            "the values, and are left out"
        )
    return voxels
