"""Covers the network's grid with tiles, and adds their mirrored, Gaussian-weighted logits row by row.

Tiles run in z order. When the next row of tiles starts below a plane, that plane's logits are final, and it is passed
on and dropped. So memory holds one row of tiles, independent of the length of the scan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ...kernels import accumulate_views
from ..model.mirroring import View
from ..model.runner import Runner
from .finiteness import watch_finite
from .preprocessing import Case
from .tile_network import TileNetwork, tile_groups
from .timing import Timings
from .voting import Votes
from .window import SlidingWindow


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


def predict_logits(
    case: Case,
    runner: Runner,
    window: SlidingWindow,
    num_outputs: int,
    *,
    timings: Timings,
    votes: Votes | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Tensor]:
    """Run the network on all tiles of a case, and yield finished planes of logits in ascending z.

    Args:
        case: The scan.
        runner: The network.
        window: Tiles that cover the grid.
        num_outputs: K, channels of the network's segmentation output.
        timings: Gets the times of "preprocess", "network" and "stitch".
        votes: Gets the class logits of each tile from a multi-task network.
        progress: Called with (tiles done, all tiles).

    Raises:
        PredictionError: Where the network fails or its logits are not finite.

    Yields:
        (K, planes, Y, X) float32 on the case's device: averaged over views and tiles, without padding. It is a view of
        a buffer, which the next step overwrites.
    """
    sums = _RowSums(case, window, num_outputs)
    rows = _RowInputs(case, sums.before[0], sums.starts[0], window.patch_size[0])
    network = TileNetwork(runner, window, num_outputs, case.device, timings, votes)
    done, require_finite = 0, watch_finite(torch.empty(0))
    for row in range(len(sums.starts[0])):
        with timings("preprocess"):
            volume = rows.advance()
        for group in tile_groups(sums.tiles, window.tiles_per_call):
            for place, views, logits in network(volume, [sums.read_from(tile) for tile in group]):
                with timings("stitch"):
                    sums.add(row, group[place], views, logits)
            for _ in group:
                done += 1
                if progress is not None:
                    progress(done, len(sums.starts[0]) * len(sums.tiles))
        with timings("stitch"):
            finished = sums.finished(row)
            # Of the row before: a GPU has this one to go on with, and need not wait for the answer.
            require_finite()
            require_finite = watch_finite(finished)
        if finished.shape[1]:
            yield sums.without_padding(finished)
        with timings("stitch"):
            sums.leave(row)
    require_finite()


Tile = tuple[int, int]
"""Index of a tile in its row, along y and x."""


class _RowSums:
    """Weighted sums of the logits of one row of tiles, over the padded grid; planes that rows share are kept.

    Args:
        case: Case whose grid is covered.
        window: Tiles that cover it.
        num_outputs: K.

    Attributes:
        starts: First voxels of the tiles along z, y and x of the padded grid.
        before: Voxels of padding before the grid, along z, y and x.
        tiles: Indices of the tiles of every row.
    """

    def __init__(self, case: Case, window: SlidingWindow, num_outputs: int) -> None:
        self._shape, self._patch = case.shape, window.patch_size
        self._padded = tuple(max(n, patch) for n, patch in zip(case.shape, window.patch_size, strict=True))
        self.before = tuple((new - old) // 2 for new, old in zip(self._padded, case.shape, strict=True))
        self.starts = window.positions(self._padded)
        self.tiles: list[Tile] = [(y, x) for y in range(len(self.starts[1])) for x in range(len(self.starts[2]))]
        # One copy for each axis: a GPU is waited for at each.
        self._weights = [
            torch.stack(axis_weights(*of_axis, use_gaussian=window.use_gaussian)).to(case.device)
            for of_axis in zip(self._padded, window.patch_size, self.starts, strict=True)
        ]
        self._weights[0] /= len(window.views)
        self._sums = torch.zeros(num_outputs, window.patch_size[0], *self._padded[1:], device=case.device)

    def read_from(self, tile: Tile) -> tuple[int, int, int]:
        """First voxel of a tile in its row of the input, which has no padding along y and x."""
        y, x = tile
        return 0, self.starts[1][y] - self.before[1], self.starts[2][x] - self.before[2]

    def add(self, row: int, tile: Tile, views: Sequence[View], logits: Tensor) -> None:
        """Add the logits of some views of a tile, (V, K, *patch)."""
        (y, x), (_, height, width) = tile, self._patch
        top, left = self.starts[1][y], self.starts[2][x]
        place = self._sums[:, :, top : top + height, left : left + width]
        accumulate_views(logits, views, (self._weights[0][row], self._weights[1][y], self._weights[2][x]), place)

    def finished(self, row: int) -> Tensor:
        """View the planes that no later row adds to, with padding along y and x, but without padding along z."""
        top, before = self.starts[0][row], self.before[0]
        return self._sums[:, max(before - top, 0) : min(before + self._shape[0] - top, self._planes_ended(row))]

    def without_padding(self, planes: Tensor) -> Tensor:
        """View (K, planes, Y, X) without padding along y and x."""
        (_, top, left), (_, height, width) = self.before, self._shape
        return planes[:, :, top : top + height, left : left + width]

    def leave(self, row: int) -> None:
        """Make room for the next row."""
        shift_planes(self._sums, self._planes_ended(row))

    def _planes_ended(self, row: int) -> int:
        next_top = self.starts[0][row + 1] if row + 1 < len(self.starts[0]) else self._padded[0]
        return next_top - self.starts[0][row]


def shift_planes(buffer: Tensor, planes: int) -> None:
    """Drop the first planes of (C, Z, Y, X), move the others up and clear the rest."""
    depth = buffer.shape[1]
    for plane in range(0, depth - planes, max(planes, 1)):  # as many at once as do not overlap
        count = min(planes, depth - planes - plane)
        buffer[:, plane : plane + count] = buffer[:, plane + planes : plane + planes + count]
    buffer[:, depth - planes :] = 0


class _RowInputs:
    """The input of each row of tiles in turn, padded along z; planes that rows share are kept."""

    def __init__(self, case: Case, before: int, starts: Sequence[int], depth: int) -> None:
        self._buffer = torch.zeros(case.num_channels, depth, *case.shape[1:], device=case.device)
        # Planes of the padded grid that each row needs and the previous row does not have.
        self._added = [
            (max(start, previous + depth), start + depth)
            for previous, start in zip([-depth, *starts], starts, strict=False)
        ]
        self._before = before
        self._case_planes = case.shape[0]
        ranges = [self._in_case(*added) for added in self._added]
        self._planes = case.planes([(start, stop) for start, stop in ranges if start < stop])
        self._next = iter(self._added)

    def _in_case(self, start: int, stop: int) -> tuple[int, int]:
        return max(start - self._before, 0), min(stop - self._before, self._case_planes)

    def advance(self) -> Tensor:
        """Return the next row's input, (C, depth, Y, X)."""
        start, stop = next(self._next)
        shift_planes(self._buffer, stop - start)
        first, last = self._in_case(start, stop)
        if first < last:
            added = self._buffer[:, -(stop - start) :]
            added[:, first + self._before - start : last + self._before - start] = next(self._planes)
        return self._buffer
