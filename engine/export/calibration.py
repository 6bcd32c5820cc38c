"""Takes the tiles with which networks are calibrated from scans."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..engine import Engine
from ..model.folder import Model
from ..model.runner import NetworkOutput
from ..pipeline.steps import Image
from ..pipeline.window import SlidingWindow

CALIBRATION_TILES = 24


def calibration_tiles(model: Model, scans: Sequence[Image], device: torch.device) -> Tensor:
    """Take tiles of preprocessed scans, (N, C, *patch), spread over all of them.

    Raises:
        VolumeError: Where a scan cannot be read, or does not fit the model.
    """
    recorder = _TileRecorder(model)
    window = SlidingWindow.of_plan(model.plan)
    engine = Engine(model, recorder, window=window, sums_device=device)
    for scan in scans:
        engine.predict(scan)
    return torch.cat(recorder.tiles[:: -(-len(recorder.tiles) // CALIBRATION_TILES)]).to(device)


class _TileRecorder:
    """Takes the place of a network and keeps some of its input tiles: first all, later fewer and fewer."""

    def __init__(self, model: Model) -> None:
        self.tiles: list[Tensor] = []
        self._plan = model.plan
        self._seen, self._stride = 0, 1

    def __call__(self, tiles: Tensor) -> NetworkOutput:
        if self._seen % self._stride == 0:
            self.tiles.append(tiles.clone())
        if len(self.tiles) > 2 * CALIBRATION_TILES:
            self.tiles, self._stride = self.tiles[::2], 2 * self._stride
        self._seen += 1
        scheme = self._plan.classification
        return NetworkOutput(
            tiles.new_zeros(len(tiles), self._plan.labels.num_outputs, *tiles.shape[2:]),
            None if scheme is None else tiles.new_zeros(len(tiles), scheme.num_classes),
        )
