"""Labels as TorchScript: what `labels` does, in the part of Python that torch.jit.script compiles."""

import torch
from torch import Tensor, nn

from ...model.plans import Plan
from .resampling import ScriptGrid, planes_at_once, resample_planes, resample_rows, stored_grid, value_range


class ScriptLabels(nn.Module):
    """Finished planes of logits become labels on the scan's own grid (`labels.segment`)."""

    regions: list[int]

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.regions = list(plan.labels.regions_class_order or ())
        self.num_outputs = plan.labels.num_outputs
        self.many = len(plan.labels.foreground) >= 255
        self.transpose_forward = list(plan.transpose_forward)

    def begin(self, state: dict[str, Tensor], scan_shape: list[int], device: torch.device) -> None:
        """Make room for the labels of a scan, (Z, Y, X), and for the planes that wait for others."""
        state["labels"] = torch.zeros(scan_shape, dtype=torch.int32 if self.many else torch.uint8, device=device)
        state["held"] = torch.empty(self.num_outputs, 0, 0, 0, device=device)
        state["held_from"], state["made"] = torch.tensor(0), torch.tensor(0)

    def add(self, state: dict[str, Tensor], logits: Tensor) -> None:
        """Turn every plane that is complete into labels.

        Args:
            state: Of the case.
            logits: (K, planes, Y, X), the next planes of the network's grid.
        """
        grid = stored_grid(state, "logits_grid")
        if grid.clip != "none":  # it takes the range of all logits to clip
            self._hold(state, logits)
            if state["held"].shape[1] == state["grid.0.reads"].shape[0]:
                low, high = value_range(state["held"], grid)
                planes = resample_rows(state["held"], grid, 0, grid.operators[0].reads.shape[0], 0, low, high)
                for index in range(planes.shape[1]):
                    self._write(state, index, planes[:, index])
            return
        step = planes_at_once(logits, grid)
        for start in range(0, logits.shape[1], step):
            self._hold(state, resample_planes(logits[:, start : start + step], grid))
            self._make_planes(state, grid)

    def _hold(self, state: dict[str, Tensor], planes: Tensor) -> None:
        held = state["held"]
        state["held"] = planes.clone() if held.shape[1] == 0 else torch.cat([held, planes], dim=1)

    def _make_planes(self, state: dict[str, Tensor], grid: ScriptGrid) -> None:
        """Make the planes of the scan's grid whose inputs are all held, and let go of what no other needs."""
        reads = grid.operators[0].reads
        made, held_from = int(state["made"]), int(state["held_from"])
        held_to = held_from + state["held"].shape[1]
        while made < reads.shape[0] and int(reads[made, 1]) <= held_to:
            self._write(state, made, self._combined(state, grid, made))
            made += 1
        needed = min(int(reads[made, 0]), held_to) if made < reads.shape[0] else held_to
        state["held"] = state["held"][:, needed - held_from :].clone()
        state["held_from"], state["made"] = torch.tensor(needed), torch.tensor(made)

    def _combined(self, state: dict[str, Tensor], grid: ScriptGrid, plane: int) -> Tensor:
        """Weighted sum of the held planes that a plane of the scan's grid is made of, (K, Y, X)."""
        z = grid.operators[0]
        first, last = int(z.reads[plane, 0]), int(z.reads[plane, 1])
        held = state["held"][:, first - int(state["held_from"]) :]
        if z.matrix.numel() == 0:
            return held[:, 0]
        weights: list[float] = z.matrix[plane, first:last].cpu().tolist()
        result = held[:, 0] * weights[0]
        for index in range(1, len(weights)):
            result.add_(held[:, index], alpha=weights[index])
        return result

    def _write(self, state: dict[str, Tensor], index: int, logits: Tensor) -> None:
        """Write the labels of a plane of the cropped scan, (K, Y, X) logits, to where it lies in the scan."""
        order = self.transpose_forward
        box = state["box"]
        target = state["labels"].permute(order[0], order[1], order[2])[int(box[0, 0]) + index]
        target = target[int(box[1, 0]) : int(box[1, 1]), int(box[2, 0]) : int(box[2, 1])]
        target.copy_(self._painted(logits) if len(self.regions) > 0 else self._greatest(logits))

    def _painted(self, logits: Tensor) -> Tensor:
        """Paint regions over each other (`kernels.region_labels`)."""
        labels = torch.zeros(logits.shape[1:], dtype=torch.int32, device=logits.device)
        for region, value in enumerate(self.regions):
            labels = torch.where(logits[region] > 0, value, labels)
        return labels

    def _greatest(self, logits: Tensor) -> Tensor:
        """Index of the greatest logit (`kernels.argmax_labels`)."""
        dtype = torch.int32 if self.many else torch.uint8
        labels = torch.zeros(logits.shape[1:], dtype=dtype, device=logits.device)
        best = logits[0]
        for label in range(1, logits.shape[0]):
            # A later label wins over all earlier ones, and is the greater number: the maximum is the label.
            labels = torch.maximum(labels, (logits[label] > best).to(dtype).mul_(label))
            best = torch.maximum(best, logits[label])
        return labels
