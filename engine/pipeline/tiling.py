"""The tiles that cover a grid: where they lie, what they weigh, and which planes a row of them needs and ends.

All functions are in the part of Python that torch.jit.script compiles: `sliding_window` calls them for the engine, and
`export.scripted` for path.ts. The annotations of a NamedTuple must be types, so this module has no
`from __future__ import annotations`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .window import tile_starts


class Tiling(NamedTuple):
    """The tiles that cover a grid, in rows along z.

    Attributes:
        shape: Size of the grid (z, y, x).
        patch_size: Size of a tile.
        padded: Size of the grid with padding, at least that of a tile.
        before: Voxels of padding before the grid.
        starts: First voxels of the tiles along each axis of the padded grid.
        weights: For each axis (tiles, patch) float32 on the grid's device. Their products are the weights of a tile,
            divided by the sum over all tiles and by the number of its views.
    """

    shape: list[int]
    patch_size: list[int]
    padded: list[int]
    before: list[int]
    starts: list[list[int]]
    weights: list[Tensor]


def gaussian(patch: int) -> Tensor:
    """One axis of nnU-Net's importance map, (patch,) float64 with maximum 1.

    Note:
        nnU-Net filters an impulse at `patch // 2` with a Gaussian of sigma `patch / 8` in all axes at once
        (compute_gaussian). That filter is separable, and its truncation at 4 sigma lies at the patch's edge.
    """
    distance = torch.arange(patch, dtype=torch.float64) - patch // 2
    return torch.exp(-0.5 * (distance / (patch / 8)) ** 2)


def axis_weights(length: int, patch: int, positions: list[int], use_gaussian: bool = True) -> list[Tensor]:
    """Weights of each tile along one axis, Gaussian or all alike, divided by their sum over all tiles at each voxel.

    The sum of weights over a product grid of tiles is the product of these sums, so no count map is needed.

    Returns:
        For each position (patch,) float32.
    """
    weight = gaussian(patch) if use_gaussian else torch.ones(patch, dtype=torch.float64)
    total = torch.zeros(length, dtype=torch.float64)
    for start in positions:
        total[start : start + patch] += weight
    return [(weight / total[start : start + patch]).float() for start in positions]


def cover(
    shape: list[int],
    patch_size: list[int],
    tile_step_size: float,
    slicewise: bool,
    use_gaussian: bool,
    views: int,
    device: torch.device,
) -> Tiling:
    """Cover a grid with tiles; the grid is padded on both sides to at least one tile (nnU-Net: pad_nd_image).

    Args:
        shape: Size of the grid (z, y, x).
        patch_size: As in `SlidingWindow`, like the next three.
        tile_step_size: Distance of tiles as a fraction of the patch.
        slicewise: Whether every plane is a row of tiles.
        use_gaussian: Whether voxels in the middle of a tile count more.
        views: Number of views of each tile.
        device: Device of the weights.
    """
    padded = [max(shape[axis], patch_size[axis]) for axis in range(3)]
    before = [(padded[axis] - shape[axis]) // 2 for axis in range(3)]
    starts = tile_starts(padded, patch_size, tile_step_size, slicewise)
    weights: list[Tensor] = []
    for axis in range(3):
        of_axis = axis_weights(padded[axis], patch_size[axis], starts[axis], use_gaussian)
        weights.append(torch.stack(of_axis).to(device))  # one copy for each axis: a GPU is waited for at each
    weights[0].div_(views)
    return Tiling(shape, patch_size, padded, before, starts, weights)


def weights_of(tiling: Tiling, row: int, y: int, x: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of a tile along z, y and x, from its index along each axis."""
    return tiling.weights[0][row], tiling.weights[1][y], tiling.weights[2][x]


def corner_of(tiling: Tiling, y: int, x: int) -> list[int]:
    """First voxel of a tile in the input of its row, which has no padding along y and x."""
    return [0, tiling.starts[1][y] - tiling.before[1], tiling.starts[2][x] - tiling.before[2]]


def place_of(tiling: Tiling, sums: Tensor, y: int, x: int) -> Tensor:
    """View a tile in the sums of its row, (K, depth, Y, X) with padding."""
    top, left = tiling.starts[1][y], tiling.starts[2][x]
    return sums[:, :, top : top + tiling.patch_size[1], left : left + tiling.patch_size[2]]


def added_planes(tiling: Tiling, row: int, held: int) -> tuple[int, int]:
    """Planes of the padded grid, [start, stop), that a row of tiles needs and the row `held` before it does not have.

    Without a row before it, such as -1 for the first, it needs all its planes.
    """
    starts, depth = tiling.starts[0], tiling.patch_size[0]
    start = max(starts[held] + depth, starts[row]) if 0 <= held < row else starts[row]
    return start, starts[row] + depth


def planes_ended(tiling: Tiling, row: int) -> int:
    """Number of planes of a row of tiles that no later row adds to."""
    starts = tiling.starts[0]
    return (starts[row + 1] if row + 1 < len(starts) else tiling.padded[0]) - starts[row]


def without_padding(tiling: Tiling, start: int, stop: int) -> tuple[int, int]:
    """Planes of the grid, [first, last), among the planes [start, stop) of the padded grid."""
    return max(start - tiling.before[0], 0), min(stop - tiling.before[0], tiling.shape[0])


def planes_in_row(tiling: Tiling, buffer: Tensor, row: int, first: int, last: int) -> Tensor:
    """View the planes [first, last) of the grid in a buffer of a row of tiles, (C, depth, Y, X)."""
    offset = tiling.before[0] - tiling.starts[0][row]
    return buffer[:, first + offset : last + offset]


def finished_planes(tiling: Tiling, sums: Tensor, row: int) -> Tensor:
    """View the planes of the grid that no later row of tiles adds to; they have padding along y and x."""
    top = tiling.starts[0][row]
    first, last = without_padding(tiling, top, top + planes_ended(tiling, row))
    return planes_in_row(tiling, sums, row, first, last)


def cropped_planes(tiling: Tiling, planes: Tensor) -> Tensor:
    """View (K, planes, Y, X) without padding along y and x."""
    y, x = tiling.before[1], tiling.before[2]
    return planes[:, :, y : y + tiling.shape[1], x : x + tiling.shape[2]]


def shift_planes(buffer: Tensor, planes: int) -> None:
    """Drop the first planes of (C, Z, Y, X), move the others up and clear the rest."""
    depth = buffer.shape[1]
    for plane in range(0, depth - planes, max(planes, 1)):  # as many at once as do not overlap
        count = min(planes, depth - planes - plane)
        buffer[:, plane : plane + count] = buffer[:, plane + planes : plane + planes + count]
    buffer[:, depth - planes :] = 0
