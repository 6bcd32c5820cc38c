"""Plain torch version of what networks need on a GPU: readable, runs anywhere, and the oracle for the fast ones.

Features are (N, C, *grid).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Norm(NamedTuple):
    """An instance norm whose statistics are known, and its activation: `(x - mean) * scale + bias`, damped by `slope`.

    Attributes:
        scales: (N, 2, C) float32: means, and scales, of each channel of each image.
        bias: (C,) float32, or None for 0.
        slope: See `instance_norm`.
    """

    scales: Tensor
    bias: Tensor | None
    slope: float


def instance_norm(
    values: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    epsilon: float,
    slope: float = 1.0,
    residual: Tensor | None = None,
    copy: Tensor | None = None,
) -> Tensor:
    """Normalise each channel of each image over its voxels, add a residual, and damp what is negative; in place.

    `x = (x - mean) / sqrt(variance + epsilon) * weight + bias + residual`, then `slope * x` where `x < 0`. Computed in
    float32 and rounded once.

    Args:
        values: (N, C, *grid) floating; on a GPU with the channels last in memory, as many as fill 16 bytes or a
            multiple of that. Overwritten and returned.
        weight: (C,) float32, or None for 1.
        bias: (C,) float32, or None for 0.
        epsilon: Of the norm.
        slope: 1 for no activation, 0 for ReLU, else that of LeakyReLU.
        residual: As `values`.
        copy: As `values`, but that there may be other channels between its voxels; receives the result too.
    """
    scales = norm_scales(norm_sums(values), weight, epsilon)
    return norm_apply(values, Norm(scales, bias, slope), residual, copy)


def norm_sums(values: Tensor) -> Tensor:
    """Make the statistics for `norm_scales` of (N, C, *grid), of one part an image."""
    variance, mean = torch.var_mean(values.float(), list(range(2, values.ndim)), correction=0)
    count = torch.full_like(mean, values[0, 0].numel())
    return torch.stack([count, mean, count * variance], 1)[:, None]


def convolve(
    values: Tensor, weight: Tensor, factors: Tensor, norm: Norm | None = None, bias: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Convolve with stride 1 to the same grid, after the norm of the input and before the one of the output.

    Args:
        values: (N, C, *grid) half; on a GPU (sm_80 and newer) C is a multiple of 32 and last in memory, with other
            channels between voxels or not, or small and the values contiguous.
        weight: (K, C, *kernel) as the values, of 1 or 3 voxels along each axis.
        factors: The weight in another order, for GPUs: see `device_layers.factors_of`.
        norm: What is done to the values first, rounded to their type; its slope is from 0 to 1.
        bias: (K,) float32, of what has no norm; without one, K is a multiple of 32 on a GPU.

    Returns:
        Without a bias, (N, K, *grid) as the values, with the channels last, and for `norm_scales` the statistics
        (N, parts, 3, K) float32: voxels, mean and squared distances from it. With a bias (N, K, *grid) contiguous, and
        None.
    """
    if norm is not None:
        values = _normed(values, norm).to(values.dtype)
    pad = [size // 2 for size in weight.shape[2:]]
    convolution = F.conv3d if values.ndim == 5 else F.conv2d
    result = convolution(values.float(), weight.float(), bias, padding=pad).to(values.dtype)
    if bias is not None:
        return result.contiguous(), None
    last = torch.channels_last_3d if values.ndim == 5 else torch.channels_last
    return result.contiguous(memory_format=last), norm_sums(result)


def norm_scales(sums: Tensor, weight: Tensor | None, epsilon: float) -> Tensor:
    """Combine statistics of parts of images to what an instance norm needs.

    Args:
        sums: (N, parts, 3, C) float32, contiguous: of each channel of a part the count of its voxels, their mean, and
            the sum of squared distances from that mean. An empty part is all zeros.
        weight: (C,) float32, or None for 1.
        epsilon: Of the norm.

    Returns:
        (N, 2, C) float32: mean, and weight / sqrt(variance + epsilon).
    """
    counts, means, squares = sums.unbind(2)
    count = counts.sum(1)
    mean = means[:, 0] + (counts * (means - means[:, :1])).sum(1) / count
    variance = (squares + counts * (means - mean[:, None]).square()).sum(1) / count
    scale = torch.rsqrt(variance + epsilon)
    return torch.stack([mean, scale if weight is None else scale * weight], 1)


def norm_apply(values: Tensor, norm: Norm, residual: Tensor | None = None, copy: Tensor | None = None) -> Tensor:
    """Do the last step of `instance_norm`, in place; residual and copy are as there."""
    values.copy_(_normed(values, norm, residual))
    if copy is not None:
        copy.copy_(values)
    return values


def _normed(values: Tensor, norm: Norm, residual: Tensor | None = None) -> Tensor:
    """Apply a norm in float32."""
    mean, scale = (part.view(*part.shape, *[1] * (values.ndim - 2)) for part in norm.scales.unbind(1))
    result = (values.float() - mean) * scale
    if norm.bias is not None:
        result = result + norm.bias.view(-1, *[1] * (values.ndim - 2))
    if residual is not None:
        result = result + residual
    return torch.where(result > 0, result, norm.slope * result)


def upsample(values: Tensor, weight: Tensor, factors: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """Convolve transposed with a stride equal to the kernel, so that each voxel makes a block of the finer grid.

    Computed in float32 and rounded once.

    Args:
        values: (N, C, *grid) half; on a GPU (sm_80 and newer) C is a multiple of 32 and last in memory.
        weight: (C, K, *stride) as the values; on a GPU K is a multiple of 32.
        factors: The weight in another order, for GPUs: see `device_layers.factors_of_upsampling`.
        bias: (K,) float32, or None for 0.
        out: (N, K, *finer grid), `stride` times as large along each axis, in memory as the copy of `instance_norm`;
            written and returned.
    """
    convolution = F.conv_transpose3d if values.ndim == 5 else F.conv_transpose2d
    return out.copy_(convolution(values.float(), weight.float(), bias, tuple(weight.shape[2:])))


def spread_blocks(blocks: Tensor, out: Tensor) -> Tensor:
    """Copy blocks of voxels, one for each voxel of a coarse grid, to where they lie in the finer grid.

    Args:
        blocks: (N, *grid, *stride, C), of two or three axes; contiguous on a GPU, C as in `instance_norm`.
        out: (N, C, *finer grid), `stride` times as large along each axis, in memory as the copy of `instance_norm`;
            written and returned.
    """
    axes = out.ndim - 2
    place = out
    for axis in range(1 + axes, 1, -1):
        place = place.unflatten(axis, (-1, blocks.shape[axis + axes - 1]))
    # (N, z, y, x, sz, sy, sx, C) to (N, C, z, sz, y, sy, x, sx), which is what the place is cut into.
    pairs = [axis for position in range(1, 1 + axes) for axis in (position, position + axes)]
    place.copy_(blocks.permute(0, -1, *pairs))
    return out
