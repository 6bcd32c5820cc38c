"""Shapes in millimetres, painted on a grid of Hounsfield units.

Points and extents are (z, y, x) in mm from the centre of the region, z up, y to the back, x to the patient's left, as
in an unrotated scan. Structures are painted one over the other, each covering a voxel by the share that a smooth
distance function gives. Arrays of voxels see only operations that IEEE 754 rounds exactly (+, -, *, /, sqrt), so that
the same seed paints the same voxels on every machine.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Volume = NDArray[np.float32]
Box = tuple[slice, slice, slice]
Point = tuple[float, float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Voxel centres of a region.

    Attributes:
        shape: Voxels (z, y, x).
        spacing: Millimetres (z, y, x).
    """

    shape: tuple[int, int, int]
    spacing: Point

    @property
    def extent_mm(self) -> Point:
        """Size of the region (z, y, x)."""
        z, y, x = (n * step for n, step in zip(self.shape, self.spacing, strict=True))
        return z, y, x

    @property
    def voxel_mm(self) -> float:
        """Width over which an edge fades: the mean voxel size."""
        return float(np.mean(self.spacing))

    def axis_mm(self, axis: int) -> NDArray[np.float32]:
        """Coordinates of the voxel centres along one axis."""
        return ((np.arange(self.shape[axis]) - (self.shape[axis] - 1) / 2) * self.spacing[axis]).astype(np.float32)

    def corners(self, low: NDArray[np.float64], high: NDArray[np.float64]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """First and last-plus-one voxels (..., 3) of boxes between points (..., 3) in mm, cut to the grid."""
        centre = (np.array(self.shape) - 1) / 2
        start = np.clip(np.floor(low / self.spacing + centre), 0, self.shape).astype(np.intp)
        stop = np.clip(np.ceil(high / self.spacing + centre) + 1, start, self.shape).astype(np.intp)
        return start, stop

    def box(self, low: NDArray[np.float64], high: NDArray[np.float64]) -> Box:
        """Voxels between two points in mm, cut to the grid; empty if they lie outside."""
        start, stop = self.corners(low, high)
        z, y, x = (slice(int(a), int(b)) for a, b in zip(start, stop, strict=True))
        return z, y, x


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Ellipsoid:
    """An ellipsoid; `turn` is a rotation matrix from the region's axes to its own."""

    centre: Point
    radii: Point
    turn: NDArray[np.float64] | None = None

    def distance(self, grid: Grid, margin_mm: float) -> tuple[Box, Volume]:
        """Approximate signed distance in mm, negative inside, in the box within `margin_mm`.

        Note:
            With k = |p / r|, the distance is k (k - 1) / |p / r^2|: exact on the surface to first order.
        """
        reach = np.array(self.radii) if self.turn is None else np.full(3, max(self.radii))
        box = grid.box(np.array(self.centre) - reach - margin_mm, np.array(self.centre) + reach + margin_mm)
        steps = offsets(grid, box, self.centre)
        if self.turn is not None:
            steps = [row[0] * steps[0] + row[1] * steps[1] + row[2] * steps[2] for row in self.turn.astype(np.float32)]
        once = [step * np.float32(1 / r) for step, r in zip(steps, self.radii, strict=True)]
        twice = [step * np.float32(1 / r) for step, r in zip(once, self.radii, strict=True)]
        # In the centre both lengths vanish; the limits keep it deep inside.
        k: Volume = np.maximum(_length(once), np.float32(1e-3))
        k *= k - 1
        k /= np.maximum(_length(twice), np.float32(1e-6))
        return box, k


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tube:
    """Spheres swept along a curve; `squash` scales the distance per axis (below 1 the tube is wider there)."""

    points: NDArray[np.float64]
    radii: NDArray[np.float64]
    squash: Point = (1.0, 1.0, 1.0)

    def distance(self, grid: Grid, margin_mm: float) -> tuple[Box, Volume]:
        """Signed distance in mm, negative inside, in the box within `margin_mm`; further out it stays at the margin."""
        reach = (self.radii[:, None] + margin_mm) / np.array(self.squash)
        starts, stops = grid.corners(self.points - reach, self.points + reach)
        reached = (stops > starts).all(1)
        if not reached.any():
            return (slice(0, 0), slice(0, 0), slice(0, 0)), np.zeros((0, 0, 0), np.float32)
        first, last = starts[reached].min(0), stops[reached].max(0)
        field = np.full(last - first, margin_mm, np.float32)
        axes = [grid.axis_mm(axis)[a:b] for axis, a, b in zip(range(3), first, last, strict=True)]
        squash = np.array(self.squash, np.float32)
        corners = np.stack([starts[reached] - first, stops[reached] - first], -1)
        for point, radius, corner in zip(self.points[reached], self.radii[reached], corners, strict=True):
            part = (slice(*corner[0]), slice(*corner[1]), slice(*corner[2]))
            z, y, x = (((axes[a][part[a]] - np.float32(point[a])) * squash[a]) ** 2 for a in range(3))
            near = z[:, None, None] + (y[:, None] + x)
            np.sqrt(near, out=near)
            near -= np.float32(radius)
            np.minimum(field[part], near, out=field[part])
        z, y, x = (slice(int(a), int(b)) for a, b in zip(first, last, strict=True))
        return (z, y, x), field


@dataclass(frozen=True, slots=True, kw_only=True)
class Lumen:
    """What a hollow structure holds; `gas_share` of its height, the part to the front, is gas."""

    wall_mm: float
    hu: float
    texture_hu: float = 0.0
    folds_mm: float = 0.0
    gas_share: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Structure:
    """One thing to paint.

    Attributes:
        shape: Where it lies.
        hu: Its attenuation, or its wall's if it is hollow.
        texture_hu: Standard deviation of its texture, correlated over some 5 mm.
        roughness_mm: How far its surface strays from the shape.
        halo_mm: Width of the layer of fat laid around it first.
        lumen: Contents of a hollow structure.
    """

    shape: Ellipsoid | Tube
    hu: float
    texture_hu: float = 0.0
    roughness_mm: float = 0.0
    halo_mm: float = 0.0
    lumen: Lumen | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Noise:
    """Smooth random fields over the grid, unit variance, named by their correlation length."""

    mm3: Volume
    mm6: Volume
    mm14: Volume


def _length(vector: list[Volume]) -> Volume:
    length: Volume = np.sqrt(vector[0] ** 2 + vector[1] ** 2 + vector[2] ** 2)
    return length


def offsets(grid: Grid, box: Box, centre: Point) -> list[Volume]:
    """Coordinates (z, y, x) in mm of a box from a centre, each shaped to broadcast along its own axis."""
    shapes = ((-1, 1, 1), (1, -1, 1), (1, 1, -1))
    return [(grid.axis_mm(axis)[box[axis]] - np.float32(centre[axis])).reshape(shapes[axis]) for axis in range(3)]


def smooth_noise(rng: np.random.Generator, grid: Grid, length_mm: float) -> Volume:
    """Draw a smooth random field over the grid.

    Args:
        rng: Source of randomness.
        grid: Where.
        length_mm: Correlation length.

    Returns:
        About unit variance: white noise on a lattice of half the length, smoothed once and interpolated linearly.
    """
    step = length_mm / 2
    counts = [int(np.ceil(extent / step)) + 4 for extent in grid.extent_mm]
    field = rng.standard_normal(counts).astype(np.float32)
    for axis in range(3):
        field = np.moveaxis(field, axis, 0)
        # The binomial filter leaves sqrt(6)/4 of the standard deviation; interpolation takes a little more.
        field = (field[:-2] + 2 * field[1:-1] + field[2:]) * np.float32(0.25 / 0.57)
        field = np.moveaxis(field, 0, axis)
    for axis in range(3):
        position = (grid.axis_mm(axis).astype(np.float64) + grid.extent_mm[axis] / 2) / step
        index = position.astype(int)
        share = (position - index).astype(np.float32).reshape([-1 if a == axis else 1 for a in range(3)])
        low = np.take(field, index, axis)
        field = low + (np.take(field, index + 1, axis) - low) * share
    return field


def draw_noise(rng: np.random.Generator, grid: Grid) -> Noise:
    """Draw the fields that textures and surfaces share."""
    return Noise(mm3=smooth_noise(rng, grid, 3), mm6=smooth_noise(rng, grid, 6), mm14=smooth_noise(rng, grid, 14))


def coverage(distance: Volume, width_mm: float) -> Volume:
    """Share of a voxel inside a surface: 1 inside, 0 outside, a smooth step of `width_mm` between."""
    t = np.clip(np.float32(0.5) - distance * np.float32(1 / width_mm), 0, 1)
    return t * t * (3 - 2 * t)


def blend(image: Volume, box: Box, share: Volume, hu: Volume | float) -> None:
    """Cover a box of the image with `hu`, each voxel by its share, in place."""
    part = image[box]
    part += share * (hu - part)


def curve(control: NDArray[np.float64], step_mm: float = 1.5) -> NDArray[np.float64]:
    """Catmull-Rom curve through control points.

    Args:
        control: (N, 3 + any) points in mm, further columns (radii) are carried along.
        step_mm: Distance between samples.

    Returns:
        (M, 3 + any) samples.
    """
    ends = np.concatenate([2 * control[:1] - control[1:2], control, 2 * control[-1:] - control[-2:-1]])
    pieces = []
    for a, b, c, d in zip(ends, ends[1:], ends[2:], ends[3:], strict=False):
        count = max(2, int(np.ceil(np.sqrt(((c - b)[:3] ** 2).sum()) / step_mm)))
        t = (np.arange(count) / count)[:, None]
        pieces.append(b + t * ((c - a) + t * ((2 * a - 5 * b + 4 * c - d) + t * (3 * (b - c) + d - a))) / 2)
    return np.concatenate([*pieces, control[-1:]])


def tube(control: list[tuple[float, ...]], radius: float | None = None, squash: Point = (1, 1, 1)) -> Tube:
    """Tube through (z, y, x) points of one radius, or (z, y, x, radius) points."""
    array = np.array(control, np.float64)
    radii = array[:, 3] if radius is None else np.full(len(array), radius)
    samples = curve(np.column_stack([array[:, :3], radii]), step_mm=max(1.0, 0.4 * float(radii.min())))
    return Tube(points=samples[:, :3], radii=np.maximum(samples[:, 3], 0.3), squash=squash)


def paint(image: Volume, grid: Grid, noise: Noise, structure: Structure, fat_hu: float) -> None:
    """Paint one structure over the image, in place."""
    margin = 3 * grid.voxel_mm + structure.halo_mm + 2 * structure.roughness_mm
    box, distance = structure.shape.distance(grid, margin)
    if not distance.size:
        return
    if structure.roughness_mm:
        distance = distance + np.float32(structure.roughness_mm) * noise.mm14[box]
    if structure.halo_mm:
        blend(image, box, coverage(distance - np.float32(structure.halo_mm), 2 * grid.voxel_mm), fat_hu)
    texture = np.float32(structure.texture_hu) * noise.mm6[box] + np.float32(structure.hu)
    blend(image, box, coverage(distance, grid.voxel_mm), texture)
    if structure.lumen is not None:
        lumen = structure.lumen
        inner = distance + np.float32(lumen.wall_mm) + np.float32(lumen.folds_mm) * noise.mm6[box]
        contents = np.float32(lumen.hu) + np.float32(lumen.texture_hu) * noise.mm3[box]
        if lumen.gas_share:
            y = grid.axis_mm(1)[box[1]].reshape(1, -1, 1)
            level = y[0, 0, 0] + (y[0, -1, 0] - y[0, 0, 0]) * np.float32(lumen.gas_share)
            gas = np.clip((level - y) * np.float32(1 / grid.voxel_mm), 0, 1)
            contents = contents + gas * (-980 - contents)
        blend(image, box, coverage(inner, grid.voxel_mm), contents)


def as_point(values: NDArray[np.float64]) -> Point:
    """Three Python numbers of an array of three."""
    z, y, x = (float(value) for value in values)
    return z, y, x


def random_turn(rng: np.random.Generator, degrees: float) -> NDArray[np.float64]:
    """Random rotation matrix, each axis by a normal angle of that standard deviation."""
    turn = np.eye(3)
    for axis, angle in enumerate(np.deg2rad(rng.normal(0, degrees, 3))):
        plane = np.eye(3)
        i, j = [a for a in range(3) if a != axis]
        plane[i, i] = plane[j, j] = np.cos(angle)
        plane[i, j], plane[j, i] = -np.sin(angle), np.sin(angle)
        turn = turn @ plane
    return turn
