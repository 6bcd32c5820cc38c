"""Covers the network's grid with tiles, and adds their mirrored, Gaussian-weighted logits row by row.

Tiles run in z order. When the next row of tiles starts below a plane, that plane's logits are final, and it is passed
on and dropped. So memory holds one row of tiles, independent of the length of the scan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ...kernels import accumulate_views
from ..model.runner import Runner
from .finiteness import watch_finite
from .preprocessing import Case
from .tile_network import TileNetwork, tile_groups
from .tiling import (
    Tiling,
    added_planes,
    corner_of,
    cover,
    cropped_planes,
    finished_planes,
    place_of,
    planes_ended,
    planes_in_row,
    shift_planes,
    weights_of,
    without_padding,
)
from .timing import Timings
from .voting import Votes
from .window import SlidingWindow


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
    tiling = _tiling(case, window)
    num_rows, along_y, along_x = (len(starts) for starts in tiling.starts)
    tiles = [(y, x) for y in range(along_y) for x in range(along_x)]
    is_alone = num_rows * len(tiles) * len(window.views) == 1
    depth = 0 if is_alone else window.patch_size[0]
    sums = torch.zeros(num_outputs, depth, *tiling.padded[1:], device=case.device)
    inputs = _RowInputs(case, tiling)
    network = TileNetwork(runner, window, num_outputs, case.device, timings, votes)
    done, require_finite = 0, watch_finite(torch.empty(0))
    for row in range(num_rows):
        with timings("preprocess"):
            volume = inputs.advance(row)
        for group in tile_groups(tiles, window.tiles_per_call):
            for place, views, logits in network(volume, [corner_of(tiling, *tile) for tile in group]):
                with timings("stitch"):
                    tile = group[place]
                    if is_alone:  # all its weights are 1
                        sums = logits[0].float().contiguous()
                    else:
                        accumulate_views(logits, views, weights_of(tiling, row, *tile), place_of(tiling, sums, *tile))
                del logits  # so that the next ones find room
            for _ in group:
                done += 1
                if progress is not None:
                    progress(done, num_rows * len(tiles))
        with timings("stitch"):
            finished = finished_planes(tiling, sums, row)
            # Of the row before: a GPU has this one to go on with, and need not wait for the answer.
            require_finite()
            require_finite = watch_finite(finished)
        if finished.shape[1]:
            yield cropped_planes(tiling, finished)
        if row + 1 < num_rows:
            with timings("stitch"):
                shift_planes(sums, planes_ended(tiling, row))
    require_finite()


def _tiling(case: Case, window: SlidingWindow) -> Tiling:
    return cover(
        list(case.shape),
        list(window.patch_size),
        window.tile_step_size,
        window.slicewise,
        window.use_gaussian,
        len(window.views),
        case.device,
    )


class _RowInputs:
    """The input of each row of tiles in turn, padded along z; planes that rows share are kept."""

    def __init__(self, case: Case, tiling: Tiling) -> None:
        self._tiling = tiling
        self._buffer = torch.zeros(case.num_channels, tiling.patch_size[0], *case.shape[1:], device=case.device)
        # Planes of the padded grid that each row needs and the previous row does not have.
        self._added = [added_planes(tiling, row, row - 1) for row in range(len(tiling.starts[0]))]
        ranges = [without_padding(tiling, *added) for added in self._added]
        self._planes = case.planes([(first, last) for first, last in ranges if first < last])

    def advance(self, row: int) -> Tensor:
        """Return the input of the next row, (C, depth, Y, X)."""
        start, stop = self._added[row]
        shift_planes(self._buffer, stop - start)
        first, last = without_padding(self._tiling, start, stop)
        if first < last:
            planes_in_row(self._tiling, self._buffer, row, first, last).copy_(next(self._planes))
        return self._buffer
