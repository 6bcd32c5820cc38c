"""The path from a scan to its labels as TorchScript, for C++ and for programs that have only torch.

`ScanPath` is `Engine.predict` without the network, in the part of Python that torch.jit.script compiles. It computes
with the engine's own functions. One thing is separate: the caller runs the loop over tiles, so the state between two
tiles is a dictionary of tensors, which C++ can hold too.
"""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ....kernels.reference import accumulate_views, gather_tiles
from ...errors import ModelError
from ...model.heads import focus_of_channels
from ...model.mirroring import mirror_views
from ...model.plans import Plan
from ...options import AGGREGATIONS
from ...pipeline.tiling import axis_weights, shift_planes
from ...pipeline.voting import mean_vote
from ...pipeline.window import tile_positions
from .labels import ScriptLabels
from .preprocessing import ScriptPreprocessing


class ScanPath(nn.Module):
    """From a scan to the tiles of a network, and from its logits to labels; holds no weights. Compile it: `scan_path`.

    A case is `state = start(...)`; for each tile in ascending order `views`, the network, and `state = add(...)`; then
    `finish(state)`. It computes on the scan's device, and reads the scan's memory until the last tile.

    The state is a dictionary of tensors with these keys; callers read "tiles" alone:

    - of the scan, by `ScriptPreprocessing.begin`: "image", "box", "mask", "normalizations", "low", "high", "shape", and
      the grid maps "grid.*" and "logits_grid.*" (`resampling.store_grid`);
    - of the tiles, by `start`: "tiles", "starts" (along z), "weights.0" to "weights.2", "padded" (shape with padding),
      "before" (padding before the grid), "num_views", "row" (whose input the buffer holds), "done" (tiles added),
      "buffer" (input of a row), "sums" (logits of a row), "votes.logits" and "votes.weights" (`voting.mean_vote`);
    - of the labels, by `ScriptLabels.begin`: "labels", "held" (planes that wait for others), "held_from" (index of the
      first), "made" (planes of the scan that have labels).

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
    def start(self, image: Tensor, spacing: list[float], tile_step_size: float, mirror: bool) -> dict[str, Tensor]:
        """Prepare a case.

        Args:
            image: (C, Z, Y, X) raw values of any real type, on the device to compute on.
            spacing: mm, (z, y, x).
            tile_step_size: Distance of tiles as a fraction of the patch, in (0, 1].
            mirror: Whether to average over mirrored views.

        Returns:
            The state of the case. "tiles" has the first voxel of each tile in the padded grid, (tiles, 3) int64.
        """
        if not 0 < tile_step_size <= 1:
            raise ValueError(f"tile_step_size must be in (0, 1], got {tile_step_size}")
        state = self.preprocessing.begin(image, spacing)
        self.labels.begin(state, [image.shape[1], image.shape[2], image.shape[3]], image.device)
        self._cover(state, tile_step_size, len(self.flips) if mirror else 1)
        return state

    @torch.jit.export
    def views(self, state: dict[str, Tensor], tile: int) -> Tensor:
        """Make the network's input for a tile: (V, C, *patch) float32, itself first, then its mirror images."""
        row, _, _ = self._place(state, tile)
        self._advance(state, row)
        buffer, flips, size = state["buffer"], self._flips(state), self.patch_size
        before: list[int] = state["before"].tolist()
        corner = [0, int(state["tiles"][tile, 1]) - before[1], int(state["tiles"][tile, 2]) - before[2]]
        views = torch.empty(len(flips), self.channels, size[0], size[1], size[2], device=buffer.device)
        gather_tiles(buffer, corner, size, flips, views)
        return views[:, :, 0] if self.slicewise else views

    @torch.jit.export
    def add(
        self, state: dict[str, Tensor], tile: int, seg_logits: Tensor, class_logits: Tensor | None
    ) -> dict[str, Tensor]:
        """Add the network's output for a tile; finished planes become labels.

        Args:
            state: Of the case.
            tile: Its index; one after the other, from 0.
            seg_logits: (V, K, *patch) for all views of the tile.
            class_logits: (V, S) for models with a classification head.

        Returns:
            The state to go on with.
        """
        row, y, x = self._place(state, tile)
        if tile != int(state["done"]):
            raise ValueError(f"tiles must be added in ascending order, expected {int(state['done'])}, got {tile}")
        logits = self._checked_logits(state, seg_logits)
        if len(self.class_names) > 0:
            self._vote(state, tile, logits, class_logits)
        weights = (state["weights.0"][row], state["weights.1"][y], state["weights.2"][x])
        accumulate_views(logits, self._flips(state), weights, self._at(state, tile, state["sums"]))
        state["done"].fill_(tile + 1)
        if y + 1 == state["weights.1"].shape[0] and x + 1 == state["weights.2"].shape[0]:
            self._finish_row(state, row)
        return state

    @torch.jit.export
    def finish(self, state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Answer for the case.

        Returns:
            Labels (Z, Y, X) on the scan's grid and device, uint8, or int32 for models of 255 foreground labels and
            more; and class probabilities (S,) float32 on the CPU, S = 0 for models without a classification head.
        """
        tiles, done = state["tiles"].shape[0], int(state["done"])
        if done != tiles:
            raise ValueError(f"all {tiles} tiles must be added before the case is finished, got {done}")
        if len(self.class_names) == 0:
            return state["labels"], torch.empty(0)
        mean = mean_vote(state["votes.logits"], state["votes.weights"])
        if not bool(torch.isfinite(mean).all()):
            raise ValueError("the network's class logits must be finite, got NaN or infinity: its weights are damaged")
        return state["labels"], torch.softmax(mean, 0).float()

    def _cover(self, state: dict[str, Tensor], tile_step_size: float, num_views: int) -> None:
        """Cover the grid with tiles, and allocate their sums."""
        device = state["image"].device
        patch = self.patch_size
        shape: list[int] = state["shape"].tolist()
        padded = [max(shape[axis], patch[axis]) for axis in range(3)]
        state["padded"] = torch.tensor(padded)
        state["before"] = torch.tensor([(padded[axis] - shape[axis]) // 2 for axis in range(3)])
        starts: list[Tensor] = []
        for axis in range(3):
            # The patch of a 2d configuration is one plane deep: each plane is a row of tiles.
            step = 1.0 if self.slicewise and axis == 0 else tile_step_size
            positions = tile_positions(padded[axis], patch[axis], step)
            starts.append(torch.tensor(positions))
            state[f"weights.{axis}"] = torch.stack(axis_weights(padded[axis], patch[axis], positions)).to(device)
        state["weights.0"].div_(num_views)
        state["tiles"] = torch.cartesian_prod(starts[0], starts[1], starts[2])
        state["starts"] = starts[0]
        state["num_views"], state["row"], state["done"] = torch.tensor(num_views), torch.tensor(-1), torch.tensor(0)
        state["buffer"] = torch.zeros(self.channels, patch[0], shape[1], shape[2], device=device)
        state["sums"] = torch.zeros(self.num_outputs, patch[0], padded[1], padded[2], device=device)
        tiles = state["tiles"].shape[0]
        state["votes.logits"] = torch.zeros(tiles, num_views, len(self.class_names), device=device)
        state["votes.weights"] = torch.ones(tiles, num_views, device=device)

    def _flips(self, state: dict[str, Tensor]) -> list[list[int]]:
        return self.flips[: int(state["num_views"])]

    def _place(self, state: dict[str, Tensor], tile: int) -> tuple[int, int, int]:
        """Index of a tile along z, y and x."""
        if not 0 <= tile < state["tiles"].shape[0]:
            raise ValueError(f"tile must be from 0 to {state['tiles'].shape[0] - 1}, got {tile}")
        along_y, along_x = state["weights.1"].shape[0], state["weights.2"].shape[0]
        return tile // (along_y * along_x), tile // along_x % along_y, tile % along_x

    def _at(self, state: dict[str, Tensor], tile: int, row: Tensor) -> Tensor:
        """View a tile in a buffer of its row, (C, depth, Y, X)."""
        y, x = int(state["tiles"][tile, 1]), int(state["tiles"][tile, 2])
        return row[:, :, y : y + self.patch_size[1], x : x + self.patch_size[2]]

    def _advance(self, state: dict[str, Tensor], row: int) -> None:
        """Make the buffer hold the input of a row of tiles, padded along z; planes that rows share are kept."""
        held = int(state["row"])
        if held == row:
            return
        depth, top, before = self.patch_size[0], int(state["starts"][row]), int(state["before"][0])
        kept = max(int(state["starts"][held]) + depth - top, 0) if 0 <= held < row else 0
        buffer = state["buffer"]
        shift_planes(buffer, depth - kept)
        first, last = max(top + kept - before, 0), min(top + depth - before, int(state["shape"][0]))
        if first < last:
            buffer[:, first + before - top : last + before - top] = self.preprocessing.planes(state, first, last)
        state["row"].fill_(row)

    def _checked_logits(self, state: dict[str, Tensor], seg_logits: Tensor) -> Tensor:
        """Give the logits of a tile's views as (V, K, z, y, x) float32 on the scan's device."""
        logits = seg_logits.unsqueeze(2) if self.slicewise else seg_logits
        views, patch = int(state["num_views"]), self.patch_size
        expected = [views, self.num_outputs, patch[0], patch[1], patch[2]]
        if list(logits.shape) != expected:
            raise ValueError(f"seg_logits must be of shape {expected}, (V, K, *patch), got {list(logits.shape)}")
        return logits.detach().to(state["sums"].device, torch.float32)

    def _vote(self, state: dict[str, Tensor], tile: int, logits: Tensor, class_logits: Tensor | None) -> None:
        """Store a tile's class logits and weights (`voting.Votes`)."""
        expected = [logits.shape[0], len(self.class_names)]
        if class_logits is None or list(class_logits.shape) != expected:
            got = "none" if class_logits is None else f"{list(class_logits.shape)}"
            raise ValueError(f"class_logits must be of shape {expected}, (V, S), got {got}")
        state["votes.logits"][tile] = class_logits.detach().to(torch.float32)
        if not self.by_foreground:
            return
        for view in range(logits.shape[0]):
            # View by view, because the softmax of many labels needs much memory.
            shown = focus_of_channels(logits[view : view + 1], self.focus_channels, self.has_regions)
            state["votes.weights"][tile, view] = shown.mean()

    def _finish_row(self, state: dict[str, Tensor], row: int) -> None:
        """Pass on the planes that no later row of tiles adds to (`sliding_window.predict_logits`)."""
        starts, sums = state["starts"], state["sums"]
        before: list[int] = state["before"].tolist()
        shape: list[int] = state["shape"].tolist()
        top = int(starts[row])
        bottom = int(starts[row + 1]) if row + 1 < starts.shape[0] else int(state["padded"][0])
        # The planes of this row that lie in the grid and not in its padding.
        first, last = max(before[0] - top, 0), min(before[0] + shape[0], bottom) - top
        if first < last:
            logits = sums[:, first:last]
            if not bool(torch.isfinite(torch.stack(torch.aminmax(logits))).all()):
                raise ValueError(
                    "the network's logits must be finite, got NaN or infinity: its weights are damaged, or the "
                    "precision is too low for this model"
                )
            y, x = before[1], before[2]
            self.labels.add(state, logits[:, :, y : y + shape[1], x : x + shape[2]])
        shift_planes(sums, bottom - top)


def compiled(module: nn.Module) -> torch.jit.ScriptModule:
    """Compile a module to TorchScript, for inference."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that torch.jit is deprecated
        return torch.jit.script(module.eval())


def scan_path(plan: Plan, mirror_axes: Sequence[int], aggregation: str = "foreground") -> torch.jit.ScriptModule:
    """Compile the path of a plan without its network; arguments and errors as in `ScanPath.of_plan`."""
    return compiled(ScanPath.of_plan(plan, mirror_axes, aggregation))
