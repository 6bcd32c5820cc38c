"""nnU-Net's resampling functions as one linear operator per axis.

skimage's `resize` and torch's `interpolate` are linear and separable, so each axis is a banded matrix, built once
per (length before, length after) and applied as small matrix products.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels import AxisOperator, plane_groups, resample_axis
from ...kernels.reference import Normalization
from ..model.resampling_function import Resampling

SPLINE_POLES = {
    2: (8**0.5 - 3,),
    3: (3**0.5 - 2,),
    4: (
        (664 - 438976**0.5) ** 0.5 + 304**0.5 - 19,
        (664 + 438976**0.5) ** 0.5 - 304**0.5 - 19,
    ),
    5: (
        (67.5 - 4436.25**0.5) ** 0.5 + 26.25**0.5 - 6.5,
        (67.5 + 4436.25**0.5) ** 0.5 - 26.25**0.5 - 6.5,
    ),
}
"""Poles of the B-splines' prefilters, by order (Unser, Aldroubi, Eden: B-spline signal processing, part II, 1993)."""

SPLINE_DENOMINATORS = {2: 8, 3: 6, 4: 384, 5: 120}
"""One over the least value that a B-spline has at whole numbers, by order."""

SPLINE_PADDING = 12
"""scipy.ndimage repeats the edge this often before filtering with mode "nearest"."""

SPLINE_ROUNDING = 3e-9
"""What is left of a pole's powers where they are cut off; below float32 rounding."""


@dataclass(frozen=True, slots=True)
class Prefilter:
    """How the coefficients of a B-spline follow from samples: the response to an impulse is sum of gain * pole^|n|.

    Args:
        poles: One, or two.
        gains: Of each.
        reach: Samples on each side that a coefficient depends on.
    """

    poles: list[float]
    gains: list[float]
    reach: int


def prefilter(order: int) -> Prefilter:
    """Split the prefilter of a B-spline into its poles.

    Note:
        The filter is `d * z^m / product over j of (z - p_j) * (z - 1 / p_j)` with m poles of absolute value below 1;
        its residue at p_i is the gain.
    """
    poles = SPLINE_POLES[order]
    gains = []
    for pole in poles:
        others = [(pole - other) * (pole - 1 / other) for other in poles if other != pole]
        gains.append(SPLINE_DENOMINATORS[order] * pole ** (len(poles) - 1) / (pole - 1 / pole) / math.prod(others))
    reach = int(math.log(SPLINE_ROUNDING) / math.log(max(map(abs, poles))))
    return Prefilter(list(poles), gains, reach)


def b_spline(order: int, x: Tensor) -> Tensor:
    """Evaluate the centred B-spline of an order at x, float64.

    Note:
        `sum over k of (-1)^k * binomial(n + 1, k) * max(0, (n + 1) / 2 - |x| - k)^n / n!`
    """
    total = torch.zeros_like(x)
    binomial, factorial = 1.0, 1.0
    for k in range(order + 1):
        total = total + binomial * ((order + 1) / 2 - x.abs() - k).clamp(min=0.0) ** order
        binomial = -binomial * (order + 1 - k) / (k + 1)
        factorial = factorial * max(k, 1)
    return total / factorial


def spline_entries(
    n_in: int, x: Tensor, order: int, poles: list[float], gains: list[float], reach: int, padding: int
) -> tuple[Tensor, Tensor]:
    """Find what a spline of order 2 to 5 reads of a signal at the coordinates x, (n_out,) float64.

    Returns:
        Index of each sample, (n_out, m), which may lie outside the signal or repeat; and its weight.

    Note:
        `c[k] = sum over poles p with gains g, and j, of g * (p^|k-j| + p^(k+j+1) + p^(2N-k-j-1)) * s[j]` over the
        signal s whose edges are repeated 12 times (length N) and then reflected; the value at x adds order + 1 of these
        coefficients with the weights of the B-spline (scipy ndimage.zoom with grid_mode, skimage.transform.resize).
    """
    length = n_in + 2 * padding
    nearest = torch.floor(x + 0.5) if order % 2 == 0 else torch.floor(x)
    at = (nearest.long() - order // 2)[:, None] + torch.arange(order + 1)
    spline = b_spline(order, x[:, None] - at)
    k = (at + padding)[:, :, None]
    j = k + torch.arange(-reach, reach + 1)
    total = torch.zeros(j.shape, dtype=torch.float64)
    for pole, gain in zip(poles, gains):  # noqa: B905  # TorchScript knows no strict
        p = torch.tensor(pole, dtype=torch.float64)
        total = total + gain * (p ** (k - j).abs() + p ** (k + j + 1).abs() + p ** (2 * length - k - j - 1).abs())
    weights = spline[:, :, None] * torch.where((j >= 0) & (j < length), total, 0.0)
    return (j - padding).flatten(1), weights.flatten(1)


@lru_cache(maxsize=128)
def spline_operator(n_in: int, n_out: int, order: int) -> AxisOperator:
    """Build the operator that scipy.ndimage applies along an axis (mode "nearest", pixel centres aligned).

    Args:
        n_in: Length before, in voxels.
        n_out: Length after.
        order: 0 nearest, 1 linear, 2 to 5 B-spline.

    Note:
        Coordinates are `(i + 0.5) * n_in / n_out - 0.5`; `spline_entries` has the formula for orders above 1.
    """
    if n_in == n_out:
        return AxisOperator.identity(n_in)
    x = (torch.arange(n_out, dtype=torch.float64) + 0.5) * (n_in / n_out) - 0.5
    if order == 0:
        return AxisOperator(n_in, torch.floor(x + 0.5).long().clamp(0, n_in - 1), torch.ones(n_out, 1))
    if order == 1:
        x = x.clamp(0, n_in - 1)
        left = x.floor().long().clamp(max=max(n_in - 2, 0))
        right = (x - left)[:, None]
        return AxisOperator.from_entries(n_in, left[:, None] + torch.arange(2), torch.cat([1 - right, right], dim=1))
    by = prefilter(order)
    columns, weights = spline_entries(n_in, x, order, by.poles, by.gains, by.reach, SPLINE_PADDING)
    return AxisOperator.from_entries(n_in, columns, weights, drop_below=1e-8)


@lru_cache(maxsize=128)
def torch_operator(n_in: int, n_out: int, mode: str) -> AxisOperator:
    """Build the operator that torch.nn.functional.interpolate applies along an axis, from what it does to impulses.

    Args:
        n_in: Length before.
        n_out: Length after.
        mode: "linear", "nearest" or "nearest-exact".
    """
    if n_in == n_out:
        return AxisOperator.identity(n_in)
    if mode != "linear":
        index = F.interpolate(torch.arange(n_in, dtype=torch.float32)[None, None], size=n_out, mode=mode)[0, 0]
        return AxisOperator(n_in, index.long(), torch.ones(n_out, 1))
    response = F.interpolate(torch.eye(n_in)[None], size=n_out, mode="linear", align_corners=False)[0].T
    columns = torch.arange(n_in).expand(n_out, n_in)
    return AxisOperator.from_entries(n_in, columns, response.double())


@dataclass(frozen=True, slots=True, kw_only=True)
class GridMap:
    """How one grid becomes another: an operator for each of (z, y, x), and where values are clipped on the way.

    Args:
        operators: Along z, y, x.
        last_axis: The axis resampled after the others (the coarse one where nnU-Net separates it), 0, 1 or 2.
        clip: "none"; "volume": to the input's range, after all axes; "slice": to the range of each input slice
            across `last_axis`, before that axis is resampled. Per channel.
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
    """Work out the operators between two grids; shapes in voxels and spacings in mm, (z, y, x)."""
    if resampling.function == "none" or tuple(old_shape) == tuple(new_shape):
        return GridMap.identity(old_shape)
    coarse = resampling.coarse_axis(old_spacing, new_spacing)

    def operator(axis: int) -> AxisOperator:
        n_in, n_out = old_shape[axis], new_shape[axis]
        if resampling.function == "spline":
            return spline_operator(n_in, n_out, resampling.order_coarse if axis == coarse else resampling.order)
        # resample_torch_fornnunet hands its mode on only where it separates an axis.
        in_plane = "linear" if coarse is None and resampling.function == "torch" else resampling.mode
        return torch_operator(n_in, n_out, resampling.mode_coarse if axis == coarse else in_plane)

    clips = resampling.function == "spline" and resampling.order > 1
    return GridMap(
        operators=(operator(0), operator(1), operator(2)),
        last_axis=0 if coarse is None else coarse,
        clip="none" if not clips else "volume" if coarse is None else "slice",
    )


def resample(data: Tensor, grid: GridMap) -> Tensor:
    """Resample a whole array, clipping as the grid map says.

    Args:
        data: (C, Z, Y, X) float32.
        grid: The map from its grid to the new one.
    """
    low, high = value_range(data, grid)
    return resample_rows(data, grid, rows=(0, grid.shape[0]), offset=0, limits=(low, high))


def value_range(data: Tensor, grid: GridMap) -> tuple[Tensor | None, Tensor | None]:
    """Least and greatest values that a grid map clips to, shaped to broadcast; (None, None) where it does not."""
    if grid.clip == "none":
        return None, None
    axes = [axis for axis in (1, 2, 3) if grid.clip == "volume" or axis != grid.last_axis + 1]
    return data.amin(axes, keepdim=True), data.amax(axes, keepdim=True)


def resample_rows(
    data: Tensor,
    grid: GridMap,
    *,
    rows: tuple[int, int],
    offset: int,
    limits: tuple[Tensor | None, Tensor | None],
    normalization: Normalization | None = None,
) -> Tensor:
    """Resample to the planes [rows[0], rows[1]) of the new grid.

    Args:
        data: (C, z, Y, X): the input planes from `offset` on that these rows need; float32, or normalised on the way.
        grid: The map from the whole input grid to the new one.
        rows: Half-open range along z of the new grid.
        offset: Index of the first plane in `data`.
        limits: What `value_range` gives for the whole input, normalised.
        normalization: Of the input, for each channel.
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
    normalization: Normalization | None = None,
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
