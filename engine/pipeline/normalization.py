"""Turns nnU-Net's normalization schemes into numbers for a scan: `(clamp(x, low, high) - shift) / scale`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ...kernels import normalize
from ..errors import VolumeError
from ..model.plans import NormalizationScheme
from .device_statistics import mean_and_deviation

STATISTICS_PLANES = 16
"""Planes per step when the statistics of a scan are computed; limits the size of the float copy."""

EPSILON = 1e-8
"""Least standard deviation or range by which nnU-Net divides."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Normalization:
    """`(clamp(x, low, high) - shift) / scale`; zero outside the mask of a masked channel.

    Every scheme of nnU-Net has this form with its own numbers. The order of steps and the float32 rounding are
    nnU-Net's.
    """

    low: float = -np.inf
    high: float = np.inf
    shift: float = 0.0
    scale: float = 1.0
    masked: bool = False

    @property
    def numbers(self) -> tuple[float, float, float, float]:
        """Low, high, shift and scale, as `kernels.normalize` takes them for a channel."""
        return self.low, self.high, self.shift, self.scale


def choose_normalization(
    channel: NormalizationScheme, image: np.ndarray | Tensor, mask: np.ndarray | Tensor | None, name: str
) -> Normalization:
    """Turn a plan's scheme into numbers for this scan.

    Args:
        channel: The plan's scheme.
        image: (Z, Y, X), one cropped channel; a tensor if it is measured on a GPU.
        mask: (Z, Y, X) bool, the non-zero region, of the same kind as the image; or None.
        name: Name of the scan, for messages.

    Raises:
        VolumeError: For values that an RGB channel cannot have.
    """
    of_plan, measured = (channel.low, channel.high, channel.mean, channel.std), (0.0, 0.0)
    if channel.scheme == "ZScoreNormalization":
        measured = _statistics(image, mask if channel.use_mask else None)
    elif channel.scheme in ("RescaleTo01Normalization", "RGBTo01Normalization"):
        measured = float(image.min()), float(image.max())
    try:
        low, high, shift, scale = normalization_numbers(channel.scheme, of_plan, measured)
    except ValueError as error:
        raise VolumeError(f"{name}: {error}") from error
    return Normalization(low=low, high=high, shift=shift, scale=scale, masked=channel.use_mask)


def normalization_numbers(
    scheme: str,
    of_plan: tuple[float, float, float, float],
    measured: tuple[float, float],
    epsilon: float = EPSILON,
) -> tuple[float, float, float, float]:
    """Turn a scheme into the numbers of `kernels.normalize`; TorchScript can compile this.

    Args:
        scheme: nnU-Net's name of the scheme.
        of_plan: Low, high, mean and standard deviation from the plan, for CT.
        measured: Mean and standard deviation of the channel, for z-score; its least and greatest value, for
            RescaleTo01 and RGBTo01.
        epsilon: Least divisor.

    Raises:
        ValueError: For values that an RGB channel cannot have.
    """
    if scheme == "CTNormalization":
        return of_plan[0], of_plan[1], of_plan[2], max(of_plan[3], epsilon)
    if scheme == "ZScoreNormalization":
        return -math.inf, math.inf, measured[0], max(measured[1], epsilon)
    if scheme == "NoNormalization":
        return -math.inf, math.inf, 0.0, 1.0
    low, high = measured
    if scheme == "RescaleTo01Normalization":
        return -math.inf, math.inf, low, max(high - low, epsilon)
    if low < 0 or high > 255:
        raise ValueError(
            f"an RGB channel must hold values from 0 to 255, got {low} to {high}; "
            "this model was trained on colour images"
        )
    return -math.inf, math.inf, 0.0, 255.0


def _statistics(image: np.ndarray | Tensor, region: np.ndarray | Tensor | None) -> tuple[float, float]:
    """Mean and standard deviation of a channel, within a region if there is one.

    An array is measured by numpy: it may have types, byte orders and strides that torch cannot read. Apart from the
    order in which numbers are added, this is `mean_and_deviation`.
    """
    if isinstance(image, Tensor):
        assert region is None or isinstance(region, Tensor)  # they lie on the same device
        return mean_and_deviation(image, region)
    count, total = 0, 0.0
    for step in _steps(len(image)):
        values = image[step] if region is None else image[step][region[step]]
        count += values.size
        total += float(values.sum(dtype=np.float64))
    mean = total / max(count, 1)
    squares = 0.0
    for step in _steps(len(image)):
        values = image[step] if region is None else image[step][region[step]]
        squares += float(np.square(values.astype(np.float32) - np.float32(mean)).sum(dtype=np.float64))
    return mean, (squares / max(count, 1)) ** 0.5


def _steps(length: int) -> Iterator[slice]:
    return (slice(start, min(start + STATISTICS_PLANES, length)) for start in range(0, length, STATISTICS_PLANES))


def normalize_within(
    image: Tensor, numbers: list[tuple[float, float, float, float]], masked: list[bool], mask: Tensor
) -> Tensor:
    """Normalise planes (C, Z, Y, X) by each channel's numbers; masked channels are zero outside a mask (Z, Y, X)."""
    image = normalize(image, numbers)
    for channel, is_masked in zip(image, masked):  # noqa: B905  # TorchScript knows no strict
        if is_masked:
            channel.masked_fill_(mask.logical_not(), 0.0)
    return image
