"""Weights with which nnU-Net's resampling functions read samples along an axis, for a plan's arguments.

All functions but `prefilter` are in the part of Python that torch.jit.script compiles: `resampling` calls them for the
engine, and `export.scripted` for path.ts. Compiled functions cannot read globals, so constants are passed as arguments.
The annotations of a NamedTuple must be types, so this module has no `from __future__ import annotations`.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.operators import band_of_entries
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
"""Reciprocal of the least value of a B-spline at whole numbers, by order."""

SPLINE_PADDING = 12
"""Number of samples by which scipy.ndimage repeats the edge before it filters with mode "nearest"."""

SPLINE_ROUNDING = 3e-9
"""Size of the first power of a pole that is left out; below float32 rounding."""


class Prefilter(NamedTuple):
    """The filter from samples to coefficients of a B-spline; its response to an impulse is sum of gain * pole^|n|.

    Attributes:
        poles: One or two poles.
        gains: Gain of each pole.
        reach: Samples on each side on which a coefficient depends.
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


PREFILTERS = {order: prefilter(order) for order in SPLINE_POLES}
"""By order."""


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
    n_in: int, x: Tensor, order: int, by: Prefilter, padding: int = SPLINE_PADDING
) -> tuple[Tensor, Tensor]:
    """Find the samples and weights of a spline of order 2 to 5 at the coordinates x, (n_out,) float64.

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
    j = k + torch.arange(-by.reach, by.reach + 1)
    total = torch.zeros(j.shape, dtype=torch.float64)
    for pole, gain in zip(by.poles, by.gains):  # noqa: B905  # TorchScript knows no strict
        p = torch.full([], pole, dtype=torch.float64)  # TorchScript's torch.tensor rounds to float32
        total = total + gain * (p ** (k - j).abs() + p ** (k + j + 1).abs() + p ** (2 * length - k - j - 1).abs())
    weights = spline[:, :, None] * torch.where((j >= 0) & (j < length), total, 0.0)
    return (j - padding).flatten(1), weights.flatten(1)


def spline_band(n_in: int, n_out: int, order: int, prefilters: dict[int, Prefilter]) -> tuple[Tensor, Tensor]:
    """Make the band of the operator that scipy.ndimage applies along an axis (`resampling.spline_operator`)."""
    if n_in == n_out:
        return torch.arange(n_in), torch.ones(n_in, 1)
    x = (torch.arange(n_out, dtype=torch.float64) + 0.5) * (n_in / n_out) - 0.5
    if order == 0:
        return torch.floor(x + 0.5).long().clamp(0, n_in - 1), torch.ones(n_out, 1)
    if order == 1:
        x = x.clamp(0, n_in - 1)
        left = x.floor().long().clamp(max=max(n_in - 2, 0))
        right = (x - left)[:, None]
        return band_of_entries(n_in, left[:, None] + torch.arange(2), torch.cat([1 - right, right], dim=1))
    columns, weights = spline_entries(n_in, x, order, prefilters[order])
    return band_of_entries(n_in, columns, weights, 1e-8)


def torch_band(n_in: int, n_out: int, mode: str) -> tuple[Tensor, Tensor]:
    """Make the band of the operator that torch's interpolate applies along an axis (`resampling.torch_operator`)."""
    if n_in == n_out:
        return torch.arange(n_in), torch.ones(n_in, 1)
    if mode != "linear":
        index = F.interpolate(torch.arange(n_in, dtype=torch.float32)[None, None], size=[n_out], mode=mode)[0, 0]
        return index.long(), torch.ones(n_out, 1)
    response = F.interpolate(torch.eye(n_in)[None], size=[n_out], mode="linear", align_corners=False)[0].t()
    return band_of_entries(n_in, torch.arange(n_in).expand(n_out, n_in), response.double())


def method_along(resampling: Resampling, axis: int, coarse: int) -> tuple[int, str]:
    """Say how an axis is resampled; `coarse` is the axis that is resampled separately, or -1.

    Returns:
        The order of the spline and "", or -1 and torch's mode.
    """
    if resampling.function == "spline":
        return resampling.order_coarse if axis == coarse else resampling.order, ""
    if axis == coarse:
        return -1, resampling.mode_coarse
    # resample_torch_fornnunet uses its mode only if it separates an axis.
    return -1, "linear" if coarse < 0 and resampling.function == "torch" else resampling.mode


def clip_of(resampling: Resampling, coarse: int) -> str:
    """Choose the value of `resampling.GridMap.clip`."""
    if resampling.function != "spline" or resampling.order < 2:
        return "none"
    return "volume" if coarse < 0 else "slice"


def extremes(data: Tensor, clip: str, last_axis: int) -> tuple[Tensor, Tensor]:
    """Find the least and greatest values of (C, Z, Y, X) to which a `resampling.GridMap` clips, shaped to broadcast."""
    axes = [1, 2, 3]
    if clip == "slice":
        axes.pop(last_axis)
    return data.amin(axes, keepdim=True), data.amax(axes, keepdim=True)
