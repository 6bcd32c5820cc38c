"""Preprocessing as TorchScript: `pipeline.preprocessing` for a scan in a tensor.

It calls the engine's functions for the size of the network's grid and for normalisation. Statistics, boxes and masks
are separate, because the engine computes them from numpy arrays of any type, and fills masks with ITK. Here the scan is
a tensor on any device, and only torch is available.
"""

import torch
from torch import Tensor, nn

from ....kernels.reference import normalize
from ...model.plans import Plan
from ...pipeline.normalization import STATISTICS_PLANES, normalization_numbers, normalize_within
from ...pipeline.preprocessing import shape_at_spacing
from .resampling import ScriptResampling, inputs_of, resample_rows, store_grid, stored_grid, value_range


def statistics(image: Tensor, mask: Tensor, masked: bool, planes: int = STATISTICS_PLANES) -> tuple[float, float]:
    """Mean and standard deviation of (Z, Y, X), within a mask if `masked`."""
    count, total, squares = 0, 0.0, 0.0
    for start in range(0, image.shape[0], planes):
        values = image[start : start + planes]
        values = values[mask[start : start + planes]] if masked else values
        count += values.numel()
        total += float(values.sum(dtype=torch.float64))
    mean = total / max(count, 1)
    for start in range(0, image.shape[0], planes):
        values = image[start : start + planes]
        values = values[mask[start : start + planes]] if masked else values
        squares += float((values.to(torch.float32) - mean).square().sum(dtype=torch.float64))
    return mean, (squares / max(count, 1)) ** 0.5


def filled(occupied: Tensor) -> Tensor:
    """Fill the holes of a mask, (Z, Y, X) bool: voxels that are not connected to the border by faces.

    Note:
        `preprocessing.filled_mask` without ITK. Sweeps along the axes extend the outside until it stops growing.
    """
    free = occupied.logical_not()
    outside = torch.zeros_like(free)
    for axis in range(3):
        for side in (0, free.shape[axis] - 1):
            outside.select(axis, side).copy_(free.select(axis, side))
    before = -1
    while before != int(outside.sum()):
        before = int(outside.sum())
        for axis in range(3):
            planes, passable = outside.unbind(axis), free.unbind(axis)
            for index in range(1, len(planes)):
                planes[index].logical_or_(planes[index - 1].logical_and(passable[index]))
            for index in range(len(planes) - 2, -1, -1):
                planes[index].logical_or_(planes[index + 1].logical_and(passable[index]))
    return outside.logical_not()


def occupied_box(occupied: Tensor) -> list[list[int]]:
    """Smallest half-open box around the true voxels of (Z, Y, X); the whole array if there are none."""
    box: list[list[int]] = []
    for axis in range(3):
        places = occupied.movedim(axis, 0).flatten(1).any(1).nonzero()
        if places.shape[0] == 0:
            return [[0, occupied.shape[0]], [0, occupied.shape[1]], [0, occupied.shape[2]]]
        box.append([int(places[0]), int(places[-1]) + 1])
    return box


def computable(image: Tensor) -> Tensor:
    """Convert types with which torch can hardly compute to types that hold the same values."""
    if image.dtype in (torch.bool, torch.uint16):
        return image.to(torch.int32)
    if image.dtype == torch.uint32:
        return image.to(torch.int64)
    if image.dtype == torch.uint64:
        return image.to(torch.float64)
    return image.to(torch.float32) if image.dtype in (torch.float16, torch.bfloat16) else image


class ScriptPreprocessing(nn.Module):
    """From a scan to planes of the network's grid (`preprocessing.Case`)."""

    schemes: list[str]
    masked: list[bool]
    of_plan: list[tuple[float, float, float, float]]

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.slicewise = len(plan.patch_size) == 2
        self.spacing = list(plan.spacing_3d(1.0))
        self.transpose_forward = list(plan.transpose_forward)
        self.schemes = [channel.scheme for channel in plan.channels]
        self.masked = [channel.use_mask for channel in plan.channels]
        self.of_plan = [(channel.low, channel.high, channel.mean, channel.std) for channel in plan.channels]
        self.resampling_data = ScriptResampling(plan.resampling_data)
        self.resampling_logits = ScriptResampling(plan.resampling_logits)

    def begin(self, image: Tensor, spacing: list[float]) -> dict[str, Tensor]:
        """Find how a scan maps to the network's grid (`preprocessing.preprocess`).

        Args:
            image: (C, Z, Y, X) raw values.
            spacing: mm, (z, y, x).

        Returns:
            A state with these entries: "image", the cropped scan (C, Z, Y, X) in the network's axis order; "box", the
                crop
            (3, 2); "mask", (Z, Y, X) bool, empty if it is not needed; "normalizations", (C, 4); "low" and "high", the
            range to clip to; "shape", size of the network's grid; "grid", the map to that grid; "logits_grid", the map
            back.
        """
        self._check(image, spacing)
        order = self.transpose_forward
        image = computable(image).permute(0, order[0] + 1, order[1] + 1, order[2] + 1)
        occupied = (image != 0).any(0)
        box = occupied_box(occupied)
        z, y, x = box[0], box[1], box[2]
        occupied = occupied[z[0] : z[1], y[0] : y[1], x[0] : x[1]]
        state = {"box": torch.tensor(box), "image": image[:, z[0] : z[1], y[0] : y[1], x[0] : x[1]]}
        state["mask"] = filled(occupied) if any(self.masked) else occupied[:0]
        self._map_grids(state, [spacing[axis] for axis in order])
        self._choose_normalizations(state)
        return state

    def planes(self, state: dict[str, Tensor], start: int, stop: int) -> Tensor:
        """Make the planes [start, stop) of the network's grid, (C, planes, Y, X) float32 (`Case.planes`)."""
        grid = stored_grid(state, "grid")
        low, high = inputs_of(grid.operators[0], start, stop)
        rows: list[list[float]] = state["normalizations"].tolist()
        numbers = [(row[0], row[1], row[2], row[3]) for row in rows]
        image = normalize_within(state["image"][:, low:high], numbers, self.masked, state["mask"][low:high])
        return resample_rows(image, grid, start, stop, low, state["low"], state["high"])

    def _check(self, image: Tensor, spacing: list[float]) -> None:
        """Refuse tensors that are not a scan for this model."""
        channels = len(self.schemes)
        if image.ndim != 4 or image.shape[0] != channels or image.numel() == 0:
            raise ValueError(f"image must be ({channels}, Z, Y, X) and not empty, got {list(image.shape)}")
        if image.is_complex() or image.is_quantized:
            raise ValueError("image must hold real numbers, got complex or quantized ones")
        if len(spacing) != 3:
            raise ValueError(f"spacing must be three numbers in mm, (z, y, x), got {spacing}")
        for value in spacing:
            if not 1e-6 <= value <= 1e6:
                raise ValueError(f"spacing must be finite and above 0 mm, got {spacing} (z, y, x)")
        if image.is_floating_point() and not bool(torch.isfinite(torch.stack(torch.aminmax(image))).all()):
            raise ValueError("voxels must be finite, got NaN or infinity: replace them")

    def _map_grids(self, state: dict[str, Tensor], spacing: list[float]) -> None:
        """Make the maps from the cropped scan to the network's grid, and from logits back."""
        image = state["image"]
        shape = [image.shape[1], image.shape[2], image.shape[3]]
        target = [spacing[0] if self.slicewise else self.spacing[0], self.spacing[1], self.spacing[2]]
        new_shape = shape_at_spacing(shape, spacing, target)
        grid = self.resampling_data.grid_map(shape, new_shape, spacing, target, image.device)
        reached = [operator.first.shape[0] for operator in grid.operators]
        state["shape"] = torch.tensor(reached)
        store_grid(state, "grid", grid)
        back = self.resampling_logits.grid_map(reached, shape, target, spacing, image.device)
        store_grid(state, "logits_grid", back)

    def _choose_normalizations(self, state: dict[str, Tensor]) -> None:
        """Choose the numbers of each channel, and the range to which resampling clips."""
        grid = stored_grid(state, "grid")
        numbers: list[list[float]] = []
        lows: list[Tensor] = []
        highs: list[Tensor] = []
        mask = state["mask"]
        for channel, scheme in enumerate(self.schemes):
            image, masked = state["image"][channel : channel + 1], self.masked[channel]
            measured = (0.0, 0.0)
            if scheme == "ZScoreNormalization":
                measured = statistics(image[0], mask, masked)
            elif scheme in ("RescaleTo01Normalization", "RGBTo01Normalization"):
                measured = (float(image.min()), float(image.max()))
            chosen = normalization_numbers(scheme, self.of_plan[channel], measured)
            if masked:
                low, high = value_range(normalize_within(image, [chosen], [True], mask), grid)
            else:
                # Normalising keeps the order of values, so it is enough to normalise the raw extremes.
                low, high = value_range(image, grid)
                low, high = normalize(low, [chosen]), normalize(high, [chosen])
            numbers.append([chosen[0], chosen[1], chosen[2], chosen[3]])
            lows.append(low)
            highs.append(high)
        state["normalizations"] = torch.tensor(numbers)  # float32, the type of normalised voxels
        state["low"], state["high"] = torch.cat(lows), torch.cat(highs)
