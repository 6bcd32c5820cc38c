"""Where the organs around the pancreas lie, by its landmarks, and how they look.

The vessels pass behind the pancreas' neck, the duodenum holds its head, the splenic vein follows its body. Points are
(z, y, x) in mm from the centre of the region (see `painting`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .anatomy import AnatomyParameters, Pancreas
from .painting import (
    Ellipsoid,
    Grid,
    Lumen,
    Noise,
    Point,
    Structure,
    Volume,
    as_point,
    blend,
    coverage,
    offsets,
    paint,
    random_turn,
    tube,
)


def paint_abdomen(
    rng: np.random.Generator, grid: Grid, noise: Noise, parameters: AnatomyParameters, pancreas: Pancreas
) -> Volume:
    """Paint everything but the pancreas.

    Args:
        rng: Source of the organs' positions.
        grid: The voxels to paint.
        noise: Fields for textures and surfaces.
        parameters: The patient.
        pancreas: The gland, whose landmarks place the other organs.

    Returns:
        (Z, Y, X) float32 HU.
    """
    sites = _Sites.of(rng, grid, pancreas)
    # Thin sheets of connective tissue and vessels too small to see run through the fat.
    sheets = np.clip(1 - np.abs(noise.mm14 + 0.35 * noise.mm6) * 9, 0, 1)
    fat = np.float32(parameters.fat_hu) + 5 * noise.mm14 + 3 * noise.mm3
    image = fat + np.float32(parameters.stranding_hu) * sheets
    for structure in (
        *_retroperitoneum(rng, parameters, sites),
        *_solid_organs(rng, parameters, sites),
        *_gut(rng, parameters, sites),
    ):
        paint(image, grid, noise, structure, parameters.fat_hu)
    _paint_wall(image, fat, grid, noise, parameters, back_mm=sites.spine[1] + 75 * sites.scale)
    box, distance = pancreas.shape.distance(grid, parameters.fat_plane_mm + 4)
    bed = coverage(distance - np.float32(parameters.fat_plane_mm + 1), 3 * grid.voxel_mm)
    blend(image, box, bed, np.float32(parameters.fat_hu) + 5 * noise.mm6[box])
    for structure in _vessels(rng, parameters, sites, pancreas):
        paint(image, grid, noise, structure, parameters.fat_hu)
    return image


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sites:
    """Landmarks in mm, and how large this patient is."""

    scale: float
    head: Point
    neck: Point
    tail: Point
    aorta: Point
    cava: Point
    spine: Point

    @classmethod
    def of(cls, rng: np.random.Generator, grid: Grid, pancreas: Pancreas) -> _Sites:
        _, depth, width = grid.extent_mm
        scale = float(np.clip((depth / 87 + width / 131) / 2, 0.8, 1.3))
        head, neck, tail = (as_point(pancreas.at(arc)[0]) for arc in (0.22, 0.52, 0.98))
        aorta = (0.0, neck[1] + scale * rng.uniform(36, 44), neck[2] + scale * rng.uniform(8, 15))
        spine = (0.0, aorta[1] + scale * 27, aorta[2] - scale * rng.uniform(6, 12))
        cava = (0.0, aorta[1] + scale * rng.uniform(-4, 2), aorta[2] - scale * rng.uniform(29, 35))
        return cls(scale=scale, head=head, neck=neck, tail=tail, aorta=aorta, cava=cava, spine=spine)


def _paint_wall(
    image: Volume, fat: Volume, grid: Grid, noise: Noise, parameters: AnatomyParameters, back_mm: float
) -> None:
    """Paint two layers of muscle, subcutaneous fat, skin and the air outside, where the region reaches so far."""
    middle, depth = (back_mm - parameters.front_mm) / 2, (back_mm + parameters.front_mm) / 2
    box = grid.box(-np.array(grid.extent_mm), np.array(grid.extent_mm))
    _, y, x = offsets(grid, box, (0.0, middle, 0.0))
    k = np.sqrt((y / np.float32(depth)) ** 2 + (x / np.float32(1.45 * depth)) ** 2)
    skin = (k - 1) * np.float32(depth)
    under = parameters.subcutaneous_mm
    if float(skin.max()) < -(under + 20):
        return
    muscle = np.float32(parameters.muscle_hu) + 6 * noise.mm6
    layers = (
        (under + 10, muscle),
        (under + 5.5, fat),
        (under + 4.5, muscle),
        (under, fat),
        (1.8, 30.0),
        (0.0, -1000.0),
    )
    for depth_mm, hu in layers:
        # The skin is even; deeper layers undulate.
        outside = np.float32(-depth_mm) - skin - min(1.5, depth_mm / 8) * noise.mm14
        blend(image, box, coverage(outside, grid.voxel_mm), hu)


def _retroperitoneum(rng: np.random.Generator, p: AnatomyParameters, sites: _Sites) -> list[Structure]:
    """Spine, muscles beside it, kidneys, adrenals, aorta and vena cava, from back to front."""
    s, (_, y, x) = sites.scale, sites.spine
    marrow = Lumen(wall_mm=1.3, hu=float(rng.uniform(150, 230)), texture_hu=35)
    canal = Lumen(wall_mm=4, hu=35)
    column = [(-120.0, y, x), (0.0, y, x), (120.0, y, x)]
    behind = [(z, y + 27 * s, x) for z, y, x in column]
    found = [
        Structure(shape=tube(behind, 12 * s), hu=330, lumen=canal),
        Structure(shape=tube(column, 18 * s, squash=(1, 1.15, 0.85)), hu=330, lumen=marrow),
    ]
    first = rng.uniform(0, 34) - 119
    for disc in range(7):
        centre = (first + 34 * disc, y, x)
        found.append(Structure(shape=Ellipsoid(centre=centre, radii=(4.5, 17 * s, 22.5 * s)), hu=90, roughness_mm=0.5))
    for side in (-1, 1):
        psoas = [(20, y + 8 * s, x + side * 24 * s, 4 * s), (-25, y + 6 * s, x + side * 33 * s, 12 * s)]
        psoas.append((-90, y + 2 * s, x + side * 42 * s, 18 * s))
        crus = [(-15, y - 14 * s, x + side * 15 * s, 3.5), (30, y - 20 * s, x + side * 19 * s, 5.0)]
        crus.append((90, y - 30 * s, x + side * 22 * s, 6.0))
        found += [Structure(shape=tube(line), hu=p.muscle_hu, texture_hu=6, roughness_mm=0.8) for line in (psoas, crus)]
        top = 35 if side > 0 else 20
        kidney = (top - 40 + rng.normal(0, 8), y + rng.uniform(-8, 6) * s, x + side * rng.uniform(58, 66) * s)
        found += _kidney(rng, p, kidney, s, side)
        limb = (top + 2, sites.aorta[1] + 10 * s, sites.aorta[2] + (20 if side > 0 else -42) * s)
        for spread in (-6, 8):
            leg = [tuple(np.add(limb, (-8 * step, 8 * step, spread * step / 2))) for step in range(3)]
            found.append(Structure(shape=tube(leg, 2.2), hu=75, halo_mm=2))
    _, y, x = sites.cava
    line = [(-120, y + 3, x, 10 * s), (0, y, x, 10.5 * s), (120, y - 12 * s, x - 4, 11.5 * s)]
    cava = tube(line, squash=(1, 1.25, 0.9))
    found.append(Structure(shape=cava, hu=p.vein_hu - 15, texture_hu=5, halo_mm=1.5))
    _, y, x = sites.aorta
    radius = s * rng.uniform(8.5, 11.5)
    aorta = tube([(-120, y + 2, x - 3), (0, y, x), (60, y + 2, x + 1), (120, y + 8, x + 3)], radius)
    found.append(Structure(shape=aorta, hu=p.artery_hu, halo_mm=2))
    calcified = [(z, y - radius * 0.85, x + rng.uniform(-6, 6)) for z in rng.uniform(-60, 60, rng.integers(0, 5))]
    found += [Structure(shape=Ellipsoid(centre=c, radii=(3, 0.9, 2.5)), hu=550) for c in calcified]
    # The left renal vein crosses in front of the aorta.
    renal = [(-10 * s, y - 4, x - 22 * s), (-8 * s, y - radius - 4, x - 3), (-6 * s, y - radius - 3, x + 10)]
    renal += [(-4, y + 6, x + 30), (-4, y + 12, x + 45)]
    found.append(Structure(shape=tube(renal, 3.8 * s), hu=p.vein_hu))
    return found


def _kidney(rng: np.random.Generator, p: AnatomyParameters, centre: Point, s: float, side: int) -> list[Structure]:
    """Cortex, medulla, and the fat and pelvis of the sinus, open to the middle."""
    z, y, x = centre
    turn = random_turn(rng, 8)
    cortex = Ellipsoid(centre=centre, radii=(52 * s, 24 * s, 27 * s), turn=turn)
    medulla = Ellipsoid(centre=centre, radii=(45 * s, 17 * s, 20 * s), turn=turn)
    sinus = Ellipsoid(centre=(z, y - 3 * s, x - side * 12 * s), radii=(24 * s, 8 * s, 17 * s), turn=turn)
    pelvis = [(z + 15, y, x - side * 8 * s), (z, y - 3, x - side * 14 * s), (z - 40, y - 6 * s, x - side * 22 * s)]
    return [
        Structure(shape=cortex, hu=p.kidney_hu, texture_hu=6, roughness_mm=1, halo_mm=3),
        Structure(shape=medulla, hu=p.kidney_hu - 35, texture_hu=14, roughness_mm=3),
        Structure(shape=sinus, hu=p.fat_hu + 25, texture_hu=20, roughness_mm=3),
        Structure(shape=tube(pelvis, 3.2), hu=15),
    ]


def _solid_organs(rng: np.random.Generator, p: AnatomyParameters, sites: _Sites) -> list[Structure]:
    """Spleen, liver with its vessels, and gallbladder."""
    s, head, tail = sites.scale, sites.head, sites.tail
    spleen = Ellipsoid(centre=(tail[0] + 12, tail[1] + 16 * s, tail[2] + 40 * s), radii=(45, 38 * s, 31 * s))
    right = (52.0, head[1] - 8 * s, head[2] - rng.uniform(60, 76) * s)
    bulk = {"hu": p.liver_hu, "texture_hu": 4, "roughness_mm": 3.0}
    found = [
        Structure(shape=spleen, hu=p.spleen_hu, texture_hu=4, roughness_mm=2, halo_mm=p.fat_plane_mm),
        Structure(shape=Ellipsoid(centre=right, radii=(78, 70 * s, 58 * s)), halo_mm=p.fat_plane_mm, **bulk),
        Structure(shape=Ellipsoid(centre=(70.0, -48 * s, -12 * s), radii=(48, 32 * s, 62 * s)), **bulk),
        Structure(shape=Ellipsoid(centre=(62.0, 6 * s, head[2] + 8 * s), radii=(32, 14 * s, 16 * s)), **bulk),
    ]
    for _ in range(10):
        start = np.array([rng.uniform(25, 80), rng.uniform(-35, 15) * s, head[2] - rng.uniform(25, 80) * s])
        bend, end = (start + rng.normal(0, size, 3) for size in (10, 25))
        branch = tube([(*start, 2.8), (*bend, 2.2), (*end, 1.0)])
        found.append(Structure(shape=branch, hu=p.vein_hu))
    if rng.random() < 0.8:
        bladder = Ellipsoid(
            centre=(8 + rng.normal(0, 6), head[1] - 27 * s, head[2] - rng.uniform(4, 14) * s),
            radii=(rng.uniform(18, 26), rng.uniform(9, 14), rng.uniform(9, 14)),
            turn=random_turn(rng, 15),
        )
        bile = Lumen(wall_mm=1.4, hu=float(rng.uniform(2, 18)))
        found.append(Structure(shape=bladder, hu=70, roughness_mm=1, lumen=bile))
    return found


def _gut(rng: np.random.Generator, p: AnatomyParameters, sites: _Sites) -> list[Structure]:
    """Colon, small bowel, stomach and duodenum, each a wall around contents."""
    s, head, neck, aorta = sites.scale, sites.head, sites.neck, sites.aorta
    found: list[Structure] = []

    def bowel(line: list[tuple[float, ...]], radius: float | None, lumen: Lumen, squash: Point = (1, 1, 1)) -> None:
        halo = 0.6 + 0.5 * p.fat_plane_mm
        shape = tube(line, radius, squash)
        found.append(Structure(shape=shape, hu=p.bowel_wall_hu, roughness_mm=2, halo_mm=halo, lumen=lumen))

    low = -34 * s + rng.normal(0, 7)
    stool = Lumen(wall_mm=2.2, hu=float(rng.uniform(-60, 40)), texture_hu=90, gas_share=float(rng.uniform(0, 0.75)))
    xs = np.linspace(-80, 85, 12) * s
    sag = [low - 14 * s * (1 - (x / (85 * s)) ** 2) + rng.normal(0, 3) for x in xs]
    line = [(z, neck[1] - 26 * s, x, rng.uniform(11, 19) * s) for z, x in zip(sag, xs, strict=True)]
    bowel(line, None, stool)
    for _ in range(int(rng.integers(8, 15))):
        start = np.array([rng.uniform(-62, -6), neck[1] + rng.uniform(-18, 22) * s, rng.uniform(8, 66) * s])
        steps = np.cumsum(rng.normal(0, (9, 9, 16), (4, 3)), 0)
        contents = p.oral_contrast_hu if rng.random() < 0.6 else 35.0
        gas = float(rng.uniform(0.2, 0.45)) if rng.random() < 0.25 else 0.0
        inside = Lumen(wall_mm=2.0, hu=contents, texture_hu=12, folds_mm=1.5, gas_share=gas)
        bowel([tuple(start), *(tuple(start + step) for step in steps)], float(rng.uniform(7, 11.5)) * s, inside)
    front = neck[1] - rng.uniform(22, 30) * s
    full = rng.uniform(0.7, 1.25)
    line = [(75.0, 5 * s, 48 * s, 26 * full * s), (48.0, -22 * s, 50 * s, 25 * full * s)]
    line += [(20.0, front - 4, 32 * s, 19 * full * s), (8.0, front - 2, 5 * s, 14 * full * s)]
    line += [(12.0, front + 6, -18 * s, 11 * s), (16.0, head[1] - 24 * s, head[2], 8 * s)]
    gas = float(rng.uniform(0.1, 0.5)) if rng.random() < 0.6 else 0.0
    meal = Lumen(wall_mm=4.5, hu=p.oral_contrast_hu, texture_hu=14, folds_mm=1.6, gas_share=gas)
    bowel(line, None, meal, (1.0, 1.25, 1.0))
    outside = head[2] - 24 * s
    line = [(16.0, head[1] - 20 * s, head[2] - 4 * s), (10.0, head[1] - 4 * s, outside)]
    line += [(-20 * s, head[1] + 8 * s, outside), (-44 * s, head[1] + 12 * s, outside + 8 * s)]
    line += [(-52 * s, aorta[1] - 16 * s, sites.cava[2]), (-50 * s, aorta[1] - 17 * s, aorta[2])]
    line.append((-34 * s, aorta[1] - 18 * s, aorta[2] + 28 * s))
    inside = Lumen(wall_mm=2.6, hu=p.oral_contrast_hu, texture_hu=15, folds_mm=1.8)
    bowel(line, float(rng.uniform(8, 11)) * s, inside, (1, 1.15, 1))
    return found


def _vessels(rng: np.random.Generator, p: AnatomyParameters, sites: _Sites, pancreas: Pancreas) -> list[Structure]:
    """Portal system and arteries around the gland, and the small vessels of the mesentery."""
    s, (z, y, x), head, aorta = sites.scale, sites.neck, sites.head, sites.aorta
    joint = (z - 2, y + 14 * s, x - 2 * s)
    portal = [joint, (z + 18, y + 8 * s, x - 14 * s), (z + 45, y + 6 * s, x - 34 * s), (z + 60, y, x - 50 * s)]
    superior = [joint, (z - 20, y + 15 * s, x - 1), (z - 48, y + 11 * s, x + 2), (z - 100, y + 4 * s, x + 4)]
    sma = [(5, aorta[1] - 8 * s, aorta[2]), (0, y + 24 * s, x + 12 * s), (z - 25, y + 18 * s, x + 13 * s)]
    sma += [(z - 55, y + 13 * s, x + 15 * s), (z - 100, y + 8 * s, x + 14 * s)]
    celiac = [(16, aorta[1] - 8 * s, aorta[2]), (22, aorta[1] - 20 * s, aorta[2] - 2), (26, y + 14 * s, x + 8)]
    hepatic = [celiac[-1], (z + 14, y + 8 * s, x - 12 * s), (z + 22, y + 2, x - 24 * s), (z + 50, y, x - 44 * s)]
    gastroduodenal = [hepatic[2], (head[0] + 14, head[1] - 13 * s, head[2] + 2)]
    gastroduodenal.append((head[0] - 8, head[1] - 15 * s, head[2]))
    # Both splenic vessels follow the gland: the vein in its back, the artery winding along its upper edge.
    vein, artery = [joint], [celiac[-1]]
    for arc in np.linspace(0.6, 1.0, 7):
        point, radius = pancreas.at(float(arc))
        vein.append((point[0] - 1, point[1] + radius / 1.1 + 2.2 * s, point[2] + radius * 0.1))
        wind = rng.normal(0, 3, 2)
        artery.append((point[0] + radius * 0.9 + 2 + wind[0], point[1] + radius * 0.4 + wind[1], point[2]))
    hilum = (sites.tail[0] + 4, sites.tail[1] + 10 * s, sites.tail[2] + 14 * s)
    veins = [(portal, 6.2), (superior, 5.6), ([*vein, hilum], 4.0)]
    arteries = [(sma, 3.8), (celiac, 3.4), (hepatic, 2.4), (gastroduodenal, 1.7), ([*artery, hilum], 2.5)]
    found = []
    for _ in range(int(rng.integers(24, 40))):
        start = np.array(sites.neck) + rng.uniform((-75, -4 * s, -4 * s), (-10, 16 * s, 20 * s))
        end = start + rng.uniform((-45, -45 * s, -55 * s), (10, 12 * s, 65 * s))
        bend = (start + end) / 2 + rng.normal(0, 6, 3)
        hu = p.vein_hu if rng.random() < 0.6 else p.artery_hu
        found.append(Structure(shape=tube([(*start, rng.uniform(1.2, 2.2)), (*bend, 1.3), (*end, 0.8)]), hu=hu - 10))
    for _ in range(int(rng.integers(20, 45))):
        start = rng.uniform(-0.5, 0.5, 3) * [110, 85, 130] * s
        end = start + rng.normal(0, 14, 3)
        twig = tube([(*start, 1.0), (*((start + end) / 2 + rng.normal(0, 4, 3)), 0.8), (*end, 0.6)])
        found.append(Structure(shape=twig, hu=p.vein_hu - 20))
    for _ in range(int(rng.integers(2, 7))):
        node = (z + rng.uniform(-45, 25), y + rng.uniform(8, 34) * s, x + rng.uniform(-30, 35) * s)
        found.append(Structure(shape=Ellipsoid(centre=node, radii=(4, 2.6, 3.4), turn=random_turn(rng, 40)), hu=72))
    found += [Structure(shape=tube(line, r * s), hu=p.vein_hu, texture_hu=4) for line, r in veins]
    found += [Structure(shape=tube(line, r * s), hu=p.artery_hu) for line, r in arteries]
    return found
