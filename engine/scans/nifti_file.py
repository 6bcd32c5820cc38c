"""One NIfTI file -> its grid and voxels as nibabel gives them, for nnU-Net's readers that use nibabel.

ITK reads some headers differently: it prefers the qform, converts units, and refuses sheared axes and NIfTI-2.
"""

import math
from pathlib import Path

import numpy as np

from ..errors import IncompleteFile, VolumeError
from .image_file import ImageSource, check_claim, stored_pieces
from .image_header import read_nifti
from .itk import check_memory
from .nifti import LEAST_OFFSET, LONGEST_AXIS, NiftiHeader, header_warnings
from .orientation import LPS_TO_RAS, canonical_axes
from .voxel_data import VoxelData, naming

_UNTURNED = ((0, 1, 2), (False, False, False))


def open_as_nibabel(path: Path, reader: str) -> ImageSource:
    """Read the header of a NIfTI file as nibabel does, and check that the file can hold what it claims.

    Args:
        path: Existing file that ends with .nii or .nii.gz.
        reader: One of `NIBABEL_READERS`.

    Returns:
        Its grid, with a function that reads the voxels.

    Raises:
        VolumeError: If the file is not a 3D image of plain numbers, is incomplete, or nibabel cannot read it.

    Note:
        nnU-Net: nnunetv2/imageio/nibabel_reader_writer.py. It accepts a singular affine, which has no orientation;
        that is refused here.
    """
    with naming(path.name):
        header, data = read_nifti(path, versions=(1, 2))
        _check(header, reader)
        x, y, z = header.dim[1:4]
        dtype = header.dtype
        check_memory((x, y, z), dtype)
        check_claim((x, y, z), len(data.prefix) + math.prod((x, y, z)) * dtype.itemsize, data)
        affine = header.affine()
        steps = np.sqrt(np.sum(affine[:3, :3] * affine[:3, :3], axis=0))
        if not (np.isfinite(affine).all() and steps.min() > 0):
            raise VolumeError(
                f"the affine must be finite and have steps above 0, got {affine[:3].tolist()}: correct the header"
            )
        direction = LPS_TO_RAS @ (affine[:3, :3] / steps)
        spacing = header.spacing
        if reader == "NibabelIOWithReorient" and canonical_axes(direction) != _UNTURNED:
            # nibabel writes a new header for an image that it turns.
            x_mm, y_mm, z_mm = steps.astype(np.float32 if header.version == 1 else np.float64).tolist()
            spacing = (x_mm, y_mm, z_mm)
    return ImageSource(
        name=path.name,
        size=(x, y, z),
        spacing=tuple(steps.tolist()),
        origin=tuple((LPS_TO_RAS @ affine[:3, 3]).tolist()),
        direction=tuple(direction.ravel().tolist()),
        voxels=lambda: _read_voxels(path, header, data, dtype),
        warnings=tuple(header_warnings(header, affine, spacing, unit_mm=1.0)),
        resampling_spacing=spacing,
    )


def _check(header: NiftiHeader, reader: str) -> None:
    """Refuse headers that nibabel cannot read, or whose values make no sense."""
    if header.dim[0] < 3:
        raise VolumeError(
            f"models trained through {reader} take no 2D images, as in nnU-Net: save it as a 3D image of one slice"
        )
    if not all(map(math.isfinite, header.spacing)):
        raise VolumeError(f"spacing must be finite, got {header.pixdim[1:4]} (x, y, z): correct the header")
    if max(header.dim[1:4]) > LONGEST_AXIS:
        raise VolumeError(
            f"every axis must have at most {LONGEST_AXIS} voxels, which nnU-Net's labels in NIfTI-1 can have, got "
            f"{header.dim[1:4]} (x, y, z): cut the scan into parts"
        )
    least = LEAST_OFFSET[header.version]
    if header.voxel_offset < least:
        raise VolumeError(
            f"voxels must begin at byte {least} or behind it, the header says byte {header.voxel_offset:g}: correct "
            "the header"
        )
    slope, intercept = header.scaling
    if _is_slope(slope) and not math.isfinite(intercept):
        raise VolumeError(f"scl_inter must be finite, got {intercept}: correct the header")


def _is_slope(slope: float) -> bool:
    return math.isfinite(slope) and slope != 0


def _read_voxels(path: Path, header: NiftiHeader, data: VoxelData, dtype: np.dtype) -> np.ndarray:
    """Read the whole stream, because the checksum is at its end, and keep the voxels."""
    shape = header.dim[3:0:-1]
    stored = np.empty(shape, dtype)
    content = stored.reshape(-1).view(np.uint8)
    position = -len(data.prefix)
    with naming(path.name):
        for piece in stored_pieces(data):
            wanted = piece[max(0, -position) : max(0, content.size - position)]
            start = max(0, position)
            content[start : start + len(wanted)] = np.frombuffer(wanted, np.uint8)
            position += len(piece)
        if position < content.size:
            raise IncompleteFile(
                f"the header claims {content.size} bytes of voxels, {max(0, position)} are there: export or copy it "
                "again"
            )
    return _scaled(stored, *header.scaling)


def _scaled(stored: np.ndarray, slope: float, intercept: float) -> np.ndarray:
    """Apply slope and intercept in 64 bits and round to 32, as nnU-Net does; without them, integers are not changed.

    Note:
        nibabel: `get_fdata`; it ignores slope and intercept if the slope is 0 or not finite.
    """
    if not _is_slope(slope):
        slope, intercept = 1.0, 0.0
    if (slope, intercept) == (1, 0) and stored.dtype.str[1:] not in ("i8", "u8"):
        return stored.astype(stored.dtype.newbyteorder("="), copy=False)
    scaled = np.empty(stored.shape, np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # values that are not finite are refused later
        for plane, target in zip(stored, scaled, strict=True):
            target[:] = np.multiply(plane, slope, dtype=np.float64) + intercept
    return scaled
