"""Covers the network's grid with tiles, and adds their mirrored, Gaussian-weighted logits row by row.

Tiles run in z order. When the next row of tiles starts below a plane, that plane's logits are final, and it is passed
on and dropped. So memory holds one row of tiles, independent of the length of the scan.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels import accumulate_views, gather_tiles
from ..errors import PredictionError
from ..model.mirroring import View
from ..model.plans import Plan
from ..model.runner import Runner
from .preprocessing import Case
from .timing import Timings
from .voting import Votes


@dataclass(frozen=True, slots=True, kw_only=True)
class SlidingWindow:
    """The tiles that cover a grid.

    Args:
        patch_size: (z, y, x) voxels of a tile.
        tile_step_size: Distance of neighbouring tiles as a fraction of the patch, in (0, 1].
        views: Mirror views of each tile, the unflipped one first.
        views_per_call: Views that go through the network at once.
        slicewise: Whether every plane is a row of tiles and the network takes (N, C, y, x), as in 2d configurations.
        use_gaussian: Whether voxels in the middle of a tile count more, as in nnU-Net; else all count alike.
    """

    patch_size: tuple[int, int, int]
    tile_step_size: float
    views: tuple[View, ...]
    views_per_call: int
    slicewise: bool = False
    use_gaussian: bool = True

    def __post_init__(self) -> None:
        """Check the step."""
        if not 0 < self.tile_step_size <= 1:
            raise ValueError(f"tile_step_size must be in (0, 1], got {self.tile_step_size}")

    @classmethod
    def of_plan(
        cls,
        plan: Plan,
        *,
        tile_step_size: float = 0.5,
        views: tuple[View, ...] = ((),),
        views_per_call: int = 1,
        use_gaussian: bool = True,
    ) -> SlidingWindow:
        """Cover a grid with tiles of the plan's patch size, by default without mirroring."""
        return cls(
            patch_size=plan.patch_size_3d,
            tile_step_size=tile_step_size,
            views=views,
            views_per_call=views_per_call,
            slicewise=len(plan.patch_size) == 2,
            use_gaussian=use_gaussian,
        )

    def positions(self, shape: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
        """First voxel of every tile along z, y, x of a grid at least as large as the patch."""
        z, y, x = (
            tile_positions(n, patch, self.tile_step_size) for n, patch in zip(shape, self.patch_size, strict=True)
        )
        return (list(range(shape[0])) if self.slicewise else z), y, x


def tile_positions(length: int, patch: int, step: float) -> list[int]:
    """First voxels of the tiles along one axis, spread evenly (nnU-Net: compute_steps_for_sliding_window)."""
    count = math.ceil((length - patch) / (patch * step)) + 1
    if count == 1:
        return [0]
    actual_step = (length - patch) / (count - 1)
    return [int(round(actual_step * i)) for i in range(count)]  # noqa: RUF046  # TorchScript's round gives a float


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
    network = _TileNetwork(runner, window, num_outputs, case.device, timings, votes)
    done, all_finite = 0, torch.ones((), dtype=torch.bool)
    for row in range(len(sums.starts[0])):
        with timings("preprocess"):
            volume = rows.advance()
        for tile in sums.tiles:
            for views, logits in network(volume, sums.read_from(tile)):
                with timings("stitch"):
                    sums.add(row, tile, views, logits)
            done += 1
            if progress is not None:
                progress(done, len(sums.starts[0]) * len(sums.tiles))
        with timings("stitch"):
            finished = sums.finished(row)
            # This checks the previous row, so that a GPU has work while the answer is fetched.
            _require(all_finite)
            all_finite = _finite(finished)
        if finished.shape[1]:
            yield sums.without_padding(finished)
        with timings("stitch"):
            sums.leave(row)
    _require(all_finite)


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
        self._weights = [
            [weight.to(case.device) for weight in axis_weights(*of_axis, use_gaussian=window.use_gaussian)]
            for of_axis in zip(self._padded, window.patch_size, self.starts, strict=True)
        ]
        self._weights[0] = [weight / len(window.views) for weight in self._weights[0]]
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


class _TileNetwork:
    """Runs the network on all views of a tile.

    Args:
        runner: The network.
        window: Size and views of tiles.
        num_outputs: K.
        device: Device of the tiles and of the returned logits.
        timings: Gets the times of "network" and "stitch".
        votes: Gets the class logits from a multi-task network.
    """

    def __init__(
        self,
        runner: Runner,
        window: SlidingWindow,
        num_outputs: int,
        device: torch.device,
        timings: Timings,
        votes: Votes | None,
    ) -> None:
        self._runner, self._window, self._num_outputs = runner, window, num_outputs
        self._device, self._timings, self._votes = device, timings, votes

    def __call__(self, volume: Tensor, start: tuple[int, int, int]) -> Iterator[tuple[Sequence[View], Tensor]]:
        """Run the tile that begins at a voxel of (C, Z, Y, X), some views at a time.

        Yields:
            Views, and their logits (V, K, *patch).
        """
        size, window = self._window.patch_size, self._window
        for first in range(0, len(window.views), window.views_per_call):
            views = window.views[first : first + window.views_per_call]
            with self._timings("stitch"):
                batch = torch.empty(len(views), len(volume), *size, device=self._device)
                gather_tiles(volume, start, size, views, batch)
            with self._timings("network"):
                logits = self._run(batch[:, :, 0] if window.slicewise else batch)
            yield views, logits

    def _run(self, tiles: Tensor) -> Tensor:
        size = self._window.patch_size
        try:
            output = self._runner(tiles)
            logits = output.seg_logits.to(self._device).reshape(len(tiles), self._num_outputs, *size)
            if self._votes is not None:
                self._votes.add(output)
            return logits
        except torch.OutOfMemoryError:
            raise  # the caller tries again with less memory
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0]
            raise PredictionError(f"the network failed on a tile of {size} voxels: {reason:.200}") from error


def _finite(logits: Tensor) -> Tensor:
    """Whether all logits are finite, as a tensor on their device; least and greatest value show it without a mask."""
    if logits.numel() == 0:
        return torch.ones((), dtype=torch.bool)
    return torch.isfinite(torch.stack(torch.aminmax(logits))).all()


def _require(all_finite: Tensor) -> None:
    """Refuse logits that are not finite."""
    if not all_finite:
        raise PredictionError(
            "the network's logits must be finite, got NaN or infinity: its weights are damaged, or the "
            "precision is too low for this model; try --precision fp32"
        )


def shift_planes(buffer: Tensor, planes: int) -> None:
    """Drop the first planes of (C, Z, Y, X), move the others up and clear the rest."""
    depth = buffer.shape[1]
    for plane in range(depth - planes):
        buffer[:, plane] = buffer[:, plane + planes]
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
