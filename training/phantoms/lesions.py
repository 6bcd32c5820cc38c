"""The pancreas with its ducts and one lesion, whose traits depend on the subtype statistically."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from .anatomy import AnatomyParameters, Pancreas
from .painting import (
    Ellipsoid,
    Grid,
    Noise,
    Point,
    Structure,
    Tube,
    Volume,
    as_point,
    blend,
    coverage,
    paint,
    random_turn,
    tube,
)

TRAITS = ("attenuation", "texture", "margin", "rim", "duct", "location", "size")

# Mean of each trait by subtype, in standard deviations. Lesions of subtype 0 tend to be solid, dark, ill-defined, in
# the head, and to dilate the duct; of 1 cystic, septated, in body and tail; of 2 bright, sharp, small, with a rim.
TENDENCIES = np.array(
    [
        [-0.1, 0.4, 1.6, -0.5, 1.7, -0.6, 0.1],
        [-1.9, 0.4, -0.7, -0.2, -0.5, 0.6, 0.4],
        [1.8, -0.5, -0.7, 1.0, -0.9, 0.1, -0.5],
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LesionParameters:
    """One lesion as drawn.

    Attributes:
        subtype: 0, 1 or 2.
        traits: Values of `TRAITS`, each normal with standard deviation 1 around the subtype's tendency.
        arc: Place along the gland, 0 at the uncinate process to 1 at the tail.
        centre_mm: Centre (z, y, x) in the region.
        radii_mm: Half axes before `turn`.
        turn: Rotation matrix, by rows.
        roughness_mm: How far the surface strays from the ellipsoid.
        hu: Mean attenuation.
        texture_hu: Strength of the texture inside.
        septated: Whether that texture is walls between chambers, or blotches.
        margin_mm: Width over which the lesion fades into its surroundings.
        rim_hu: Enhancement of the rim over the inside.
        rim_mm: Width of the rim.
        duct_mm: Diameter of the duct between lesion and papilla.
        dilated_duct_mm: Diameter of the duct between lesion and tail.
    """

    subtype: int
    traits: tuple[float, ...]
    arc: float
    centre_mm: Point
    radii_mm: Point
    turn: tuple[Point, Point, Point]
    roughness_mm: float
    hu: float
    texture_hu: float
    septated: bool
    margin_mm: float
    rim_hu: float
    rim_mm: float
    duct_mm: float
    dilated_duct_mm: float

    @property
    def shape(self) -> Ellipsoid:
        """The lesion's ellipsoid."""
        return Ellipsoid(centre=self.centre_mm, radii=self.radii_mm, turn=np.array(self.turn))


def draw_lesion(
    rng: np.random.Generator,
    grid: Grid,
    anatomy: AnatomyParameters,
    pancreas: Pancreas,
    *,
    subtype: int,
    separation: float,
) -> LesionParameters:
    """Draw a lesion of a subtype.

    Args:
        rng: Source of randomness.
        grid: The region, which must hold the lesion.
        anatomy: The patient: a solid lesion's attenuation is relative to the gland's.
        pancreas: The gland with the lesion.
        subtype: 0, 1 or 2.
        separation: Scale of `TENDENCIES`; at 0 the subtypes look alike.

    Note:
        Traits are independent, normal, of unit variance, and each maps monotonically to one property.
        So the best classifier on the traits is linear, and its error is known from the means alone.
    """
    traits = rng.standard_normal(len(TRAITS)) + separation * TENDENCIES[subtype]
    attenuation, texture, margin, rim, duct, location, size = (float(t) for t in traits)
    gland = anatomy.pancreas_hu
    # Fluid has its own attenuation, solid tissue one that follows the gland's.
    scale_hu = [0, 22, gland - 42, gland - 6, gland + 34, gland + 55]
    hu = float(np.interp(attenuation, [-2.5, -1.2, 0, 1.2, 2.5, 3.5], scale_hu))
    diameter = float(np.clip(29.5 * math.exp(0.36 * size), 5, 50))
    ratios = np.exp(rng.normal(0, 0.12, 3))
    radii = diameter / 2 * ratios / np.cbrt(ratios.prod())
    arc = 0.06 + 0.9 * 0.5 * (1 + math.erf(0.85 * location / math.sqrt(2)))
    axis, girth = pancreas.at(arc)
    way = rng.standard_normal(3)
    # Small lesions lie anywhere in the gland, large ones bulge out of it.
    push = rng.uniform(0, 0.5) * girth + rng.uniform(0.2, 0.7) * max(0.0, diameter / 2 - girth)
    room = np.maximum(np.array(grid.extent_mm) / 2 - 1.1 * radii.max() - 2, 0)
    centre = np.clip(axis + way / np.sqrt((way**2).sum()) * push, -room, room)
    turn = random_turn(rng, 40)
    return LesionParameters(
        subtype=subtype,
        traits=tuple(float(t) for t in traits),
        arc=arc,
        centre_mm=as_point(centre),
        radii_mm=as_point(radii),
        turn=(as_point(turn[0]), as_point(turn[1]), as_point(turn[2])),
        roughness_mm=float(radii.min() * np.clip(0.09 + 0.025 * margin, 0.03, 0.16)),
        hu=hu,
        texture_hu=float(np.clip(11 * math.exp(0.55 * texture), 2, 45)),
        septated=bool(hu < gland - 45 and rng.random() < 0.7),
        margin_mm=float(np.clip(2.0 * math.exp(0.6 * margin), 0.5, 9)),
        rim_hu=float(np.clip(14 + 22 * rim, 0, 85)),
        rim_mm=float(rng.uniform(1.5, 3.2)),
        duct_mm=float(rng.uniform(1.2, 2.6)),
        dilated_duct_mm=float(np.clip(2.6 * math.exp(0.5 * duct), 1.2, 11)),
    )


def paint_pancreas(
    image: Volume, grid: Grid, noise: Noise, anatomy: AnatomyParameters, pancreas: Pancreas, lesion: LesionParameters
) -> tuple[Volume, Volume]:
    """Paint the gland, its ducts and the lesion over the abdomen, in place.

    Returns:
        Shares (Z, Y, X) of each voxel inside the gland, and inside the lesion, as a reader would outline them.
    """
    gland = _atrophied(pancreas, lesion)
    box, distance = gland.shape.distance(grid, 4 + 3 * anatomy.lobulation_mm)
    lobules = np.float32(anatomy.lobulation_mm) * (noise.mm6[box] + 0.5 * noise.mm14[box])
    # Fat runs between the lobules along the zero crossings of a field, and thins them evenly.
    clefts = np.clip(1 - np.abs(noise.mm6[box] - 0.3 * noise.mm3[box]) * 2.5, 0, 1)
    fat = np.float32(anatomy.fat_infiltration) * (0.1 + 0.65 * clefts)
    parenchyma = anatomy.pancreas_hu + 5 * noise.mm3[box]
    parenchyma = parenchyma + fat * (anatomy.fat_hu - parenchyma)
    blend(image, box, coverage(distance + lobules, grid.voxel_mm), parenchyma)
    for duct in _ducts(gland, lesion):
        paint(image, grid, noise, duct, anatomy.fat_hu)
    inside = np.zeros(grid.shape, np.float32)
    # A reader's outline is smoother than the gland and takes in the fat between its lobules.
    inside[box] = coverage(distance + 0.6 * lobules, grid.voxel_mm)
    return inside, _paint_lesion(image, grid, noise, lesion)


def _atrophied(pancreas: Pancreas, lesion: LesionParameters) -> Pancreas:
    """The gland wastes away where its duct is dilated."""
    loss = 0.3 * min(1.0, max(0.0, (lesion.dilated_duct_mm - 3) / 6))
    upstream = np.clip((pancreas.arc - lesion.arc) / 0.1, 0, 1)
    return replace(pancreas, radii=pancreas.radii * (1 - loss * upstream))


def _ducts(pancreas: Pancreas, lesion: LesionParameters) -> list[Structure]:
    """The pancreatic duct, wide between lesion and tail, and the bile duct on its way down through the head."""
    # The duct starts at the papilla, in the head, not in the uncinate process.
    along = pancreas.arc > 0.2
    arc = pancreas.arc[along]
    wide = np.clip((arc - lesion.arc) / 0.03, 0, 1) * np.clip((1.02 - arc) / 0.15, 0, 1)
    radius = (lesion.duct_mm * (1.1 - 0.5 * arc) * (1 - wide) + lesion.dilated_duct_mm * wide) / 2
    radius = np.minimum(radius, 0.55 * pancreas.radii[along])
    duct = Tube(points=pancreas.points[along], radii=radius)
    (z, y, x), girth = pancreas.at(0.24)
    dilated = 0.25 * lesion.dilated_duct_mm if lesion.arc < 0.35 else 0.0
    bile = [(z - 8, y + 0.2 * girth, x - 0.5 * girth, 2.2), (z + 6, y + 0.5 * girth, x - 0.35 * girth, 2.6 + dilated)]
    bile.append((z + 30, y + 0.2 * girth, x - 6, 3.0 + dilated))
    return [Structure(shape=duct, hu=12), Structure(shape=tube(bile), hu=8)]


def _paint_lesion(image: Volume, grid: Grid, noise: Noise, lesion: LesionParameters) -> Volume:
    """Paint the lesion in place and return the share of each voxel inside it."""
    # Small lesions are rough on a small scale.
    rough = noise.mm14 if min(lesion.radii_mm) > 9 else noise.mm6
    box, distance = lesion.shape.distance(grid, lesion.margin_mm + 3 * lesion.roughness_mm + 2 * grid.voxel_mm)
    distance = distance + np.float32(lesion.roughness_mm) * np.clip(rough[box], -2, 2)
    if lesion.septated:
        walls = np.clip(1 - np.abs(noise.mm14[box] + 0.3 * noise.mm6[box]) * 4, 0, 1)
        hu = lesion.hu + np.float32(3.2 * lesion.texture_hu) * walls
    else:
        hu = lesion.hu + np.float32(lesion.texture_hu) * (0.8 * noise.mm6[box] + 0.6 * noise.mm3[box])
    rim = 1 - coverage(distance + np.float32(lesion.rim_mm), max(grid.voxel_mm, 1.5))
    hu = hu + np.float32(lesion.rim_hu) * rim
    # A blurred margin is also an uneven one: strands of the lesion reach out.
    strands = np.float32(0.2 * lesion.margin_mm) * noise.mm3[box]
    blend(image, box, coverage(distance + strands, max(grid.voxel_mm, lesion.margin_mm)), hu)
    inside = np.zeros(grid.shape, np.float32)
    inside[box] = coverage(distance, grid.voxel_mm)
    return inside


def outline(gland: Volume, lesion: Volume) -> NDArray[np.uint8]:
    """Turn shares of voxels into labels.

    Args:
        gland: (Z, Y, X) share of each voxel inside the gland.
        lesion: (Z, Y, X) share of each voxel inside the lesion.

    Returns:
        (Z, Y, X) uint8: 0 background, 1 pancreas, 2 lesion. The lesion is one piece, and so are both together.
    """
    # A lesion thinner than a slice fills no voxel by half; it is outlined where it fills most.
    pieces = _pieces(lesion > min(0.5, 0.5 * float(lesion.max())))
    sizes = np.bincount(pieces.ravel())
    found = pieces == 1 + np.argmax(sizes[1:])
    pieces = _pieces((gland > 0.5) | found)
    mask = (pieces == pieces[found][0]).astype(np.uint8)
    mask[found] = 2
    return mask


def _pieces(mask: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Number the pieces of a mask that are connected by faces, from 1."""
    pieces = np.empty(mask.shape, np.int32)
    ndimage.label(mask, output=pieces)
    return pieces
