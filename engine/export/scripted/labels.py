"""Labels as TorchScript: `pipeline.labels` for planes that come one call after another.

It calls the engine's functions for labels and for sums of planes. One thing is separate: the engine keeps waiting
planes in generators, which TorchScript does not support; here they are in the state.
"""

import torch
from torch import Tensor, nn

from ....kernels.reference import argmax_labels, region_labels, weighted_sum
from ...model.plans import Plan
from .resampling import ScriptGrid, inputs_of, resample_planes, resample_rows, step_in_plane, stored_grid, value_range


class ScriptLabels(nn.Module):
    """Turns finished planes of logits into labels on the scan's own grid (`labels.segment`)."""

    regions: list[int]

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.regions = list(plan.labels.regions_class_order or ())
        self.num_outputs = plan.labels.num_outputs
        self.many = len(plan.labels.foreground) >= 255
        self.transpose_forward = list(plan.transpose_forward)

    def begin(self, state: dict[str, Tensor], scan_shape: list[int], device: torch.device) -> None:
        """Allocate the labels of a scan, (Z, Y, X), and an empty buffer of waiting planes."""
        state["labels"] = torch.zeros(scan_shape, dtype=torch.int32 if self.many else torch.uint8, device=device)
        state["held"] = torch.empty(self.num_outputs, 0, 0, 0, device=device)
        state["held_from"], state["made"] = torch.tensor(0), torch.tensor(0)

    def add(self, state: dict[str, Tensor], logits: Tensor) -> None:
        """Turn every plane that is complete into labels.

        Args:
            state: State of the case.
            logits: (K, planes, Y, X), the next planes of the network's grid.
        """
        grid = stored_grid(state, "logits_grid")
        if grid.clip != "none":  # clipping needs the range of all logits
            self._hold(state, logits)
            if state["held"].shape[1] == int(state["shape"][0]):
                low, high = value_range(state["held"], grid)
                planes = resample_rows(state["held"], grid, 0, grid.operators[0].first.shape[0], 0, low, high)
                for index in range(planes.shape[1]):
                    self._write(state, index, planes[:, index])
            return
        step = step_in_plane(logits, grid)
        for start in range(0, logits.shape[1], step):
            self._hold(state, resample_planes(logits[:, start : start + step], grid))
            self._make_planes(state, grid)

    def _hold(self, state: dict[str, Tensor], planes: Tensor) -> None:
        held = state["held"]
        state["held"] = planes.clone() if held.shape[1] == 0 else torch.cat([held, planes], dim=1)

    def _make_planes(self, state: dict[str, Tensor], grid: ScriptGrid) -> None:
        """Make the planes of the scan's grid whose inputs are all held, and drop inputs that no other plane needs."""
        z = grid.operators[0]
        n_out = z.first.shape[0]
        made, held_from = int(state["made"]), int(state["held_from"])
        held = list(state["held"].unbind(1))
        held_to = held_from + len(held)
        while made < n_out and inputs_of(z, made, made + 1)[1] <= held_to:
            first, last = inputs_of(z, made, made + 1)
            weights: list[float] = z.weights[made].tolist()
            self._write(state, made, weighted_sum(held[first - held_from : last - held_from], weights))
            made += 1
        needed = min(int(z.first[made]), held_to) if made < n_out else held_to
        state["held"] = state["held"][:, needed - held_from :].clone()
        state["held_from"], state["made"] = torch.tensor(needed), torch.tensor(made)

    def _write(self, state: dict[str, Tensor], index: int, logits: Tensor) -> None:
        """Write the labels of one plane of the cropped scan, from its logits (K, Y, X), into the scan's labels."""
        order = self.transpose_forward
        box = state["box"]
        target = state["labels"].permute(order[0], order[1], order[2])[int(box[0, 0]) + index]
        target = target[int(box[1, 0]) : int(box[1, 1]), int(box[2, 0]) : int(box[2, 1])]
        target.copy_(region_labels(logits, self.regions) if len(self.regions) > 0 else argmax_labels(logits))
