"""Array operations of the path from scan to labels; they know nothing of nnU-Net.

For tensors on a CUDA device, and if CuPy is installed, an operation is a CUDA kernel; otherwise it is the plain torch
twin. Convolutions and norms of networks are in `convolution`, for CPUs only.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from torch import Tensor

from . import device, reference
from .device import factors_of
from .loader import has_cupy
from .operators import AxisOperator
from .reference import Norm, argmax_labels, normalize, plane_groups, region_labels, weighted_sum

__all__ = [
    "AxisOperator",
    "Norm",
    "accumulate_views",
    "argmax_labels",
    "convolve",
    "factors_of",
    "gather_tiles",
    "instance_norm",
    "norm_apply",
    "norm_scales",
    "normalize",
    "plane_groups",
    "region_labels",
    "resample_axis",
    "resample_labels",
    "spread_blocks",
    "weighted_sum",
]


def _for(tensor: Tensor) -> ModuleType:
    """The module with the operations for a tensor's device."""
    return device if tensor.is_cuda and has_cupy() else reference


def gather_tiles(volume: Tensor, *arguments: Any) -> Tensor:
    """Copy one tile of a volume, mirrored in several ways, into a batch: see `reference.gather_tiles`."""
    return _for(volume).gather_tiles(volume, *arguments)


def accumulate_views(logits: Tensor, *arguments: Any) -> None:
    """Add the weighted sum of mirrored views of a tile to the sums: see `reference.accumulate_views`."""
    _for(logits).accumulate_views(logits, *arguments)


def instance_norm(values: Tensor, *arguments: Any, **options: Any) -> Tensor:
    """Normalise the channels of images, in place: see `reference.instance_norm`."""
    return _for(values).instance_norm(values, *arguments, **options)


def convolve(values: Tensor, *arguments: Any) -> tuple[Tensor, Tensor | None]:
    """Convolve few channels, between two norms: see `reference.convolve`."""
    return _for(values).convolve(values, *arguments)


def norm_scales(sums: Tensor, *arguments: Any) -> Tensor:
    """Combine statistics of parts of images: see `reference.norm_scales`."""
    return _for(sums).norm_scales(sums, *arguments)


def norm_apply(values: Tensor, *arguments: Any) -> Tensor:
    """Normalise with known statistics, in place: see `reference.norm_apply`."""
    return _for(values).norm_apply(values, *arguments)


def spread_blocks(blocks: Tensor, out: Tensor) -> Tensor:
    """Copy blocks of voxels to where they lie in a finer grid: see `reference.spread_blocks`."""
    return _for(blocks).spread_blocks(blocks, out)


def resample_axis(data: Tensor, operator: AxisOperator, axis: int, **options: Any) -> Tensor:
    """Normalise, apply a linear operator along one axis, and clamp: see `reference.resample_axis`."""
    return _for(data).resample_axis(data, operator, axis, **options)


def resample_labels(logits: Tensor, *arguments: Any, **options: Any) -> None:
    """Resample logits and write labels: see `reference.resample_labels`."""
    _for(logits).resample_labels(logits, *arguments, **options)
