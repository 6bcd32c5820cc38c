"""A scan in memory: an array and where its voxels lie. It is read from files or DICOM folders, turned, and written.

The checks of files are in `image_file` (one file) and `dicom` (a folder of slices).
"""

import contextlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np

from ..errors import OutputError, VolumeError
from ..files import written_atomically
from .channels import (
    check_channel_count,
    check_finite,
    check_same_grid,
    geometry_of,
    open_source,
    read_channels,
)
from .geometry import IDENTITY_DIRECTION, Geometry, Triple
from .image_file import ImageSource
from .image_header import DETACHED_ENDINGS, locate_voxels
from .label_file import LABEL_ENDINGS, as_stored, write_label_file
from .orientation import canonical_axes
from .pictures import FLAT_ENDINGS, PICTURE_READERS, side_file

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Volume:
    """A scan: voxels as they are stored, and where they lie.

    Attributes:
        array: (C, Z, Y, X), any integer, float or bool type; it may be a view with any strides.
        geometry: Where the last three axes lie.
        name: File or folder name, for messages.
        warnings: Facts that the user should know although the scan can be used, such as missing slices.
        resampling_spacing: Millimetres (z, y, x) by which nnU-Net resamples, if they differ from those of `geometry`:
            through nibabel it takes them from the header's `pixdim`, also if the affine has others.

    Raises:
        TypeError: If `array` is not a numpy array of plain numbers in the machine's byte order.
        VolumeError: If `array` is not 4D, or is empty.
    """

    array: np.ndarray
    geometry: Geometry
    name: str = "volume"
    warnings: tuple[str, ...] = ()
    resampling_spacing: Triple | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.array, np.ndarray):
            raise TypeError(f"{self.name}: array must be a numpy.ndarray, got {type(self.array).__name__}")
        if self.array.dtype.kind not in "biuf" or self.array.itemsize > 8 or not self.array.dtype.isnative:
            raise TypeError(
                f"{self.name}: array must hold bool, integers or floats of up to 64 bits in native byte order, got "
                f"{self.array.dtype.str}: convert it with array.astype"
            )
        if self.array.ndim != 4 or self.array.size == 0:
            raise VolumeError(f"{self.name}: array must be (C, Z, Y, X) and not empty, got shape {self.array.shape}")

    @classmethod
    def from_array(
        cls,
        array: np.ndarray,
        spacing: Sequence[float],
        *,
        origin: Sequence[float] = (0.0, 0.0, 0.0),
        direction: Sequence[float] = IDENTITY_DIRECTION,
        name: str = "volume",
    ) -> "Volume":
        """Make a volume from an array, without a copy.

        Args:
            array: (Z, Y, X) for one channel, or (C, Z, Y, X).
            spacing: mm, in the order (z, y, x).
            origin: mm, LPS (x, y, z).
            direction: Nine cosines, row-major, as SimpleITK gives them.
            name: Used in messages.

        Returns:
            The volume.

        Raises:
            TypeError, ValueError, VolumeError: As `Volume` and `Geometry` do.
        """
        corner, steps = cast(Triple, tuple(origin)), cast(Triple, tuple(spacing))
        geometry = Geometry(spacing=steps, origin=corner, direction=tuple(direction))
        if isinstance(array, np.ndarray) and array.ndim == 3:
            array = array[None]
        return cls(array=array, geometry=geometry, name=name)

    @property
    def spacing(self) -> Triple:
        """Spacing (z, y, x) in mm by which the scan is resampled."""
        return self.resampling_spacing or self.geometry.spacing

    def reoriented(self) -> "Volume":
        """Turn the volume so that its axes (z, y, x) run to Superior, Anterior and Right, as far as its grid allows.

        Models trained with nnU-Net's `NibabelIOWithReorient` or `SimpleITKIOWithReorient` need this orientation.

        Returns:
            A volume of the same voxels at the same places; its array is a view, with negative strides where axes are
            flipped. `restore_orientation` undoes it.
        """
        return self._rearranged(*canonical_axes(self.geometry.axes))

    def oriented_as(self, other: Geometry) -> "Volume":
        """Turn the volume so that its axes follow those of another grid, as far as its own grid allows.

        Args:
            other: Geometry of the other grid as it was read, not reoriented.

        Returns:
            A volume of the same voxels at the same places; its array is a view.
        """
        source, flipped = canonical_axes(other.axes)
        back = tuple(source.index(axis) for axis in range(3))
        return self.reoriented()._rearranged(back, tuple(flipped[axis] for axis in back))

    def _rearranged(self, source: tuple[int, ...], flipped: tuple[bool, ...]) -> "Volume":
        """Reorder the axes (z, y, x) by their numbers in `source`, then flip those marked in `flipped`."""
        array = self.array.transpose(0, *(1 + axis for axis in source))
        array = array[(slice(None), *(slice(None, None, -1 if flip else 1) for flip in flipped))]
        spacing, resampling = (
            cast(Triple, tuple(steps[axis] for axis in source)) for steps in (self.geometry.spacing, self.spacing)
        )
        origin, axes = np.array(self.geometry.origin), self.geometry.axes
        turned = np.empty((3, 3))
        for target, (axis, flip) in enumerate(zip(source, flipped, strict=True)):
            column = axes[:, 2 - axis]  # array axis (z, y, x) number k is image axis (x, y, z) number 2 - k
            turned[:, 2 - target] = -column if flip else column
            if flip:  # the last voxel along this axis becomes the first
                origin = origin + column * self.geometry.spacing[axis] * (self.array.shape[1 + axis] - 1)
        geometry = replace(self.geometry, spacing=spacing, origin=tuple(origin), direction=tuple(turned.ravel()))
        resampling = None if self.resampling_spacing is None else resampling
        return replace(self, array=array, geometry=geometry, resampling_spacing=resampling)


def restore_orientation(segmentation: np.ndarray, original: Geometry) -> np.ndarray:
    """Turn an array on a reoriented grid back to the original axes.

    Args:
        segmentation: (..., Z, Y, X) on the grid of `Volume.reoriented()`.
        original: Geometry of the volume that was reoriented.

    Returns:
        A view with the original order and direction of the axes.
    """
    source, flipped = canonical_axes(original.axes)
    leading = range(segmentation.ndim - 3)
    array = segmentation[(..., *(slice(None, None, -1 if flip else 1) for flip in flipped))]
    return array.transpose(*leading, *(len(leading) + source.index(axis) for axis in range(3)))


def read_volume(
    image: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | Volume,
    *,
    channels: int | None = None,
    reader: str = "SimpleITKIO",
) -> Volume:
    """Read a scan, or check one that is in memory.

    Args:
        image: One file, a folder with the slices of one DICOM series, a list of these with one for each channel, or a
            Volume, which is returned as it is.
        channels: Number of channels that the model takes; None allows any number.
        reader: nnU-Net's reader class whose way to read files is followed, as `Plan.reader` names it.

    Returns:
        The scan in its stored type; channels of different types get a type that holds all of them.

    Raises:
        VolumeError: If something is missing, damaged, not finite, or does not fit together.
        TypeError: If `image` is something else.
    """
    if isinstance(image, Volume):
        check_channel_count(image.name, len(image.array), channels)
        check_finite(image.name, image.array)
        return image
    if isinstance(image, np.ndarray):
        raise TypeError("an array needs its spacing: pass Volume.from_array(array, spacing)")
    paths = [Path(path).absolute() for path in ([image] if isinstance(image, str | os.PathLike) else image)]
    if not paths:
        raise VolumeError("a scan must have at least one file, got an empty list: pass one path for each channel")
    sources = [open_source(path, reader) for path in paths]
    check_channel_count(paths[0].name, sum(source.channels for source in sources), channels)
    if sources[0].is_2d and reader not in ("SimpleITKIO", *PICTURE_READERS):
        raise VolumeError(
            f"{sources[0].name}: models trained through {reader} take no 2D images, as in nnU-Net: save it as a 3D "
            "image of one slice"
        )
    geometries = [geometry_of(source) for source in sources]
    if reader.endswith("WithReorient"):
        sources = [_turned(*each, geometries[0]) for each in zip(sources, geometries, strict=True)]
        geometries = [geometry_of(source) for source in sources]
    check_same_grid(sources, geometries)
    resampling = sources[0].resampling_spacing
    volume = Volume(
        array=read_channels(sources),
        geometry=geometries[0],
        name=sources[0].name,
        warnings=tuple(f"{source.name}: {warning}" for source in sources for warning in source.warnings),
        resampling_spacing=None if resampling is None else cast(Triple, resampling[::-1]),
    )
    for warning in volume.warnings:
        logger.warning("%s", warning)
    return volume


def files_of(image: Path, reader: str) -> list[Path]:
    """List every file that a scan is read from: slices, the data file of a header, the spacing beside a TIFF stack.

    Args:
        image: File or folder, as `read_volume` takes it.
        reader: As for `read_volume`.
    """
    if image.is_dir():
        return [path for path in image.iterdir() if path.is_file()]
    if reader in PICTURE_READERS:
        side = side_file(image)
        return [image, side] if reader == "Tiff3DIO" and side.is_file() else [image]
    if image.name.lower().endswith(DETACHED_ENDINGS):
        with contextlib.suppress(VolumeError, OSError):  # reading it says what is wrong
            return [image, locate_voxels(image).path]
    return [image]


def _turned(source: ImageSource, geometry: Geometry, first: Geometry) -> ImageSource:
    """Turn a channel like the first one: those readers of nnU-Net that turn scans turn each file separately."""
    if geometry.is_2d or canonical_axes(geometry.axes) == canonical_axes(first.axes):
        return source

    resampling = source.resampling_spacing and cast(Triple, source.resampling_spacing[::-1])

    def turn(array: np.ndarray) -> Volume:
        return Volume(array=array, geometry=geometry, resampling_spacing=resampling).oriented_as(first)

    turned = turn(np.broadcast_to(np.uint8(0), (1, *source.size[::-1])))  # takes no memory
    z, y, x = turned.array.shape[1:]
    return replace(
        source,
        size=(x, y, z),
        spacing=cast(Triple, turned.geometry.spacing[::-1]),
        origin=turned.geometry.origin,
        direction=turned.geometry.direction,
        resampling_spacing=resampling and cast(Triple, turned.spacing[::-1]),
        voxels=lambda: turn(source.voxels()[None]).array,
    )


def write_segmentation(
    path: str | os.PathLike[str], segmentation: np.ndarray, geometry: Geometry, *, reader: str = "SimpleITKIO"
) -> None:
    """Write labels in the format of the file name's ending; the file gets its name only when it is complete.

    Some formats have two files (.mhd, .nhdr, a TIFF stack and its spacing): the named one is written last.

    Args:
        path: File in an existing folder, with one of `LABEL_ENDINGS` in lower or upper case; an existing file is
            replaced.
        segmentation: (Z, Y, X) uint8 or uint16; one slice for a 2D geometry.
        geometry: Geometry of the labels.
        reader: nnU-Net's reader class whose way to write files is followed, as `Plan.reader` names it.

    Raises:
        ValueError: If the ending is unknown, or `segmentation` is not 3D, is empty, or does not fit the geometry.
        TypeError: If `segmentation` is not uint8 or uint16.
        OutputError: If the file cannot be written completely, or the format cannot hold the geometry.
        BackendUnavailable: If the libraries that write pictures are not installed.
    """
    path = Path(path)
    ending = next((ending for ending in LABEL_ENDINGS if path.name.lower().endswith(ending)), None)
    if ending is None:
        raise ValueError(f"{path.name}: a segmentation's name must end with one of {', '.join(LABEL_ENDINGS)}")
    if not isinstance(segmentation, np.ndarray) or segmentation.dtype not in (np.uint8, np.uint16):
        found = getattr(segmentation, "dtype", type(segmentation).__name__)
        raise TypeError(f"{path.name}: a segmentation must be a numpy array of uint8 or uint16, got {found}")
    is_flat = geometry.is_2d or ending in FLAT_ENDINGS
    if segmentation.ndim != 3 or segmentation.size == 0 or (is_flat and len(segmentation) != 1):
        raise ValueError(
            f"{path.name}: a segmentation must be (Z, Y, X) and not empty, with one slice if it is 2D, got shape "
            f"{segmentation.shape}"
        )
    if not as_stored(geometry, ending).matches(geometry):
        raise OutputError(f"{path} cannot be written: {ending} does not hold {geometry}: save it as .nrrd or .nii.gz")
    voxels = np.ascontiguousarray(segmentation[0] if is_flat else segmentation)
    try:
        with written_atomically(path, ending=ending) as temporary:
            write_label_file(temporary, voxels, geometry, stem=path.name[: -len(ending)], ending=ending, reader=reader)
    except (RuntimeError, VolumeError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise OutputError(f"{path} cannot be written: {reason}") from None
