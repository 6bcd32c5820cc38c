"""Where the voxels of an array lie in the patient."""

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from ..errors import VolumeError
from .orientation import LPS_TO_RAS

Triple: TypeAlias = tuple[float, float, float]

IDENTITY_DIRECTION = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
"""Of axes x, y, z that run to Left, Posterior and Superior."""

_LEAST_SPACING_MM, _MOST_MM = 1e-6, 1e6  # beyond these, ITK's own matrices overflow
_LEAST_DETERMINANT = 1e-6
_MOST_COSINE = 1.001
SAME_SPACING = 1e-4  # relative
SAME_DIRECTION = 1e-3  # per cosine
SAME_ORIGIN = 0.05  # part of the smallest spacing


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """Where the voxels of an array lie in the patient.

    Attributes:
        spacing: Distance between voxels in mm, (z, y, x): the order of the array's axes.
        origin: Position of the first voxel in mm, LPS (x, y, z), as in SimpleITK.
        direction: Nine cosines, row-major, as in SimpleITK: the columns are the directions of the axes x, y, z in LPS.
            They need not be perpendicular.
        is_2d: Whether the scan was a 2D image, which has no axis z. As in nnU-Net, its spacing along z is 999 times its
            larger spacing. Its labels are written in 2D again.

    Raises:
        ValueError: If there are not 3, 3 and 9 numbers.
        VolumeError: If a number is not finite, a spacing is not above 0, or the direction is singular or has no
            cosines.
    """

    spacing: Triple
    origin: Triple
    direction: tuple[float, ...]
    is_2d: bool = False

    def __post_init__(self) -> None:
        for field, count in (("spacing", 3), ("origin", 3), ("direction", 9)):
            numbers = tuple(float(number) + 0.0 for number in getattr(self, field))  # + 0.0 turns -0.0 into 0.0
            if len(numbers) != count:
                raise ValueError(f"{field} must be {count} numbers, got {len(numbers)}: {numbers}")
            if not (np.abs(numbers) <= _MOST_MM).all():  # NaN fails this form of the comparison too
                raise VolumeError(f"{field} must be finite and below {_MOST_MM:g}, got {numbers}: correct the header")
            object.__setattr__(self, field, numbers)
        if min(self.spacing) < _LEAST_SPACING_MM:
            raise VolumeError(f"spacing must be above 0 mm, got {self.spacing} (z, y, x): correct the header")
        if np.abs(self.axes).max() > _MOST_COSINE or abs(np.linalg.det(self.axes)) < _LEAST_DETERMINANT:
            raise VolumeError(
                f"direction must be nine cosines and not singular, got {self.direction}: correct the header"
            )

    def matches(self, other: "Geometry") -> bool:
        """Whether two grids of the same shape lie in the same place, within the rounding of file formats."""
        return (
            np.allclose(self.spacing, other.spacing, rtol=SAME_SPACING, atol=0)
            and np.allclose(self.origin, other.origin, rtol=0, atol=SAME_ORIGIN * min(other.spacing))
            and np.allclose(self.direction, other.direction, rtol=0, atol=SAME_DIRECTION)
        )

    @property
    def axes(self) -> np.ndarray:
        """Direction as a 3x3 matrix: column k is the unit vector of image axis k of (x, y, z), in LPS."""
        return np.array(self.direction).reshape(3, 3)

    @property
    def in_simpleitk(self) -> dict[str, tuple[float, ...]]:
        """Spacing, origin and direction as a SimpleITK image has them: along (x, y, z), or (x, y) of a 2D image."""
        axes = 2 if self.is_2d else 3
        return {
            "spacing": self.spacing[::-1][:axes],
            "origin": self.origin[:axes],
            "direction": tuple(self.axes[:axes, :axes].ravel().tolist()),
        }

    @property
    def affine(self) -> np.ndarray:
        """4x4 matrix from voxel (x, y, z) to its place in mm, RAS, as in nibabel."""
        affine = np.eye(4)
        affine[:3, :3] = LPS_TO_RAS @ self.axes * self.spacing[::-1]
        affine[:3, 3] = LPS_TO_RAS @ self.origin
        return affine

    @property
    def voxel_mm3(self) -> float:
        """Volume of a voxel."""
        return float(np.prod(self.spacing) * abs(np.linalg.det(self.axes)))
