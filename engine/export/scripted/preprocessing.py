"""Preprocessing as TorchScript: `pipeline.preprocessing` for a scan in a tensor.

It calls the engine's functions for the size of the network's grid, for statistics and for normalisation. Box, mask and
limits are separate: the engine finds them in numpy arrays of any type, and fills masks with ITK. Here the scan is a
tensor on any device, and only torch is available.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ....kernels.reference import normalize
from ...model.plans import Plan
from ...pipeline.device_statistics import mean_and_deviation
from ...pipeline.finiteness import all_finite
from ...pipeline.normalization import STATISTICS_PLANES, normalization_numbers, normalize_within
from ...pipeline.preprocessing import shape_at_spacing
from .resampling import ScriptGrid, ScriptResampling, grid_shape, inputs_of, resample_rows, value_range


class ScanState(NamedTuple):
    """A cropped scan with all that is needed to make planes of the network's grid, and to map logits back.

    It is `preprocessing.Case` for one stage alone.

    Attributes:
        image: (C, Z, Y, X), the cropped scan in the network's axis order.
        box: Half-open [start, stop] of the crop along each axis.
        mask: (Z, Y, X) bool, the non-zero region with holes filled; empty if no channel is normalised within it.
        normalizations: Low, high, shift and scale of each channel.
        low: Least normalised values, to which resampling clips.
        high: Greatest normalised values.
        grid: Map from the cropped scan to the network's grid.
        logits_grid: Map from the network's grid back to the cropped scan.
    """

    image: Tensor
    box: list[list[int]]
    mask: Tensor
    normalizations: list[tuple[float, float, float, float]]
    low: Tensor
    high: Tensor
    grid: ScriptGrid
    logits_grid: ScriptGrid


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
        self.statistics_planes = STATISTICS_PLANES
        self.resampling_data = ScriptResampling(plan.resampling_data)
        self.resampling_logits = ScriptResampling(plan.resampling_logits)

    def begin(self, image: Tensor, spacing: list[float]) -> ScanState:
        """Find how a scan maps to the network's grid (`preprocessing.preprocess`).

        Args:
            image: (C, Z, Y, X) raw values.
            spacing: mm, (z, y, x).
        """
        self._check(image, spacing)
        order = self.transpose_forward
        image = computable(image).permute(0, order[0] + 1, order[1] + 1, order[2] + 1)
        occupied = (image != 0).any(0)
        box = occupied_box(occupied)
        z, y, x = box[0], box[1], box[2]
        occupied = occupied[z[0] : z[1], y[0] : y[1], x[0] : x[1]]
        image = image[:, z[0] : z[1], y[0] : y[1], x[0] : x[1]]
        mask = filled(occupied) if any(self.masked) else occupied[:0]
        grid, logits_grid = self._grids(image, [spacing[axis] for axis in order])
        normalizations = self._normalizations(image, mask)
        low, high = self._limits(image, mask, normalizations, grid)
        return ScanState(image, box, mask, normalizations, low, high, grid, logits_grid)

    def planes(self, scan: ScanState, start: int, stop: int) -> Tensor:
        """Make the planes [start, stop) of the network's grid, (C, planes, Y, X) float32 (`Case.planes`)."""
        low, high = inputs_of(scan.grid.operators[0], start, stop)
        image = normalize_within(scan.image[:, low:high], scan.normalizations, self.masked, scan.mask[low:high])
        return resample_rows(image, scan.grid, start, stop, low, scan.low, scan.high)

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
        if image.is_floating_point() and not bool(all_finite(image)):
            raise ValueError("voxels must be finite, got NaN or infinity: replace them")

    def _grids(self, image: Tensor, spacing: list[float]) -> tuple[ScriptGrid, ScriptGrid]:
        """Make the maps from the cropped scan to the network's grid, and from logits back."""
        shape = [image.shape[1], image.shape[2], image.shape[3]]
        target = [spacing[0] if self.slicewise else self.spacing[0], self.spacing[1], self.spacing[2]]
        new_shape = shape_at_spacing(shape, spacing, target)
        grid = self.resampling_data.grid_map(shape, new_shape, spacing, target, image.device)
        return grid, self.resampling_logits.grid_map(grid_shape(grid), shape, target, spacing, image.device)

    def _normalizations(self, image: Tensor, mask: Tensor) -> list[tuple[float, float, float, float]]:
        """Choose the numbers of each channel (`normalization.choose_normalization`)."""
        numbers: list[tuple[float, float, float, float]] = []
        for channel, scheme in enumerate(self.schemes):
            measured = (0.0, 0.0)
            if scheme == "ZScoreNormalization":
                region = mask if self.masked[channel] else None
                measured = mean_and_deviation(image[channel], region, self.statistics_planes)
            elif scheme in ("RescaleTo01Normalization", "RGBTo01Normalization"):
                measured = (float(image[channel].min()), float(image[channel].max()))
            numbers.append(normalization_numbers(scheme, self.of_plan[channel], measured))
        return numbers

    def _limits(
        self, image: Tensor, mask: Tensor, normalizations: list[tuple[float, float, float, float]], grid: ScriptGrid
    ) -> tuple[Tensor, Tensor]:
        """Find the range to which resampling clips, shaped to broadcast."""
        lows: list[Tensor] = []
        highs: list[Tensor] = []
        for channel, numbers in enumerate(normalizations):
            values = image[channel : channel + 1]
            if self.masked[channel]:
                low, high = value_range(normalize_within(values, [numbers], [True], mask), grid)
            else:
                # Normalising keeps the order of values, so it is enough to normalise the raw extremes.
                low, high = value_range(values, grid)
                low, high = normalize(low, [numbers]), normalize(high, [numbers])
            lows.append(low)
            highs.append(high)
        return torch.cat(lows), torch.cat(highs)
