"""What differs between patients, and the course of the pancreas."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .painting import Grid, Point, Tube, curve

# The pancreas from the uncinate process to the tip of the tail: centre (z, y, x) as shares of its extent, radius in mm.
PANCREAS_COURSE = np.array(
    [
        [-0.46, 0.24, -0.28, 6.5],
        [-0.40, 0.14, -0.42, 11.5],
        [-0.12, -0.02, -0.44, 13.5],
        [0.06, -0.32, -0.28, 10.5],
        [0.12, -0.46, -0.10, 8.0],
        [0.22, -0.34, 0.10, 9.0],
        [0.34, -0.06, 0.27, 9.5],
        [0.44, 0.24, 0.41, 9.0],
        [0.48, 0.44, 0.48, 6.0],
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class AnatomyParameters:
    """What differs between patients: attenuations in HU, sizes in mm, shares without a unit.

    Attributes:
        fat_infiltration: Share of fat between the lobules of the gland, 0 to 1.
        lobulation_mm: Height of the lobules on its surface.
        pancreas_girth: Thickness relative to the average gland.
        pancreas_extent_mm: Size of the gland's bounding box (z, y, x).
        fat_plane_mm: Fat between neighbouring organs: thin in lean patients.
        front_mm: From the centre of the region to the skin of the belly.
        subcutaneous_mm: Thickness of the fat under the skin.
        stranding_hu: Contrast of the sheets of tissue that run through the fat.
    """

    pancreas_hu: float
    fat_hu: float
    muscle_hu: float
    artery_hu: float
    vein_hu: float
    liver_hu: float
    spleen_hu: float
    kidney_hu: float
    bowel_wall_hu: float
    oral_contrast_hu: float
    fat_infiltration: float
    lobulation_mm: float
    pancreas_girth: float
    pancreas_extent_mm: Point
    fat_plane_mm: float
    front_mm: float
    subcutaneous_mm: float
    stranding_hu: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pancreas:
    """The gland's axis from the uncinate process to the tail.

    Attributes:
        points: (N, 3) axis in mm.
        radii: (N,) radius in mm.
        arc: (N,) share of the length, 0 to 1.
    """

    points: NDArray[np.float64]
    radii: NDArray[np.float64]
    arc: NDArray[np.float64]

    def at(self, arc: float) -> tuple[NDArray[np.float64], float]:
        """Axis point (3,) and radius at a share of the length."""
        point = np.array([np.interp(arc, self.arc, self.points[:, axis]) for axis in range(3)])
        return point, float(np.interp(arc, self.arc, self.radii))

    @property
    def shape(self) -> Tube:
        """The gland's shape; it is taller than it is deep."""
        return Tube(points=self.points, radii=self.radii, squash=(0.82, 1.1, 1.0))


def draw_anatomy(rng: np.random.Generator, grid: Grid) -> AnatomyParameters:
    """Draw a patient whose pancreas fills the region as in the pancreas data set."""
    z, y, x = grid.extent_mm
    extent = (
        float(np.clip(z - 2 * rng.uniform(18, 28), 38, 105)),
        float(np.clip(y - 2 * rng.uniform(12, 20), 34, 75)),
        float(np.clip(x - 2 * rng.uniform(9, 16), 75, 150)),
    )
    subcutaneous = float(rng.uniform(7, 30))
    return AnatomyParameters(
        pancreas_hu=float(np.clip(rng.normal(106, 15), 70, 145)),
        fat_hu=float(rng.uniform(-112, -92)),
        muscle_hu=float(rng.uniform(48, 66)),
        artery_hu=float(rng.uniform(135, 225)),
        vein_hu=float(rng.uniform(130, 190)),
        liver_hu=float(rng.uniform(88, 122)),
        spleen_hu=float(rng.uniform(105, 132)),
        kidney_hu=float(rng.uniform(150, 195)),
        bowel_wall_hu=float(rng.uniform(75, 105)),
        oral_contrast_hu=float(rng.choice([12.0, 22.0, 35.0, 220.0], p=[0.4, 0.3, 0.15, 0.15])),
        fat_infiltration=float(rng.beta(1.6, 3.0)),
        lobulation_mm=float(rng.uniform(0.6, 1.8)),
        pancreas_girth=float(np.clip(rng.normal(1.0, 0.1), 0.8, 1.25)),
        pancreas_extent_mm=extent,
        fat_plane_mm=float(rng.uniform(0.8, 4.0)),
        # The wall lies in front of the gland, close to it in lean patients.
        front_mm=extent[1] / 2 + subcutaneous + 12 + float(rng.uniform(4, 60)),
        subcutaneous_mm=subcutaneous,
        stranding_hu=float(rng.uniform(8, 45)),
    )


def draw_pancreas(rng: np.random.Generator, parameters: AnatomyParameters) -> Pancreas:
    """Draw the gland's course, scaled to the extent the parameters name."""
    course = PANCREAS_COURSE.copy()
    course[:, :3] += rng.uniform(-0.045, 0.045, (len(course), 3))
    course[:, 3] *= 1.18 * parameters.pancreas_girth * rng.uniform(0.9, 1.1, len(course))
    extent = np.array(parameters.pancreas_extent_mm)
    # The sixth root of the volume is half of the scale: a wide gland is not as much thicker as it is wider.
    course[:, 3] *= (extent.prod() / (72 * 54 * 106)) ** (1 / 6)
    course[:, :3] *= extent - 2 * np.array([11, 8, 9])
    samples = curve(course, step_mm=1.5)
    length = np.concatenate([[0], np.cumsum(np.sqrt((np.diff(samples[:, :3], axis=0) ** 2).sum(1)))])
    return Pancreas(points=samples[:, :3], radii=samples[:, 3], arc=length / length[-1])
