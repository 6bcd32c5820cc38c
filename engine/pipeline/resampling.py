"""nnU-Net's resampling functions as one linear operator per axis.

skimage's `resize` and torch's `interpolate` are linear and separable. So each axis is a banded matrix, which is built
once for each (old length, new length) and applied as small matrix products.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ...kernels import AxisOperator, plane_groups, resample_axis
from ...kernels.reference import ClipShiftScale
from ..model.resampling_function import Resampling, coarse_axis
from .interpolation import PREFILTERS, clip_of, extremes, method_along, spline_band, torch_band


@lru_cache(maxsize=128)
def spline_operator(n_in: int, n_out: int, order: int) -> AxisOperator:
    """Build the operator that scipy.ndimage applies along an axis (mode "nearest", pixel centres aligned).

    Args:
        n_in: Old length in voxels.
        n_out: New length in voxels.
        order: 0 nearest, 1 linear, 2 to 5 B-spline.

    Note:
        Coordinates are `(i + 0.5) * n_in / n_out - 0.5`; `interpolation.spline_entries` has the formula above order 1.
    """
    return AxisOperator(n_in, *spline_band(n_in, n_out, order, PREFILTERS))


@lru_cache(maxsize=128)
def torch_operator(n_in: int, n_out: int, mode: str) -> AxisOperator:
    """Build the operator that torch.nn.functional.interpolate applies along an axis, from its response to impulses.

    Args:
        n_in: Old length in voxels.
        n_out: New length in voxels.
        mode: "linear", "nearest" or "nearest-exact".
    """
    return AxisOperator(n_in, *torch_band(n_in, n_out, mode))


@dataclass(frozen=True, slots=True, kw_only=True)
class GridMap:
    """The map from one grid to another: an operator for each of (z, y, x), and where values are clipped.

    Args:
        operators: Operators along z, y, x.
        last_axis: Axis that is resampled last, 0, 1 or 2: the coarse one, if nnU-Net separates it.
        clip: "none"; "volume": clip to the input's range after all axes; "slice": clip to the range of each input slice
            across `last_axis`, before that axis is resampled. Each channel has its own range.
    """

    operators: tuple[AxisOperator, AxisOperator, AxisOperator]
    last_axis: int = 0
    clip: str = "none"

    @property
    def shape(self) -> tuple[int, int, int]:
        """Size of the new grid (z, y, x)."""
        z, y, x = self.operators
        return z.n_out, y.n_out, x.n_out

    @classmethod
    def identity(cls, shape: Sequence[int]) -> GridMap:
        """Map a grid to itself."""
        z, y, x = (AxisOperator.identity(n) for n in shape)
        return cls(operators=(z, y, x))


def grid_map(
    resampling: Resampling,
    old_shape: Sequence[int],
    new_shape: Sequence[int],
    old_spacing: Sequence[float],
    new_spacing: Sequence[float],
) -> GridMap:
    """Make the map between two grids; shapes are in voxels and spacings in mm, (z, y, x)."""
    if resampling.function == "none" or tuple(old_shape) == tuple(new_shape):
        return GridMap.identity(old_shape)
    coarse = coarse_axis(resampling, list(old_spacing), list(new_spacing))

    def operator(axis: int) -> AxisOperator:
        order, mode = method_along(resampling, axis, coarse)
        n_in, n_out = old_shape[axis], new_shape[axis]
        return torch_operator(n_in, n_out, mode) if mode else spline_operator(n_in, n_out, order)

    return GridMap(
        operators=(operator(0), operator(1), operator(2)),
        last_axis=max(coarse, 0),
        clip=clip_of(resampling, coarse),
    )


def resample(data: Tensor, grid: GridMap) -> Tensor:
    """Resample a whole array, and clip it if the grid map clips.

    Args:
        data: (C, Z, Y, X) float32.
        grid: Map from its grid to the new one.
    """
    low, high = value_range(data, grid)
    return resample_rows(data, grid, rows=(0, grid.shape[0]), offset=0, limits=(low, high))


def value_range(data: Tensor, grid: GridMap) -> tuple[Tensor | None, Tensor | None]:
    """Least and greatest values to which a grid map clips, shaped to broadcast; (None, None) if it does not clip."""
    if grid.clip == "none":
        return None, None
    return extremes(data, grid.clip, grid.last_axis)


def resample_rows(
    data: Tensor,
    grid: GridMap,
    *,
    rows: tuple[int, int],
    offset: int,
    limits: tuple[Tensor | None, Tensor | None],
    normalization: ClipShiftScale | None = None,
) -> Tensor:
    """Resample to the planes [rows[0], rows[1]) of the new grid.

    Args:
        data: (C, z, Y, X), the input planes that these rows need; float32, or any type with `normalization`.
        grid: Map from the whole input grid to the new one.
        rows: Half-open range along z of the new grid.
        offset: Index of the first plane in `data`.
        limits: Result of `value_range` for the whole normalised input.
        normalization: Clip bounds, shift and scale of each channel, applied to the input first.
    """
    z, y, x = grid.operators
    clamps: dict[str, Any] = {}
    low, high = limits
    if low is not None and high is not None:
        if grid.clip == "slice" and grid.last_axis == 0:
            low, high = (limit[:, offset : offset + data.shape[1]] for limit in (low, high))
        clamps = {"limits": (low, high)}
    along_z: dict[str, Any] = {"rows": rows, "offset": offset}
    if grid.last_axis == 0 and grid.clip == "volume":
        data = resample_axis(data, z, -3, **along_z, normalization=normalization)
        return _in_plane(data, y, x, clamps)
    if grid.last_axis == 0:
        data = _in_plane(data, y, x, clamps, normalization)
        return resample_axis(data, z, -3, **along_z)
    other = 3 - grid.last_axis
    data = resample_axis(data, z, -3, **along_z, normalization=normalization)
    data = resample_axis(data, (y, x)[other - 1], other - 3, **clamps)
    return resample_axis(data, (y, x)[grid.last_axis - 1], grid.last_axis - 3)


def _in_plane(
    data: Tensor,
    y: AxisOperator,
    x: AxisOperator,
    clamps: Mapping[str, Any],
    normalization: ClipShiftScale | None = None,
) -> Tensor:
    """Resample (C, Z, Y, X) along y and x, a few planes at a time."""
    if y.is_identity and x.is_identity and normalization is None and not clamps:
        return data.contiguous()
    out = torch.empty(*data.shape[:2], y.n_out, x.n_out, dtype=torch.float32, device=data.device)
    for part in plane_groups(data.shape, y.n_out * x.n_out):
        of_part = {
            name: tuple(limit[:, part] if limit.shape[1] > 1 else limit for limit in both)
            for name, both in clamps.items()
        }
        lines = resample_axis(data[:, part], y, -2, normalization=normalization)
        out[:, part] = resample_axis(lines, x, -1, **of_part)
    return out
