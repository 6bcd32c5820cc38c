"""What normalisation and clipping need to know of a scan, measured on the device that it lies on.

The engine measures scans on a GPU so, because uploading one takes less time than looking through it on a CPU; path.ts
measures all scans so. Sums are in float64 as those of `normalization`, so that results differ by rounding alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

STATISTICS_PLANES = 64
"""Planes per step; bounds the float copy that is alive."""


def mean_and_deviation(image: Tensor, region: Tensor | None, planes: int = STATISTICS_PLANES) -> tuple[float, float]:
    """Compute mean and standard deviation of a channel (Z, Y, X); TorchScript can compile this.

    Args:
        image: Of any type that torch adds up.
        region: (Z, Y, X) bool, of which alone; None for all voxels.
        planes: Planes per step.
    """
    count = image.numel() if region is None else int(region.sum())
    mean = float(_total(image, region, None, planes)) / max(count, 1)
    nearest = float(torch.tensor(mean, dtype=torch.float32))
    return mean, (float(_total(image, region, nearest, planes)) / max(count, 1)) ** 0.5


def _total(image: Tensor, region: Tensor | None, mean: float | None, planes: int) -> Tensor:
    """Sum of values, or of squared distances from a mean, as float64 on the device."""
    total = torch.zeros([], dtype=torch.float64, device=image.device)
    for start in range(0, image.shape[0], planes):
        values = image[start : start + planes]
        if mean is not None:
            values = (values.float() - mean).square_()
        if region is not None:
            values = values.masked_fill(~region[start : start + planes], 0)
        total += values.sum(dtype=torch.float64)
    return total


def extremes(
    image: Tensor, region: Tensor | None, axes: Sequence[int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Find the least and the greatest value of a channel along some axes, which are kept with length 1.

    Args:
        image: (Z, Y, X).
        region: (Z, Y, X) bool, of which alone; where it is empty, infinity and minus infinity.
        axes: Counted from 0.

    Returns:
        Least and greatest values, and for a region whether something lies outside of it.
    """
    axes = tuple(axes)
    if region is None:
        return image.amin(axes, keepdim=True).cpu().numpy(), image.amax(axes, keepdim=True).cpu().numpy(), None
    outside = ~region
    values = image.float()
    low = values.masked_fill(outside, torch.inf).amin(axes, keepdim=True)
    high = values.masked_fill(outside, -torch.inf).amax(axes, keepdim=True)
    return low.cpu().numpy(), high.cpu().numpy(), outside.byte().amax(axes, keepdim=True).bool().cpu().numpy()
