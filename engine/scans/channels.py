"""Opens the files of a scan, one for each channel, checks that they lie on one grid, and reads them into one array."""

import os
from pathlib import Path

import numpy as np

from ..errors import VolumeError
from .geometry import SAME_DIRECTION, SAME_ORIGIN, SAME_SPACING, Geometry
from .image_file import NOT_FINITE, ImageSource, open_image_file
from .nifti import NIBABEL_READERS, NIFTI_ENDINGS
from .nifti_file import open_as_nibabel
from .pictures import PICTURE_READERS, open_picture
from .voxel_data import naming


def open_source(path: Path, reader: str) -> ImageSource:
    """Open one file, or a folder with the slices of one DICOM series.

    Args:
        path: File or folder.
        reader: nnU-Net's reader class, as `Plan.reader` names it.

    Raises:
        VolumeError: If there is no such file or folder, or it cannot be read.
    """
    if not str(path).isprintable() and any("\udc80" <= character <= "\udcff" for character in str(path)):
        raise VolumeError(f"{str(path)!r}: the libraries that read scans need names in UTF-8: rename it")
    if reader in PICTURE_READERS and (path.is_file() or path.is_dir()):
        return open_picture(path, reader)
    if path.is_dir():
        from .dicom import open_series  # with what it needs, half of this wing's modules

        return open_series(path)
    if path.is_file() and reader in NIBABEL_READERS and path.name.lower().endswith(NIFTI_ENDINGS):
        return open_as_nibabel(path, reader)
    if path.is_file():
        return open_image_file(path)
    if path.exists():
        raise VolumeError(f"{path}: a scan must be a file or a folder, got a device, pipe or socket: pass a file")
    if path.is_symlink():
        raise VolumeError(f"{path.name}: a link to {os.readlink(path)}, which does not exist: repair the link")
    raise VolumeError(f"{str(path)!r}: there is no such file or folder: check the path")


def check_channel_count(name: str, count: int, expected: int | None) -> None:
    """Check that a scan has as many channels as the model takes.

    Raises:
        VolumeError: If it has another number.
    """
    if expected is not None and count != expected:
        raise VolumeError(
            f"{name}: the model takes {expected} channel(s), got {count}: pass one file per channel in the order of "
            "training, such as case_0000.nii.gz, case_0001.nii.gz (a picture holds 1, 3 for RGB, or 4 with alpha)"
        )


def geometry_of(source: ImageSource) -> Geometry:
    """Check where a source says its voxels lie.

    Raises:
        VolumeError: As `Geometry` does, with the source's name.
    """
    x_mm, y_mm, z_mm = source.spacing
    with naming(source.name):
        return Geometry(
            spacing=(z_mm, y_mm, x_mm), origin=source.origin, direction=source.direction, is_2d=source.is_2d
        )


def check_same_grid(sources: list[ImageSource], geometries: list[Geometry]) -> None:
    """Check that all channels lie on the grid of the first.

    Raises:
        VolumeError: If one does not.
    """
    first = geometries[0]
    origin_mm = SAME_ORIGIN * min(first.spacing)
    for source, other in zip(sources, geometries, strict=True):
        for what, mine, expected, relative, absolute in (
            ("number of dimensions", 2 if other.is_2d else 3, 2 if first.is_2d else 3, 0, 0),
            ("shape (x, y, z)", source.size, sources[0].size, 0, 0),
            ("spacing (z, y, x)", other.spacing, first.spacing, SAME_SPACING, 0),
            ("pixdim (x, y, z)", *(each.resampling_spacing or each.spacing for each in (source, sources[0])), 1e-6, 0),
            ("origin", other.origin, first.origin, 0, origin_mm),
            ("direction", other.direction, first.direction, 0, SAME_DIRECTION),
        ):
            if not np.allclose(mine, expected, rtol=relative, atol=absolute):
                raise VolumeError(
                    f"{source.name}: all channels must have the same {what}, got {mine}, but {sources[0].name} has "
                    f"{expected}: resample the channels to one grid"
                )


def read_channels(sources: list[ImageSource]) -> np.ndarray:
    """Read all channels into one array (C, Z, Y, X); those of a single file are not copied.

    Raises:
        VolumeError: If voxels are missing, damaged or not finite.
    """
    channels = []
    for source in sources:
        channels.append(source.voxels().reshape(source.channels, *source.size[::-1]))
        check_finite(source.name, channels[-1])
    return channels[0] if len(channels) == 1 else np.concatenate(channels)


def check_finite(name: str, array: np.ndarray) -> None:
    """Refuse NaN and infinity; minimum and maximum show them without a mask in memory.

    Raises:
        VolumeError: If a voxel is not finite.
    """
    if array.dtype.kind != "f":
        return
    with np.errstate(invalid="ignore"):
        is_finite = np.isfinite(array.min()) and np.isfinite(array.max())
    if not is_finite:
        raise VolumeError(f"{name}: {NOT_FINITE}")
