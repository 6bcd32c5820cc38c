"""Label files: written in the formats that nnU-Net's readers take, and checked for completeness."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..errors import EngineError, IncompleteFile, VolumeError
from ..files import put_in_place
from .geometry import IDENTITY_DIRECTION, Geometry
from .image_file import check_claim, check_stored, check_stored_voxels, open_image_file
from .image_header import DETACHED_ENDINGS, IMAGE_ENDINGS, image_ending, read_nifti
from .itk import itk_alone
from .nifti import NIBABEL_READERS, NIFTI_ENDINGS, write_nifti_labels
from .pictures import FLAT_ENDINGS, PICTURE_ENDINGS, PICTURE_SPACING, read_picture, write_picture, write_stack
from .voxel_data import naming

LABEL_ENDINGS = (*IMAGE_ENDINGS, *PICTURE_ENDINGS)

_LOOKED_AT_BYTES = 512
_MOST_SHEAR = 1e-3  # cosine between axes; beyond it, ITK's NIfTI writer changes axes without a message


def as_stored(geometry: Geometry, ending: str) -> Geometry:
    """Return the part of a geometry that a format stores: TIFF stacks the spacing, GIPL no direction, pictures nothing.

    Args:
        geometry: Of the labels.
        ending: One of `LABEL_ENDINGS`.
    """
    if ending == ".gipl":
        return replace(geometry, direction=IDENTITY_DIRECTION)
    if ending not in PICTURE_ENDINGS:
        return geometry
    spacing = PICTURE_SPACING if geometry.is_2d or ending in FLAT_ENDINGS else geometry.spacing
    return replace(geometry, spacing=spacing, origin=(0.0, 0.0, 0.0), direction=IDENTITY_DIRECTION)


def second_file(labels: Path, reader: str) -> Path | None:
    """Name the file that `write_label_file` writes beside labels: a header's voxels, or the spacing of a TIFF stack.

    Args:
        labels: File with one of `LABEL_ENDINGS`.
        reader: nnU-Net's reader class whose format the file has, as `Plan.reader` names it.
    """
    endings = {
        ".mhd": ".zraw",
        ".nhdr": ".raw.gz",
        **({".tif": ".json", ".tiff": ".json"} if reader == "Tiff3DIO" else {}),
    }
    ending = endings.get(labels.suffix.lower())
    return None if ending is None else labels.with_name(f"{labels.stem}{ending}")


def write_label_file(
    path: Path, voxels: np.ndarray, geometry: Geometry, *, stem: str, ending: str, reader: str
) -> None:
    """Write labels and, for formats of two files, the second file beside them.

    Args:
        path: Temporary file whose name has the ending.
        voxels: C-contiguous (Z, Y, X) uint8 or uint16, (Y, X) to write in 2D.
        geometry: Of the labels.
        stem: Final name without the ending; the second file is named after it.
        ending: One of `LABEL_ENDINGS`.
        reader: nnU-Net's reader class whose format the file gets, as `Plan.reader` names it.

    Raises:
        VolumeError, RuntimeError, OSError: If the file is not complete.
        BackendUnavailable: If the libraries that write pictures are not installed.
    """
    is_sheared = np.abs(geometry.axes.T @ geometry.axes - np.eye(3)).max() > _MOST_SHEAR
    if ending in NIFTI_ENDINGS and is_sheared and reader not in NIBABEL_READERS:
        raise VolumeError(f"axes are sheared, which ITK does not read from {ending}: save it as .nrrd")
    if ending in NIFTI_ENDINGS and voxels.ndim == 3 and reader in NIBABEL_READERS:
        write_nifti_labels(path, voxels, geometry.affine)
        check_stored_voxels(path, voxels)
    elif ending not in PICTURE_ENDINGS:
        # A header contains the name of its data file, made of its own stem: so it is renamed afterwards.
        written = path.with_name(f"{stem}{ending}") if ending in DETACHED_ENDINGS else path
        _write_image(written, voxels, geometry)
        put_in_place(written, path)
    elif voxels.ndim == 2:
        write_picture(path, voxels)
    else:
        side = second_file(path.with_name(f"{stem}{ending}"), "Tiff3DIO")
        assert side is not None  # of a TIFF stack
        write_stack(path, voxels, geometry.spacing, side)


def _write_image(path: Path, voxels: np.ndarray, geometry: Geometry) -> None:
    """Write a file and check it: when the disk is full, ITK's NIfTI writer stops without an error."""
    import SimpleITK

    image = SimpleITK.GetImageFromArray(voxels)
    placed = geometry.in_simpleitk
    image.SetSpacing(placed["spacing"])
    image.SetOrigin(placed["origin"])
    image.SetDirection(placed["direction"])
    with itk_alone("write"):
        SimpleITK.WriteImage(image, str(path), useCompression=True)
    check_stored_voxels(path, voxels)


def is_whole(path: Path) -> bool:
    """Whether a label file was written to its end; one that cannot be read for another reason counts as whole."""
    try:
        with path.open("rb") as file:
            start = file.read(_LOOKED_AT_BYTES)
        if not any(start):  # empty, or zeros, as some file systems leave after a crash
            return False
        if path.name.lower().endswith(PICTURE_ENDINGS):
            read_picture(path)
        elif image_ending(path) in NIFTI_ENDINGS:  # ITK would refuse some axes
            with naming(path.name):
                header, data = read_nifti(path, versions=(1, 2))
                size = header.dim[1 : header.dim[0] + 1]
                expected_bytes = len(data.prefix) + math.prod(size) * data.bytes_per_voxel
                check_claim(size, expected_bytes, data)
                check_stored(data, expected_bytes)
        else:
            open_image_file(path).voxels()
    except IncompleteFile:
        return False
    except EngineError:
        return True
    return True
