"""The path from a scan to its labels as TorchScript, for C++ and for programs that have only torch.

`ScanPath` is `Engine.predict` without the network, in the part of Python that torch.jit.script compiles. It calls the
engine's own functions for grids, operators, statistics, normalisation, tiles and their weights, votes and labels.
The top of each module says what is separate. In this one it is the loop over tiles, which the caller runs: what the
engine keeps in local variables is a state here, a named tuple that Python and C++ can hold too.
"""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ....kernels.reference import accumulate_views, gather_tiles
from ...errors import ModelError
from ...model.heads import focus_of_channels
from ...model.mirroring import mirror_views
from ...model.plans import Plan
from ...options import AGGREGATIONS
from ...pipeline.finiteness import all_finite, not_finite
from ...pipeline.tiling import (
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
from ...pipeline.voting import mean_vote
from .labels import LabelState, ScriptLabels
from .preprocessing import ScanState, ScriptPreprocessing
from .resampling import grid_shape


class WindowState(NamedTuple):
    """The sliding window between two tiles; tensors change in place, because `ScanPath.views` returns no state.

    Attributes:
        tiling: Tiles of the network's grid.
        num_views: Number of views of each tile.
        row: () int64, index of the row of tiles whose input is at hand, or -1.
        done: () int64, number of tiles that have been added.
        inputs: (C, depth, Y, X), the row's input, padded along z.
        sums: (K, depth, Y, X), sums of the logits of a row of tiles, with padding.
        vote_logits: (tiles, views, S), class logits (`voting.mean_vote`).
        vote_weights: (tiles, views), their weights.
    """

    tiling: Tiling
    num_views: int
    row: Tensor
    done: Tensor
    inputs: Tensor
    sums: Tensor
    vote_logits: Tensor
    vote_weights: Tensor


class CaseState(NamedTuple):
    """A case between two tiles. Programs read `tiles` alone.

    Attributes:
        tiles: (tiles, 3) int64, the first voxel of each tile in the padded grid.
        scan: The scan, and its maps to the network's grid and back.
        window: The sliding window.
        labels: Labels so far.
    """

    tiles: Tensor
    scan: ScanState
    window: WindowState
    labels: LabelState


class ScanPath(nn.Module):
    """From a scan to the tiles of a network, and from its logits to labels; holds no weights. Compile it: `scan_path`.

    A case is `state = start(...)`; for each tile in ascending order `views`, the network, and `state = add(...)`; then
    `finish(state)`. It computes on the scan's device, and reads the scan's memory until the last tile.

    Attributes:
        channels: Of the scan.
        class_names: Classes of a case; empty without a classification head.
        label_names: By value; empty for models of regions.
    """

    class_names: list[str]
    label_names: list[str]
    flips: list[list[int]]

    def __init__(self, plan: Plan, mirror_axes: Sequence[int], aggregation: str = "foreground") -> None:
        super().__init__()
        labels, scheme = plan.labels, plan.classification
        dimensions = len(plan.patch_size)
        self.channels = len(plan.channels)
        self.class_names = list(scheme.class_names) if scheme else []
        self.has_regions = labels.regions_class_order is not None
        self.label_names = [] if self.has_regions else sorted(labels.labels, key=lambda name: labels.labels[name])
        self.num_outputs = labels.num_outputs
        self.focus_channels = list(scheme.focus_channels) if scheme else [0]
        self.by_foreground = aggregation == "foreground"
        self.patch_size = list(plan.patch_size_3d)
        self.slicewise = dimensions == 2
        self.flips = [list(axes) for axes in mirror_views(mirror_axes, dimensions)]
        self.preprocessing = ScriptPreprocessing(plan)
        self.labels = ScriptLabels(plan)

    @classmethod
    def of_plan(cls, plan: Plan, mirror_axes: Sequence[int], aggregation: str = "foreground") -> "ScanPath":
        """Make the path of a plan.

        Args:
            plan: The model's plan.
            mirror_axes: Axes of the patch that the model was trained to be mirrored along.
            aggregation: How the class logits of tiles are averaged, as in `EngineOptions`: "foreground" or "mean".

        Raises:
            ModelError: For a plan that needs more than a scan and its spacing.
            ValueError: For an unknown aggregation.
        """
        if aggregation not in AGGREGATIONS:
            raise ValueError(f"aggregation must be one of {', '.join(AGGREGATIONS)}, got {aggregation!r}")
        if plan.previous_stage is not None:
            raise ModelError(
                f"a whole path takes a scan alone; this configuration continues from the labels of "
                f"{plan.previous_stage}: use nnturbo predict, or a model that is no cascade"
            )
        if plan.reorient:
            raise ModelError(
                "a whole path takes a scan without its orientation; this model was trained on reoriented scans: "
                "use nnturbo predict"
            )
        return cls(plan, mirror_axes, aggregation)

    @torch.jit.export
    def start(self, image: Tensor, spacing: list[float], tile_step_size: float, mirror: bool) -> CaseState:
        """Prepare a case.

        Args:
            image: (C, Z, Y, X) raw values of any real type, on the device to compute on.
            spacing: mm, (z, y, x).
            tile_step_size: Distance of tiles as a fraction of the patch, in (0, 1].
            mirror: Whether to average over mirrored views.

        Returns:
            The state of the case; its `tiles` are as many as the tiles to add.
        """
        if not 0 < tile_step_size <= 1:
            raise ValueError(f"tile_step_size must be in (0, 1], got {tile_step_size}")
        scan = self.preprocessing.begin(image, spacing)
        window = self._window(grid_shape(scan.grid), tile_step_size, len(self.flips) if mirror else 1, image.device)
        z, y, x = window.tiling.starts[0], window.tiling.starts[1], window.tiling.starts[2]
        tiles = torch.cartesian_prod(torch.tensor(z), torch.tensor(y), torch.tensor(x))
        labels = self.labels.begin([image.shape[1], image.shape[2], image.shape[3]], image.device)
        return CaseState(tiles, scan, window, labels)

    @torch.jit.export
    def views(self, state: CaseState, tile: int) -> Tensor:
        """Make the network's input for a tile: (V, C, *patch) float32, itself first, then its mirror images."""
        window, size = state.window, self.patch_size
        row, y, x = self._index(window.tiling, tile)
        self._advance(window, state.scan, row)
        flips = self.flips[: window.num_views]
        views = torch.empty(len(flips), self.channels, size[0], size[1], size[2], device=window.inputs.device)
        gather_tiles(window.inputs, corner_of(window.tiling, y, x), size, flips, views)
        return views[:, :, 0] if self.slicewise else views

    @torch.jit.export
    def add(self, state: CaseState, tile: int, seg_logits: Tensor, class_logits: Tensor | None) -> CaseState:
        """Add the network's output for a tile; finished planes become labels.

        Args:
            state: Of the case.
            tile: Its index; one after the other, from 0.
            seg_logits: (V, K, *patch) for all views of the tile.
            class_logits: (V, S) for models with a classification head.

        Returns:
            The state to go on with.
        """
        window = state.window
        tiling, sums, done = window.tiling, window.sums, int(window.done)
        row, y, x = self._index(tiling, tile)
        if tile != done:
            raise ValueError(f"tiles must be added in ascending order, expected {done}, got {tile}")
        logits = self._checked_logits(window, seg_logits)
        if len(self.class_names) > 0:
            self._vote(window, tile, logits, class_logits)
        flips = self.flips[: window.num_views]
        accumulate_views(logits, flips, weights_of(tiling, row, y, x), place_of(tiling, sums, y, x))
        window.done.fill_(tile + 1)
        if y + 1 < len(tiling.starts[1]) or x + 1 < len(tiling.starts[2]):
            return state
        return CaseState(state.tiles, state.scan, window, self._finish_row(state, row))

    @torch.jit.export
    def finish(self, state: CaseState) -> tuple[Tensor, Tensor]:
        """Answer for the case.

        Returns:
            Labels (Z, Y, X) on the scan's grid and device, uint8, or int32 for models of 255 foreground labels and
            more; and class probabilities (S,) float32 on the CPU, S = 0 for models without a classification head.
        """
        tiles, done = state.tiles.shape[0], int(state.window.done)
        if done != tiles:
            raise ValueError(f"all {tiles} tiles must be added before the case is finished, got {done}")
        labels = state.labels.labels
        if len(self.class_names) == 0:
            return labels, torch.empty(0)
        mean = mean_vote(state.window.vote_logits, state.window.vote_weights)
        if not bool(torch.isfinite(mean).all()):
            raise ValueError(not_finite("class logits"))
        return labels, torch.softmax(mean, 0).float()

    def _window(self, shape: list[int], tile_step_size: float, views: int, device: torch.device) -> WindowState:
        """Cover the grid with tiles, and allocate their input, sums and votes."""
        patch = self.patch_size
        tiling = cover(shape, patch, tile_step_size, self.slicewise, True, views, device)
        tiles = len(tiling.starts[0]) * len(tiling.starts[1]) * len(tiling.starts[2])
        return WindowState(
            tiling=tiling,
            num_views=views,
            row=torch.tensor(-1),
            done=torch.tensor(0),
            inputs=torch.zeros(self.channels, patch[0], shape[1], shape[2], device=device),
            sums=torch.zeros(self.num_outputs, patch[0], tiling.padded[1], tiling.padded[2], device=device),
            vote_logits=torch.zeros(tiles, views, len(self.class_names), device=device),
            vote_weights=torch.ones(tiles, views, device=device),
        )

    def _index(self, tiling: Tiling, tile: int) -> tuple[int, int, int]:
        """Index of a tile along z, y and x."""
        rows, along_y, along_x = len(tiling.starts[0]), len(tiling.starts[1]), len(tiling.starts[2])
        if not 0 <= tile < rows * along_y * along_x:
            raise ValueError(f"tile must be from 0 to {rows * along_y * along_x - 1}, got {tile}")
        return tile // (along_y * along_x), tile // along_x % along_y, tile % along_x

    def _advance(self, window: WindowState, scan: ScanState, row: int) -> None:
        """Make the input that of a row of tiles; planes that it shares with the row at hand are kept.

        The engine goes through all rows in order (`sliding_window._RowInputs`); here the caller may ask for any row.
        """
        held = int(window.row)
        if held == row:
            return
        start, stop = added_planes(window.tiling, row, held)
        shift_planes(window.inputs, stop - start)
        first, last = without_padding(window.tiling, start, stop)
        if first < last:
            planes = self.preprocessing.planes(scan, first, last)
            planes_in_row(window.tiling, window.inputs, row, first, last).copy_(planes)
        window.row.fill_(row)

    def _checked_logits(self, window: WindowState, seg_logits: Tensor) -> Tensor:
        """Give the logits of a tile's views as (V, K, z, y, x) float32 on the scan's device."""
        logits = seg_logits.unsqueeze(2) if self.slicewise else seg_logits
        patch = self.patch_size
        expected = [window.num_views, self.num_outputs, patch[0], patch[1], patch[2]]
        if list(logits.shape) != expected:
            raise ValueError(f"seg_logits must be of shape {expected}, (V, K, *patch), got {list(logits.shape)}")
        return logits.detach().to(window.sums.device, torch.float32)

    def _vote(self, window: WindowState, tile: int, logits: Tensor, class_logits: Tensor | None) -> None:
        """Store a tile's class logits and weights (`voting.Votes`)."""
        expected = [logits.shape[0], len(self.class_names)]
        if class_logits is None or list(class_logits.shape) != expected:
            got = "none" if class_logits is None else f"{list(class_logits.shape)}"
            raise ValueError(f"class_logits must be of shape {expected}, (V, S), got {got}")
        window.vote_logits[tile] = class_logits.detach().to(torch.float32)
        if not self.by_foreground:
            return
        for view in range(logits.shape[0]):
            # View by view, because the softmax of many labels needs much memory.
            shown = focus_of_channels(logits[view : view + 1], self.focus_channels, self.has_regions)
            window.vote_weights[tile, view] = shown.mean()

    def _finish_row(self, state: CaseState, row: int) -> LabelState:
        """Pass on the planes that no later row of tiles adds to (`sliding_window.predict_logits`)."""
        tiling, sums, labels = state.window.tiling, state.window.sums, state.labels
        logits = finished_planes(tiling, sums, row)
        if logits.shape[1] > 0:
            if not bool(all_finite(logits)):
                raise ValueError(not_finite("logits"))
            labels = self.labels.add(labels, state.scan, cropped_planes(tiling, logits))
        shift_planes(sums, planes_ended(tiling, row))
        return labels


def compiled(module: nn.Module) -> torch.jit.ScriptModule:
    """Compile a module to TorchScript, for inference."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that torch.jit is deprecated
        return torch.jit.script(module.eval())


def scan_path(plan: Plan, mirror_axes: Sequence[int], aggregation: str = "foreground") -> torch.jit.ScriptModule:
    """Compile the path of a plan without its network; arguments and errors as in `ScanPath.of_plan`."""
    return compiled(ScanPath.of_plan(plan, mirror_axes, aggregation))
