"""Labels as TorchScript: `pipeline.labels` for planes that come one call after another.

It calls the engine's functions for labels and for sums of planes. One thing is separate: the engine keeps waiting
planes in generators, which TorchScript does not support; here they are in the state.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ....kernels.reference import argmax_labels, region_labels, weighted_sum
from ...model.plans import Plan
from .preprocessing import ScanState
from .resampling import grid_shape, inputs_of, resample_planes, resample_rows, step_in_plane, value_range


class LabelState(NamedTuple):
    """The labels of a scan, and the planes of logits that wait for others.

    Attributes:
        labels: (Z, Y, X) on the scan's own grid.
        held: (K, planes, Y, X), the planes that wait.
        held_from: Index of the first of them.
        made: Number of planes of the cropped scan that have labels.
    """

    labels: Tensor
    held: Tensor
    held_from: int
    made: int


class ScriptLabels(nn.Module):
    """Turns finished planes of logits into labels on the scan's own grid (`labels.segment`)."""

    regions: list[int]

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.regions = list(plan.labels.regions_class_order or ())
        self.num_outputs = plan.labels.num_outputs
        self.many = len(plan.labels.foreground) >= 255
        self.transpose_forward = list(plan.transpose_forward)

    def begin(self, scan_shape: list[int], device: torch.device) -> LabelState:
        """Allocate the labels of a scan, (Z, Y, X), and an empty buffer of waiting planes."""
        labels = torch.zeros(scan_shape, dtype=torch.int32 if self.many else torch.uint8, device=device)
        return LabelState(labels, torch.empty(self.num_outputs, 0, 0, 0, device=device), 0, 0)

    def add(self, state: LabelState, scan: ScanState, logits: Tensor) -> LabelState:
        """Turn every plane that is complete into labels.

        Args:
            state: Labels and planes so far.
            scan: Scan of the labels.
            logits: (K, planes, Y, X), the next planes of the network's grid.

        Returns:
            The state to go on with.
        """
        grid = scan.logits_grid
        if grid.clip != "none":  # clipping needs the range of all logits
            held = self._joined(state.held, logits)
            if held.shape[1] == grid_shape(scan.grid)[0]:
                low, high = value_range(held, grid)
                planes = resample_rows(held, grid, 0, grid_shape(grid)[0], 0, low, high)
                for index in range(planes.shape[1]):
                    self._write(state.labels, scan.box, index, planes[:, index])
            return LabelState(state.labels, held, 0, 0)
        step = step_in_plane(logits, grid)
        for start in range(0, logits.shape[1], step):
            state = self._make_planes(state, scan, resample_planes(logits[:, start : start + step], grid))
        return state

    def _joined(self, held: Tensor, planes: Tensor) -> Tensor:
        return planes.clone() if held.shape[1] == 0 else torch.cat([held, planes], dim=1)

    def _make_planes(self, state: LabelState, scan: ScanState, planes: Tensor) -> LabelState:
        """Make the planes of the scan's grid whose inputs have come, and drop inputs that no other plane needs."""
        z = scan.logits_grid.operators[0]
        n_out = z.first.shape[0]
        made, held_from = state.made, state.held_from
        joined = self._joined(state.held, planes)
        held = list(joined.unbind(1))
        held_to = held_from + len(held)
        while made < n_out and inputs_of(z, made, made + 1)[1] <= held_to:
            first, last = inputs_of(z, made, made + 1)
            weights: list[float] = z.weights[made].tolist()
            mixed = weighted_sum(held[first - held_from : last - held_from], weights)
            self._write(state.labels, scan.box, made, mixed)
            made += 1
        needed = min(int(z.first[made]), held_to) if made < n_out else held_to
        return LabelState(state.labels, joined[:, needed - held_from :].clone(), needed, made)

    def _write(self, labels: Tensor, box: list[list[int]], index: int, logits: Tensor) -> None:
        """Write the labels of one plane of the cropped scan, from its logits (K, Y, X), into the scan's labels."""
        order = self.transpose_forward
        target = labels.permute(order[0], order[1], order[2])[box[0][0] + index]
        target = target[box[1][0] : box[1][1], box[2][0] : box[2][1]]
        target.copy_(region_labels(logits, self.regions) if len(self.regions) > 0 else argmax_labels(logits))
