"""Preprocessing as TorchScript: what `preprocessing` does, in the part of Python that torch.jit.script compiles."""

import math

import torch
from torch import Tensor, nn

from ...model.plans import ChannelNormalization, Plan
from ...pipeline.preprocessing import EPSILON, LARGEST_GROWTH, STATISTICS_PLANES
from .resampling import ScriptGrid, ScriptResampling, resample_rows, store_grid, stored_grid, value_range

# Compiled functions see no globals: constants reach them as default values of their arguments.


class ScriptNormalization(nn.Module):
    """How one input channel is normalised (`preprocessing.choose_normalization` and `Normalization`)."""

    def __init__(self, channel: ChannelNormalization) -> None:
        super().__init__()
        self.scheme, self.masked = channel.scheme, channel.use_mask
        self.low, self.high = channel.low, channel.high
        self.mean, self.std = channel.mean, channel.std

    def numbers(self, image: Tensor, mask: Tensor, epsilon: float = EPSILON) -> list[float]:
        """Turn the scheme into numbers for this scan: low, high, shift and scale.

        Args:
            image: (Z, Y, X), one cropped channel.
            mask: (Z, Y, X) bool, the non-zero region; read where the channel is masked.
            epsilon: Least standard deviation or range to divide by.
        """
        if self.scheme == "CTNormalization":
            return [self.low, self.high, self.mean, max(self.std, epsilon)]
        if self.scheme == "ZScoreNormalization":
            mean, deviation = self._statistics(image, mask)
            return [-math.inf, math.inf, mean, max(deviation, epsilon)]
        if self.scheme == "NoNormalization":
            return [-math.inf, math.inf, 0.0, 1.0]
        low, high = float(image.min()), float(image.max())
        if self.scheme == "RescaleTo01Normalization":
            return [-math.inf, math.inf, low, max(high - low, epsilon)]
        if low < 0 or high > 255:
            raise ValueError(
                f"an RGB channel must hold values from 0 to 255, got {low} to {high}; "
                "this model was trained on colour images"
            )
        return [-math.inf, math.inf, 0.0, 255.0]

    def _statistics(self, image: Tensor, mask: Tensor, planes: int = STATISTICS_PLANES) -> tuple[float, float]:
        """Mean and standard deviation, of the masked region where the channel is masked."""
        count, total, squares = 0, 0.0, 0.0
        for start in range(0, image.shape[0], planes):
            values = self._counted(image[start : start + planes], mask[start : start + planes])
            count += values.numel()
            total += float(values.sum(dtype=torch.float64))
        mean = total / max(count, 1)
        for start in range(0, image.shape[0], planes):
            values = self._counted(image[start : start + planes], mask[start : start + planes])
            squares += float((values.to(torch.float32) - mean).square().sum(dtype=torch.float64))
        return mean, (squares / max(count, 1)) ** 0.5

    def _counted(self, image: Tensor, mask: Tensor) -> Tensor:
        return image[mask] if self.masked else image

    def normalized(self, image: Tensor, numbers: list[float], mask: Tensor) -> Tensor:
        """Normalise (Z, Y, X) to float32; zero outside the mask of a masked channel."""
        image = image.to(torch.float32, copy=True)
        if not math.isinf(numbers[0]):
            image.clamp_(numbers[0], numbers[1])
        image.sub_(numbers[2]).div_(numbers[3])
        return image.masked_fill_(mask.logical_not(), 0.0) if self.masked else image

    def limits(self, image: Tensor, numbers: list[float], mask: Tensor, grid: ScriptGrid) -> tuple[Tensor, Tensor]:
        """Least and greatest normalised value of (Z, Y, X), as `value_range` shapes them."""
        if self.masked:
            return value_range(self.normalized(image, numbers, mask)[None], grid)
        # Normalising keeps the order of values, so it is enough to normalise the raw extremes.
        low, high = value_range(image[None], grid)
        return self.normalized(low, numbers, mask), self.normalized(high, numbers, mask)


def filled(occupied: Tensor) -> Tensor:
    """Fill the holes of a mask, (Z, Y, X) bool: what cannot be reached from the border through faces of voxels.

    Note:
        `preprocessing.filled_mask`. Sweeps along the axes carry the outside on until it grows no more.
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
    """Smallest half-open box around what is true in (Z, Y, X); the whole array where nothing is."""
    box: list[list[int]] = []
    for axis in range(3):
        places = occupied.movedim(axis, 0).flatten(1).any(1).nonzero()
        if places.shape[0] == 0:
            return [[0, occupied.shape[0]], [0, occupied.shape[1]], [0, occupied.shape[2]]]
        box.append([int(places[0]), int(places[-1]) + 1])
    return box


def computable(image: Tensor) -> Tensor:
    """Turn types that torch can store but hardly compute with into ones that hold the same values."""
    if image.dtype in (torch.bool, torch.uint16):
        return image.to(torch.int32)
    if image.dtype == torch.uint32:
        return image.to(torch.int64)
    if image.dtype == torch.uint64:
        return image.to(torch.float64)
    return image.to(torch.float32) if image.dtype in (torch.float16, torch.bfloat16) else image


class ScriptPreprocessing(nn.Module):
    """From a scan to planes of the network's grid (`preprocessing.Case`)."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.slicewise = len(plan.patch_size) == 2
        self.spacing = list(plan.spacing_3d(1.0))
        self.transpose_forward = list(plan.transpose_forward)
        self.normalizations = nn.ModuleList(ScriptNormalization(channel) for channel in plan.channels)
        self.any_masked = any(channel.use_mask for channel in plan.channels)
        self.resampling_data = ScriptResampling(plan.resampling_data)
        self.resampling_logits = ScriptResampling(plan.resampling_logits)

    def begin(self, image: Tensor, spacing: list[float]) -> dict[str, Tensor]:
        """Work out how a scan maps to the network's grid (`preprocessing.preprocess`).

        Args:
            image: (C, Z, Y, X) raw values.
            spacing: mm, (z, y, x).

        Returns:
            A state with "image", the cropped scan, (C, Z, Y, X) with the network's axis order; "box", of the crop,
            (3, 2); "mask", (Z, Y, X) bool, empty if not needed; "normalizations", (C, 4); "low" and "high", to clip
            to; "shape", of the network's grid; and two grid maps, "grid" to that grid and "logits_grid" back.
        """
        self._check(image, spacing)
        order = self.transpose_forward
        image = computable(image).permute(0, order[0] + 1, order[1] + 1, order[2] + 1)
        occupied = (image != 0).any(0)
        box = occupied_box(occupied)
        z, y, x = box[0], box[1], box[2]
        occupied = occupied[z[0] : z[1], y[0] : y[1], x[0] : x[1]]
        state = {"box": torch.tensor(box), "image": image[:, z[0] : z[1], y[0] : y[1], x[0] : x[1]]}
        state["mask"] = filled(occupied) if self.any_masked else occupied[:0]
        self._map_grids(state, [spacing[axis] for axis in order])
        self._choose_normalizations(state)
        return state

    def planes(self, state: dict[str, Tensor], start: int, stop: int) -> Tensor:
        """Make the planes [start, stop) of the network's grid, (C, planes, Y, X) float32 (`Case.planes`)."""
        grid = stored_grid(state, "grid")
        reads = grid.operators[0].reads
        low, high = int(reads[start, 0]), int(reads[stop - 1, 1])
        channels: list[Tensor] = []
        for channel, normalization in enumerate(self.normalizations):
            numbers: list[float] = state["normalizations"][channel].tolist()
            planes = state["image"][channel, low:high]
            mask = state["mask"][low:high]
            channels.append(normalization.normalized(planes, numbers, mask))  # type: ignore[operator]
        return resample_rows(torch.stack(channels), grid, start, stop, low, state["low"], state["high"])

    def _check(self, image: Tensor, spacing: list[float]) -> None:
        """Refuse what is no scan for this model."""
        channels = len(self.normalizations)
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

    def _map_grids(self, state: dict[str, Tensor], spacing: list[float], most: int = LARGEST_GROWTH) -> None:
        """Work out how the cropped scan becomes the network's grid, and logits come back."""
        image = state["image"]
        shape = [image.shape[1], image.shape[2], image.shape[3]]
        target = [spacing[0] if self.slicewise else self.spacing[0], self.spacing[1], self.spacing[2]]
        # Python's round, half to even, as in nnU-Net's compute_new_shape; TorchScript's gives a float.
        new_shape = [int(round(spacing[axis] / target[axis] * shape[axis])) for axis in range(3)]  # noqa: RUF046
        if min(new_shape) < 1:
            raise ValueError(
                f"at the model's spacing of {target} mm the scan must have at least one voxel along each axis; "
                f"{shape} voxels of {spacing} mm become {new_shape}"
            )
        if 1.0 * new_shape[0] * new_shape[1] * new_shape[2] > 1.0 * most * shape[0] * shape[1] * shape[2]:
            raise ValueError(
                f"at the model's spacing of {target} mm a scan must grow at most {most} times; {shape} voxels of "
                f"{spacing} mm become {new_shape}: check the spacing"
            )
        grid = self.resampling_data.grid_map(shape, new_shape, spacing, target, image.device)
        reached = [operator.reads.shape[0] for operator in grid.operators]
        state["shape"] = torch.tensor(reached)
        store_grid(state, "grid", grid)
        back = self.resampling_logits.grid_map(reached, shape, target, spacing, image.device)
        store_grid(state, "logits_grid", back)

    def _choose_normalizations(self, state: dict[str, Tensor]) -> None:
        """Fix the numbers of each channel, and the range that resampling clips to."""
        grid = stored_grid(state, "grid")
        numbers: list[Tensor] = []
        lows: list[Tensor] = []
        highs: list[Tensor] = []
        for channel, normalization in enumerate(self.normalizations):
            image = state["image"][channel]
            chosen = normalization.numbers(image, state["mask"])  # type: ignore[operator]
            low, high = normalization.limits(image, chosen, state["mask"], grid)  # type: ignore[operator]
            numbers.append(torch.tensor(chosen, dtype=torch.float64))
            lows.append(low)
            highs.append(high)
        state["normalizations"] = torch.stack(numbers)
        state["low"], state["high"] = torch.cat(lows), torch.cat(highs)
