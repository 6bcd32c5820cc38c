"""Tiles go through the network: some mirror views of one, or all views of several."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ...kernels import gather_tiles
from ..errors import PredictionError
from ..model.mirroring import View
from ..model.runner import Runner
from .steps import is_out_of_memory
from .timing import Timings
from .voting import Votes
from .window import SlidingWindow

_Tile = TypeVar("_Tile")


def tile_groups(tiles: Sequence[_Tile], most: int) -> Iterator[Sequence[_Tile]]:
    """Cut a row of tiles into groups of `most`, and the rest into halves of that, quarters and so on.

    A GPU's libraries choose algorithms for each batch size that they meet, which takes seconds: there are few.
    """
    first, size = 0, most
    while first < len(tiles):
        while size > len(tiles) - first:
            size = max(1, size // 2)
        yield tiles[first : first + size]
        first += size


class TileNetwork:
    """Runs the network on all views of tiles.

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

    def __call__(self, volume: Tensor, starts: Sequence[Sequence[int]]) -> Iterator[tuple[int, Sequence[View], Tensor]]:
        """Run the tiles that begin at these voxels of (C, Z, Y, X), at most `views_per_call` views at a time.

        Yields:
            Which of the tiles, views of it, and their logits (V, K, *patch).
        """
        size, window = self._window.patch_size, self._window
        for first in range(0, len(window.views), window.views_per_call):
            views = window.views[first : first + window.views_per_call]
            shape = (len(starts), len(views), len(volume), *size)
            with self._timings("stitch"):
                batch = torch.empty(shape, dtype=window.tiles_dtype, device=self._device)
                for start, of_tile in zip(starts, batch, strict=True):
                    gather_tiles(volume, start, size, views, of_tile)
            with self._timings("network"):
                tiles = batch.flatten(0, 1)
                logits = self._run(tiles[:, :, 0] if window.slicewise else tiles)
            for place in range(len(starts)):
                yield place, views, logits.unflatten(0, (len(starts), len(views)))[place]
            del logits  # so that the next ones find room

    def _run(self, tiles: Tensor) -> Tensor:
        size = self._window.patch_size
        try:
            output = self._runner(tiles)
            logits = output.seg_logits.to(self._device).reshape(len(tiles), self._num_outputs, *size)
            if self._votes is not None:
                self._votes.add(output)
            return logits
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise  # the caller tries again with less memory, or says that there is not enough
            reason = str(error).strip().partition("\n")[0]
            raise PredictionError(f"the network failed on a tile of {size} voxels: {reason:.200}") from error
