"""Resampling as TorchScript: `pipeline.resampling` with operators that are stored in tensors.

It calls the engine's functions for the bands of operators and the products with them. One thing is separate: the engine
caches operators, and its CUDA kernels normalise and clip. TorchScript supports neither, so operators are in the state,
and `resample_rows` runs one step after the other.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ....kernels.operators import band_matrix, cut_blocks
from ....kernels.reference import multiply_blocks, planes_at_once
from ...model.resampling_function import Resampling, coarse_axis
from ...pipeline.interpolation import (
    PREFILTERS,
    Prefilter,
    clip_of,
    extremes,
    method_along,
    spline_band,
    torch_band,
)


class ScriptOperator(NamedTuple):
    """A banded linear map along one axis (`kernels.AxisOperator`).

    Attributes:
        first: (n_out,) int64 on the CPU: the first input of each output.
        weights: (n_out, taps) float32 on the CPU.
        matrix: (n_out, n_in), the same as a matrix on the scan's device; empty if the axis does not change.
    """

    first: Tensor
    weights: Tensor
    matrix: Tensor


class ScriptGrid(NamedTuple):
    """The map from one grid to another (`resampling.GridMap`): operators along z, y, x, and where to clip values."""

    operators: list[ScriptOperator]
    last_axis: int
    clip: str


class ScriptResampling(nn.Module):
    """One of nnU-Net's resampling functions with the arguments a plan gives it (`resampling.grid_map`)."""

    resampling: Resampling
    prefilters: dict[int, Prefilter]

    def __init__(self, resampling: Resampling) -> None:
        super().__init__()
        self.resampling = resampling
        self.prefilters = PREFILTERS

    def grid_map(
        self,
        old_shape: list[int],
        new_shape: list[int],
        old_spacing: list[float],
        new_spacing: list[float],
        device: torch.device,
    ) -> ScriptGrid:
        """Make the map between two grids; shapes are in voxels and spacings in mm, (z, y, x)."""
        stays = self.resampling.function == "none" or old_shape == new_shape
        coarse = -1 if stays else coarse_axis(self.resampling, old_spacing, new_spacing)
        operators: list[ScriptOperator] = []
        for axis in range(3):
            n_in, n_out = old_shape[axis], old_shape[axis] if stays else new_shape[axis]
            order, mode = method_along(self.resampling, axis, coarse)
            if mode == "":
                first, weights = spline_band(n_in, n_out, order, self.prefilters)
            else:
                first, weights = torch_band(n_in, n_out, mode)
            matrix = torch.empty(0, 0) if n_in == n_out else band_matrix(n_in, first, weights)
            operators.append(ScriptOperator(first, weights, matrix.to(device)))
        return ScriptGrid(operators, max(coarse, 0), "none" if stays else clip_of(self.resampling, coarse))


def grid_shape(grid: ScriptGrid) -> list[int]:
    """Size of the new grid (z, y, x)."""
    return [operator.first.shape[0] for operator in grid.operators]


def inputs_of(operator: ScriptOperator, start: int, stop: int) -> tuple[int, int]:
    """Half-open range of inputs that the outputs [start, stop) read (`kernels.AxisOperator.inputs_of`)."""
    return int(operator.first[start]), int(operator.first[stop - 1]) + operator.weights.shape[1]


def resample_axis(data: Tensor, operator: ScriptOperator, axis: int, start: int, stop: int, offset: int) -> Tensor:
    """Compute the outputs [start, stop) along an axis, -3, -2 or -1 (`kernels.resample_axis`).

    `data` begins at the input `offset` of that axis.
    """
    if operator.matrix.numel() == 0:
        return data.narrow(axis, start - offset, stop - start)
    blocks = cut_blocks(operator.matrix, operator.first, operator.weights.shape[1], start, stop)
    return multiply_blocks(data, blocks, axis, offset)


def resample_whole_axis(data: Tensor, operator: ScriptOperator, axis: int) -> Tensor:
    """Compute all outputs along an axis."""
    return resample_axis(data, operator, axis, 0, operator.first.shape[0], 0)


def resample_planes(data: Tensor, grid: ScriptGrid) -> Tensor:
    """Resample (C, Z, Y, X) along y and x in one piece."""
    return resample_whole_axis(resample_whole_axis(data, grid.operators[1], -2), grid.operators[2], -1)


def step_in_plane(data: Tensor, grid: ScriptGrid) -> int:
    """Number of planes of (C, Z, Y, X) to resample in one piece."""
    return planes_at_once(list(data.shape), grid.operators[1].first.shape[0] * grid.operators[2].first.shape[0])


def resample_in_plane(data: Tensor, grid: ScriptGrid) -> Tensor:
    """Resample (C, Z, Y, X) along y and x, a few planes at a time."""
    step = step_in_plane(data, grid)
    return torch.cat([resample_planes(data[:, at : at + step], grid) for at in range(0, data.shape[1], step)], dim=1)


def value_range(data: Tensor, grid: ScriptGrid) -> tuple[Tensor, Tensor]:
    """Least and greatest values of (C, Z, Y, X) to which a grid map clips, shaped to broadcast."""
    return extremes(data, grid.clip, grid.last_axis)


def resample_rows(
    data: Tensor, grid: ScriptGrid, start: int, stop: int, offset: int, low: Tensor, high: Tensor
) -> Tensor:
    """Resample to the planes [start, stop) of the new grid (`resampling.resample_rows`).

    Args:
        data: (C, z, Y, X) float32, the input planes that these rows need.
        grid: Map from the whole input grid to the new one.
        start: First plane of the new grid.
        stop: Plane after the last one.
        offset: Index of the first plane in `data`.
        low: Least values from `value_range` for the whole input; used if the map clips.
        high: Greatest values from `value_range`.
    """
    z = grid.operators[0]
    z_first = grid.clip == "volume" or grid.last_axis != 0
    if z_first:
        data = resample_axis(data.contiguous(), z, -3, start, stop, offset)
    if grid.clip == "volume" or grid.last_axis == 0:
        data = resample_in_plane(data, grid)
    else:
        data = resample_whole_axis(data, grid.operators[3 - grid.last_axis], -grid.last_axis)
    if grid.clip == "slice" and grid.last_axis == 0:
        low, high = low[:, offset : offset + data.shape[1]], high[:, offset : offset + data.shape[1]]
    if grid.clip != "none":
        data = torch.clamp(data, low, high)
    if not z_first:
        return resample_axis(data, z, -3, start, stop, offset)
    if grid.clip == "volume":
        return data
    return resample_whole_axis(data, grid.operators[grid.last_axis], grid.last_axis - 3)
