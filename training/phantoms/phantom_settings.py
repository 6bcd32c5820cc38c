"""What phantoms are drawn from: settings, streams of randomness, and the geometry of a case."""

from __future__ import annotations

import operator
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from .painting import Grid, Point

SMALLEST_REGION_MM: Point = (40.0, 40.0, 60.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class PhantomSettings:
    """Geometry and statistics of the phantoms; the defaults follow the pancreas data set.

    Attributes:
        slice_spacings_mm: (spacing, weight) of the usual slice spacings.
        other_slice_spacings_mm: (lowest, middle, highest) of the others, drawn log-uniformly, three quarters of them
            below the middle.
        other_weight: Weight of the others.
        in_plane_mm: (lowest, median, highest) pixel size.
        extent_mm: Median size (z, y, x) of the region.
        extent_spread: Standard deviation of the logarithm of the extent (z, y, x), beside a common 0.06.
        smallest_shape: Fewest voxels (z, y, x).
        largest_shape: Most voxels (z, y, x).
        subtype_shares: Relative frequency of subtypes 0, 1, 2.
        separation: How far apart the subtypes lie: 1 lets a good classifier on the true mask's simple features reach a
            macro-F1 of about 0.9, 0 makes the subtypes look alike.
        noise_hu: (lowest, highest) standard deviation of the noise.
        painting_mm: Largest distance of the layers that anatomy is painted on and that are averaged to slices.
    """

    slice_spacings_mm: tuple[tuple[float, float], ...] = ((1, 63), (2, 45), (3, 76), (1.5, 32), (0.8, 21), (5, 13))
    other_slice_spacings_mm: tuple[float, float, float] = (0.45, 2.5, 8.0)
    other_weight: float = 38
    in_plane_mm: tuple[float, float, float] = (0.33, 0.732, 0.977)
    extent_mm: Point = (122.0, 87.0, 131.0)
    extent_spread: Point = (0.13, 0.14, 0.105)
    smallest_shape: tuple[int, int, int] = (14, 48, 80)
    largest_shape: tuple[int, int, int] = (244, 272, 459)
    subtype_shares: tuple[float, float, float] = (62, 106, 84)
    separation: float = 1.0
    noise_hu: tuple[float, float] = (8.0, 25.0)
    painting_mm: float = 1.25

    def __post_init__(self) -> None:
        """Check what the draws rely on."""
        spacings = [*(mm for mm, _ in self.slice_spacings_mm), *self.other_slice_spacings_mm]
        for name, sizes in {
            "spacings": (*spacings, *self.in_plane_mm),
            "extent_mm": self.extent_mm,
            "painting_mm": (self.painting_mm,),
        }.items():
            if not all(np.isfinite(size) and size > 0 for size in sizes):
                raise ValueError(f"{name} must be positive numbers of millimetres, got {sizes}")
        for name, weights in {
            "weights of slice spacings": (*(w for _, w in self.slice_spacings_mm), self.other_weight),
            "subtype_shares": self.subtype_shares,
        }.items():
            if not all(np.isfinite(w) and w >= 0 for w in weights) or not sum(weights) > 0:
                raise ValueError(f"{name} must be non-negative with a positive sum, got {weights}")
        for name, limits in {
            "other_slice_spacings_mm": self.other_slice_spacings_mm,
            "in_plane_mm": self.in_plane_mm,
            "noise_hu": (0.0, *self.noise_hu),
        }.items():
            if list(limits) != sorted(limits):
                raise ValueError(f"{name} must ascend and not be negative, got {limits}")
        if not all(1 < least <= most for least, most in zip(self.smallest_shape, self.largest_shape, strict=True)):
            raise ValueError(
                f"smallest_shape must be at least 2 and at most largest_shape on each axis, got {self.smallest_shape} "
                f"and {self.largest_shape}"
            )
        if not (np.isfinite(self.separation) and self.separation >= 0):
            raise ValueError(f"separation must be a finite number of at least 0, got {self.separation}")


DEFAULT_SETTINGS = PhantomSettings()
# For tests and demonstrations: the same anatomy on a coarser grid, a third of a second a case.
SMALL_SETTINGS = PhantomSettings(
    slice_spacings_mm=((2.5, 1), (3.0, 2)),
    other_slice_spacings_mm=(2.0, 2.5, 3.2),
    other_weight=1,
    in_plane_mm=(0.95, 1.05, 1.2),
    extent_mm=(112.0, 93.0, 128.0),
    extent_spread=(0.05, 0.04, 0.04),
    smallest_shape=(32, 80, 110),
    largest_shape=(48, 110, 140),
    painting_mm=1.6,
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Streams:
    """Independent sources of randomness of one case."""

    geometry: np.random.Generator
    subtype: np.random.Generator
    anatomy: np.random.Generator
    lesion: np.random.Generator
    texture: np.random.Generator
    acquisition: np.random.Generator

    @classmethod
    def of(cls, seed: int) -> Streams:
        """Spawn them from a seed; none depends on what another gives."""
        names = [field.name for field in fields(cls)]
        children = np.random.SeedSequence(check_seed(seed)).spawn(len(names))
        return cls(**dict(zip(names, map(np.random.default_rng, children), strict=True)))


def check_seed(seed: int) -> int:
    """Return a seed as a Python integer, or raise ValueError."""
    if isinstance(seed, bool) or not hasattr(seed, "__index__") or operator.index(seed) < 0:
        raise ValueError(f"seed must be a non-negative integer, got {seed!r}")
    return operator.index(seed)


def shares_of(weights: tuple[float, ...]) -> NDArray[np.float64]:
    """Weights scaled to a sum of one."""
    return np.array(weights, np.float64) / np.sum(weights, dtype=np.float64)


def draw_geometry(seed: int, settings: PhantomSettings = DEFAULT_SETTINGS) -> Grid:
    """Draw the shape and spacing that `generate_phantom` gives this seed, in no time.

    Raises:
        ValueError: If the settings make regions too small to hold a pancreas.
    """
    rng = Streams.of(seed).geometry
    usual, weights = zip(*settings.slice_spacings_mm, strict=True)
    lowest, middle, highest = settings.other_slice_spacings_mm
    low, high = (lowest, middle) if rng.random() < 0.75 else (middle, highest)
    other = round(float(np.exp(rng.uniform(np.log(low), np.log(high)))), 2)
    slice_mm = float([*usual, other][rng.choice(len(usual) + 1, p=shares_of((*weights, settings.other_weight)))])
    low, median, high = settings.in_plane_mm
    # Scanners reconstruct a whole number of millimetres on 512 pixels.
    pixel_mm = round(512 * float(np.clip(median * np.exp(rng.normal(0, 0.13)), low, high))) / 512
    # Regions of thick slices are generous, and large patients are large along every axis.
    median_mm = np.array(settings.extent_mm) * [(slice_mm / 2) ** 0.22, 1, 1]
    extent_mm = median_mm * np.exp(rng.normal(0, 0.06) + rng.normal(0, settings.extent_spread))
    voxels = np.round(extent_mm / [slice_mm, pixel_mm, pixel_mm])
    z, y, x = (int(n) for n in np.clip(voxels, settings.smallest_shape, settings.largest_shape))
    grid = Grid(shape=(z, y, x), spacing=(slice_mm, pixel_mm, pixel_mm))
    if not all(extent >= least for extent, least in zip(grid.extent_mm, SMALLEST_REGION_MM, strict=True)):
        raise ValueError(
            f"a region must be at least {SMALLEST_REGION_MM} mm (z, y, x) to hold a pancreas, the settings gave "
            f"{grid.shape} voxels of {grid.spacing} mm; raise extent_mm or largest_shape"
        )
    return grid


def draw_subtype(seed: int, settings: PhantomSettings = DEFAULT_SETTINGS) -> int:
    """Draw the subtype that `generate_phantom` gives this seed if none is asked for."""
    return int(Streams.of(seed).subtype.choice(3, p=shares_of(settings.subtype_shares)))
