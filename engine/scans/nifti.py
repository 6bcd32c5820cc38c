"""NIfTI headers as nibabel reads them: where the voxels lie; and label files in NIfTI.

The format: https://nifti.nimh.nih.gov/pub/dist/src/niftilib/nifti1.h and nifti2.h
"""

import gzip
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..errors import VolumeError

NIBABEL_READERS = ("NibabelIO", "NibabelIOWithReorient")
"""nnU-Net's classes that read and write NIfTI through nibabel."""

NIFTI_ENDINGS = (".nii.gz", ".nii")

HEADER_BYTES = {1: 348, 2: 540}  # by version
LEAST_OFFSET = {1: 352, 2: 544}  # by version: header and extension flag come before the voxels

DATA_TYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}
"""Codes of plain numbers, and numpy's names of their types without the byte order."""

_FIELDS = {  # name: format and offset in NIfTI-1, and in NIfTI-2
    "dim": (("8h", 40), ("8q", 16)),
    "datatype": (("h", 70), ("h", 12)),
    "pixdim": (("8f", 76), ("8d", 104)),
    "voxel_offset": (("f", 108), ("q", 168)),
    "scaling": (("2f", 112), ("2d", 176)),
    "unit": (("B", 123), ("i", 500)),
    "qform_code": (("h", 252), ("i", 344)),
    "sform_code": (("h", 254), ("i", 348)),
    "quaternion": (("3f", 256), ("3d", 352)),
    "qoffset": (("3f", 268), ("3d", 376)),
    "sform": (("12f", 280), ("12d", 400)),
}
_QUATERNION_ROUNDING = {1: 3 * np.finfo(np.float32).eps, 2: 3 * np.finfo(np.float64).eps}
_CODES = range(1, 6)  # nibabel takes other codes for 0
_UNITS = {1: ("metres", 1000.0), 3: ("micrometres", 0.001)}  # by the lowest bits of `unit`; else millimetres

# A quaternion in 32-bit floats rounds rotations by up to 0.07 degrees.
_SAME_ANGLE_DEGREES = 0.1
_SAME_PLACE = 0.01  # part of the smallest spacing
_SAME_LENGTH = 1e-3  # relative
_SAME_SPACING = 0.01  # relative
LONGEST_AXIS = 2**15 - 1  # of NIfTI-1


@dataclass(frozen=True, slots=True, kw_only=True)
class NiftiHeader:
    """The fields of a NIfTI header that decide size, place and values, as they are stored.

    Attributes:
        version: 1 or 2.
        order: "<" or ">", the byte order.
        dim: Number of axes, then seven lengths (x, y, z, ...).
        datatype: Code of the voxels' type.
        pixdim: Sign of the third axis in the qform, then seven spacings.
        voxel_offset: Byte at which voxels begin.
        scaling: Slope and intercept.
        unit: Units of length (the lowest three bits) and time.
        qform_code: Above 0 if the qform is valid.
        sform_code: Above 0 if the sform is valid.
        quaternion: Last three parts of the qform's unit quaternion.
        qoffset: RAS position (x, y, z) of the first voxel.
        sform: Three rows of the affine from voxels (x, y, z) to RAS.
    """

    version: int
    order: str
    dim: tuple[int, ...]
    datatype: int
    pixdim: tuple[float, ...]
    voxel_offset: float
    scaling: tuple[float, float]
    unit: int
    qform_code: int
    sform_code: int
    quaternion: tuple[float, ...]
    qoffset: tuple[float, ...]
    sform: tuple[float, ...]

    @classmethod
    def parse(cls, content: bytes, version: int, order: str) -> "NiftiHeader":
        """Take the fields from a header's bytes."""
        fields = {}
        for name, places in _FIELDS.items():
            form, at = places[version - 1]
            values = struct.unpack_from(order + form, content, at)
            fields[name] = values[0] if form.isalpha() else values
        return cls(version=version, order=order, **fields)

    @property
    def dtype(self) -> np.dtype:
        """Type of the voxels as they are stored; `datatype` must be one of `DATA_TYPES`."""
        return np.dtype(self.order + DATA_TYPES[self.datatype])

    @property
    def spacing(self) -> tuple[float, float, float]:
        """`pixdim` as nibabel corrects it: 0 means 1, and signs are ignored."""
        x, y, z = (abs(step) or 1.0 for step in self.pixdim[1:4])
        return x, y, z

    @property
    def unit_mm(self) -> float:
        """Factor by which ITK multiplies lengths; nibabel ignores the unit, and nnU-Net with it."""
        return _UNITS.get(self.unit & 7, ("", 1.0))[1]

    def affine(self) -> np.ndarray:
        """Give the 4x4 affine from voxels (x, y, z) to RAS: the sform, else the qform, else one from the spacing.

        Raises:
            VolumeError: If the qform is used and its quaternion is longer than 1.

        Note:
            nibabel: `Nifti1Header.get_best_affine` of a header that `check_fix` has corrected.
        """
        if self.sform_code in _CODES:
            return self.sform_affine()
        if self.qform_code in _CODES:
            return self.qform_affine()
        spacing = np.array(self.spacing) * (-1, 1, 1)  # nibabel's default for scans without a position
        return _affine(np.diag(spacing), -(np.array(self.dim[1:4]) - 1) / 2 * spacing)

    def sform_affine(self) -> np.ndarray:
        """Give the sform as 4x4."""
        rows = np.reshape(self.sform, (3, 4))
        return _affine(rows[:, :3], rows[:, 3])

    def qform_affine(self) -> np.ndarray:
        """Give the qform as 4x4.

        Raises:
            VolumeError: If its quaternion is longer than 1.

        Note:
            nibabel: `Nifti1Header.get_qform`, with the precision of its sums.
        """
        vector = np.array(self.quaternion, np.longdouble)
        rest = 1 - vector @ vector
        if rest < -_QUATERNION_ROUNDING[self.version]:
            raise VolumeError(
                f"the qform's quaternion must have a length of at most 1, got {self.quaternion}: correct the header"
            )
        w = np.sqrt(rest) if abs(rest) >= _QUATERNION_ROUNDING[self.version] else np.longdouble(0)
        b, c, d = vector
        double = 2 / (w * w + b * b + c * c + d * d)
        wb, wc, wd = w * (b * double), w * (c * double), w * (d * double)
        bb, bc, bd = b * (b * double), b * (c * double), b * (d * double)
        cc, cd, dd = c * (c * double), c * (d * double), d * (d * double)
        rotation = np.array(
            [[1 - (cc + dd), bc - wd, bd + wc], [bc + wd, 1 - (bb + dd), cd - wb], [bd - wc, cd + wb, 1 - (bb + cc)]]
        )
        x, y, z = self.spacing
        return _affine(rotation * (x, y, z * (-1 if self.pixdim[0] == -1 else 1)), self.qoffset)


def _affine(steps: np.ndarray, first: np.ndarray | tuple[float, ...]) -> np.ndarray:
    """Make a 4x4 affine of the steps along the axes (columns) and the position of the first voxel."""
    affine = np.eye(4)
    affine[:3, :3] = steps
    affine[:3, 3] = first
    return affine


# ---- facts given twice -----------------------------------------------------------------------------------------------


def header_warnings(header: NiftiHeader, used: np.ndarray, spacing: tuple[float, ...], unit_mm: float) -> list[str]:
    """Warn about facts that a header gives twice with different values, and say which value is used.

    Args:
        header: The header.
        used: 4x4 affine to RAS that the scan got.
        spacing: Along (x, y, z), by which the scan is resampled; along (x, y) of a 2D image.
        unit_mm: Factor by which lengths in the header were multiplied.

    Returns:
        One sentence for each difference beyond rounding.
    """
    warnings = []
    if header.sform_code > 0 and header.qform_code > 0:
        warnings += _compare_places(header, used, unit_mm, axes=len(spacing))
    pixdim = np.array(header.spacing)[: len(spacing)] * unit_mm
    steps = np.linalg.norm(header.sform_affine()[:3, : len(spacing)], axis=0) * unit_mm
    if header.sform_code > 0 and not np.allclose(steps, pixdim, rtol=_SAME_SPACING, atol=0):
        is_pixdim = np.abs(pixdim - spacing).max() <= np.abs(steps - spacing).max()
        one, other = (" x ".join(f"{step:.4g}" for step in values) for values in (pixdim, steps))
        chosen = "pixdim" if is_pixdim else "sform"
        warnings.append(f"the header holds two spacings, {one} mm (pixdim) and {other} mm (sform): {chosen} is used")
    if header.unit_mm != unit_mm:
        name = _UNITS[header.unit & 7][0]
        warnings.append(f"the header's unit is {name}, and lengths are taken as mm, as nnU-Net takes them with nibabel")
    return warnings


def _compare_places(header: NiftiHeader, used: np.ndarray, unit_mm: float, axes: int) -> Iterator[str]:
    try:
        qform = header.qform_affine()
    except VolumeError:  # it gives no position
        return
    sform, qform = (np.diag([unit_mm] * 3 + [1]) @ affine for affine in (header.sform_affine(), qform))
    lengths = np.array([np.linalg.norm(affine[:3, :axes], axis=0) for affine in (sform, qform)])
    if not (np.isfinite(sform).all() and np.isfinite(qform).all() and lengths.min() > 0):
        return
    corners = np.array([*np.ndindex((2,) * axes)]) * (np.array(header.dim[1 : 1 + axes]) - 1)
    differences = (sform - qform)[:3]
    apart_mm = np.linalg.norm(corners @ differences[:, :axes].T + differences[:, 3], axis=1)
    cosines = (sform[:3, :axes] * qform[:3, :axes]).sum(axis=0) / lengths.prod(axis=0)
    degrees = np.degrees(np.arccos(np.clip(cosines, -1, 1))).max()
    if (
        degrees <= _SAME_ANGLE_DEGREES
        and apart_mm[0] <= _SAME_PLACE * lengths.min()
        and np.allclose(lengths[0], lengths[1], rtol=_SAME_LENGTH, atol=0)
    ):
        return
    place = np.ix_(range(axes), (*range(axes), 3))
    chosen = "sform" if np.abs(used - sform)[place].max() <= np.abs(used - qform)[place].max() else "qform"
    yield (
        f"the sform and the qform place the scan differently, by up to {apart_mm.max():.4g} mm and {degrees:.4g} "
        f"degrees: the {chosen} is used"
    )


# ---- labels ----------------------------------------------------------------------------------------------------------


def write_nifti_labels(path: Path, labels: np.ndarray, affine: np.ndarray) -> None:
    """Write labels as nnU-Net does through nibabel: the affine is the sform ("aligned"), and there is no qform.

    Args:
        path: Ends with .nii or .nii.gz.
        labels: (Z, Y, X) uint8 or uint16, C-contiguous.
        affine: 4x4, voxels (x, y, z) to RAS; it must not be singular, and may be sheared.

    Raises:
        OSError: If the file cannot be written.
        VolumeError: If an axis is too long for the format.
    """
    if max(labels.shape) > LONGEST_AXIS:
        raise VolumeError(f"NIfTI-1 holds at most {LONGEST_AXIS} voxels along an axis, got {labels.shape} (z, y, x)")
    code = next(code for code, name in DATA_TYPES.items() if name == labels.dtype.str[1:])
    header = bytearray(LEAST_OFFSET[1])
    struct.pack_into("<i", header, 0, HEADER_BYTES[1])
    struct.pack_into("<8h", header, 40, 3, *labels.shape[::-1], 1, 1, 1, 1)
    struct.pack_into("<2h", header, 70, code, 8 * labels.itemsize)
    struct.pack_into("<8f", header, 76, 1, *np.linalg.norm(affine[:3, :3], axis=0), 1, 1, 1, 1)
    struct.pack_into("<3f", header, 108, LEAST_OFFSET[1], 1, 0)
    struct.pack_into("<2h", header, 252, 0, 2)
    struct.pack_into("<12f", header, 280, *affine[:3].ravel())
    struct.pack_into("<4s", header, 344, b"n+1\0")
    with _opened(path) as file:
        file.write(header)
        file.write(labels.astype(labels.dtype.newbyteorder("<"), copy=False).data)


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO | gzip.GzipFile]:
    with path.open("wb") as file:
        if not path.name.endswith(".gz"):
            yield file
            return
        with gzip.GzipFile(filename="", fileobj=file, mode="wb", compresslevel=6, mtime=0) as compressed:
            yield compressed
