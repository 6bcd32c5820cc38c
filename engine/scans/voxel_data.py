"""Where the voxels of an image file are, and checks that the readers of all headers share."""

import contextlib
import errno
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import VolumeError
from .nifti import NiftiHeader

GZIP_MAGIC = b"\x1f\x8b"
LONGEST_HEADER_BYTES = 16 << 20
EXPORT_AGAIN = "export or copy the file again"
_PASSING = {
    getattr(errno, name, None)
    for name in (
        "EIO", "ESTALE", "ETIMEDOUT", "EAGAIN", "EBUSY", "EINTR", "ENOMEM", "EMFILE", "ENFILE", "ECONNRESET",
        "ENOTCONN", "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH", "EREMOTEIO",
    )
} - {None}  # fmt: skip
"""Errors that may pass: a network file system that does not answer, a machine without free memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VoxelData:
    """Place and form of the voxels of one image file.

    Attributes:
        path: File that holds the voxels: the image file itself, or the data file that its header names.
        offset: Bytes in `path` before the voxels, or before the compressed stream that holds them.
        stored_bytes: Bytes in `path` from `offset` on.
        compression: "none", "gzip" or "zlib".
        prefix: Decompressed bytes of the stream before the first voxel (the header of a .nii.gz).
        bytes_per_voxel: Stored bytes per voxel; 0 where ITK's pixel type tells them.
        float_type: numpy's name of the stored type, for formats in which ITK hides NaN and infinity; otherwise empty.
        nifti: The header; for NIfTI files only.
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
    """Put the name of a file or folder before the text of errors, so that checks need not know the name.

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


def check_dimension(dimension: int) -> None:
    """Refuse images that are neither 3D nor 2D.

    Raises:
        VolumeError: If `dimension` is another.
    """
    if dimension not in (2, 3):
        raise VolumeError(f"an image must be 3D, or 2D, got {dimension}D: pass one 3D file per channel or time point")
