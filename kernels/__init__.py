"""Array operations of the path from scan to labels; they know nothing of nnU-Net.

For tensors on a CUDA device, and if CuPy is installed, an operation is a CUDA kernel; otherwise it is the plain torch
twin. Networks on CPUs run by `program`.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from torch import Tensor

from . import device, device_layers, reference, reference_layers
from .device_layers import factors_of, factors_of_upsampling
from .loader import has_cupy
from .operators import AxisOperator
from .reference import argmax_labels, normalize, plane_groups, region_labels, weighted_sum
from .reference_layers import Norm

__all__ = [
    "AxisOperator",
    "Norm",
    "accumulate_views",
    "argmax_labels",
    "convolve",
    "factors_of",
    "factors_of_upsampling",
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
    "upsample",
    "weighted_sum",
]


def _launches(tensor: Tensor) -> bool:
    """Whether kernels are launched for a tensor."""
    return tensor.is_cuda and has_cupy()


def _for(tensor: Tensor) -> ModuleType:
    """The module with the operations of the path for a tensor's device."""
    return device if _launches(tensor) else reference


def _layers_for(tensor: Tensor) -> ModuleType:
    """The module with the operations of networks for a tensor's device."""
    return device_layers if _launches(tensor) else reference_layers


def gather_tiles(volume: Tensor, *arguments: Any) -> Tensor:
    """Copy one tile of a volume, mirrored in several ways, into a batch: see `reference.gather_tiles`."""
    return _for(volume).gather_tiles(volume, *arguments)


def accumulate_views(logits: Tensor, *arguments: Any) -> None:
    """Add the weighted sum of mirrored views of a tile to the sums: see `reference.accumulate_views`."""
    _for(logits).accumulate_views(logits, *arguments)


def instance_norm(values: Tensor, *arguments: Any, **options: Any) -> Tensor:
    """Normalise the channels of images, in place: see `reference_layers.instance_norm`."""
    return _layers_for(values).instance_norm(values, *arguments, **options)


def convolve(values: Tensor, *arguments: Any) -> tuple[Tensor, Tensor | None]:
    """Convolve few channels, between two norms: see `reference_layers.convolve`."""
    return _layers_for(values).convolve(values, *arguments)


def norm_scales(sums: Tensor, *arguments: Any) -> Tensor:
    """Combine statistics of parts of images: see `reference_layers.norm_scales`."""
    return _layers_for(sums).norm_scales(sums, *arguments)


def norm_apply(values: Tensor, *arguments: Any) -> Tensor:
    """Normalise with known statistics, in place: see `reference_layers.norm_apply`."""
    return _layers_for(values).norm_apply(values, *arguments)


def spread_blocks(blocks: Tensor, out: Tensor) -> Tensor:
    """Copy blocks of voxels to where they lie in a finer grid: see `reference_layers.spread_blocks`."""
    return _layers_for(blocks).spread_blocks(blocks, out)


def upsample(values: Tensor, *arguments: Any) -> Tensor:
    """Convolve few channels transposed, to a finer grid: see `reference_layers.upsample`."""
    return _layers_for(values).upsample(values, *arguments)


def resample_axis(data: Tensor, operator: AxisOperator, axis: int, **options: Any) -> Tensor:
    """Normalise, apply a linear operator along one axis, and clamp: see `reference.resample_axis`."""
    return _for(data).resample_axis(data, operator, axis, **options)


def resample_labels(logits: Tensor, *arguments: Any, **options: Any) -> None:
    """Resample logits and write labels: see `reference.resample_labels`."""
    _for(logits).resample_labels(logits, *arguments, **options)
