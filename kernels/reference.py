"""Plain torch version of every operation: readable, runs anywhere, and the oracle for the fast ones.

Axes are (C, Z, Y, X), batched (N, C, Z, Y, X); spatial axes are counted from the end, -3 for z.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .operators import AxisOperator, matrix_blocks

LINE_VOXELS = 32768
"""Columns per matrix product of a z step. Measured on 512 x 512 planes, 32 of 55: 23 ms, and 125 ms in one piece."""


def resample_axis(
    data: Tensor, operator: AxisOperator, axis: int, *, rows: tuple[int, int] | None = None, offset: int = 0
) -> Tensor:
    """Apply a linear operator along one spatial axis.

    Args:
        data: (..., Z, Y, X) float32, contiguous.
        operator: The map along the axis.
        axis: -3, -2 or -1.
        rows: Half-open range of outputs to compute; all by default.
        offset: Index, on the operator's input axis, of the first element of `data` along `axis`.

    Returns:
        As `data`, with `axis` of length `rows[1] - rows[0]`. May be `data` itself where nothing changes.
    """
    start, stop = rows or (0, operator.n_out)
    low, high = operator.inputs_of(start, stop)
    if low < offset or high > offset + data.shape[axis]:
        raise ValueError(
            f"outputs [{start}, {stop}) read inputs [{low}, {high}), data holds [{offset}, {offset + data.shape[axis]})"
        )
    if operator.is_selection:
        if operator.is_identity:
            return data.narrow(axis, start - offset, stop - start)
        return data.index_select(axis, (operator.first[start:stop] - offset).to(data.device))
    shape = list(data.shape)
    shape[axis] = stop - start
    out = torch.empty(shape, dtype=data.dtype, device=data.device)
    # A z step is a y step on planes flattened to lines, a stretch of line at a time.
    source, target = (data.flatten(-2), out.flatten(-2)) if axis == -3 else (data, out)
    for first_out, last_out, low, high, matrix in matrix_blocks(operator, start, stop, data.device):
        rows_out, rows_in = slice(first_out - start, last_out - start), slice(low - offset, high - offset)
        if axis == -1:
            target[..., rows_out] = source[..., rows_in] @ matrix.T
            continue
        for column in range(0, source.shape[-1], LINE_VOXELS):
            stretch = slice(column, column + LINE_VOXELS)
            target[..., rows_out, stretch] = matrix @ source[..., rows_in, stretch]
    return out


def gather_views(
    volume: Tensor, corner: Sequence[int], size: Sequence[int], views: Sequence[tuple[int, ...]], out: Tensor
) -> Tensor:
    """Copy one tile of a volume, mirrored in several ways, into a batch.

    Args:
        volume: (C, Z, Y, X).
        corner: First voxel (z, y, x) of the tile.
        size: Its size (z, y, x).
        views: For each view the spatial axes to flip, counted 0, 1, 2 for z, y, x.
        out: (len(views), C, *size), any floating dtype; written and returned.
    """
    tile = volume[(slice(None), *(slice(c, c + s) for c, s in zip(corner, size, strict=True)))]
    for target, axes in zip(out, views, strict=True):
        target.copy_(tile.flip([axis + 1 for axis in axes]) if axes else tile)
    return out


def accumulate_views(
    logits: Tensor, views: Sequence[tuple[int, ...]], weights: tuple[Tensor, Tensor, Tensor], out: Tensor
) -> None:
    """Add the weighted sum of mirrored views of a tile to the volume they were cut from.

    `out += wz * wy * wx * sum over views of unflip(logits)`, one read-modify-write of `out` for all views.

    Args:
        logits: (V, K, z, y, x), output of the network for each view.
        views: For each view the spatial axes it was flipped along.
        weights: Three float32 vectors of lengths z, y, x; they hold the Gaussian, its normaliser and 1 / views.
        out: (K, z, y, x) float32; the tile's place in the accumulator.
    """
    total = logits[0].float()
    if views[0]:
        total = total.flip([axis + 1 for axis in views[0]])
    for view, axes in zip(logits[1:], views[1:], strict=True):
        total = total + (view.flip([axis + 1 for axis in axes]) if axes else view)
    wz, wy, wx = weights
    out.addcmul_(total, wz[:, None, None] * (wy[:, None] * wx))


def argmax_labels(logits: Tensor) -> Tensor:
    """Index of the greatest logit; the first one where several are equal, as numpy's argmax.

    Class by class over whole planes: torch's own argmax over the first axis is some 200 times slower on a CPU.

    Args:
        logits: (K, ...) floating.

    Returns:
        (...) uint8 for up to 256 classes, else int32.
    """
    dtype = torch.uint8 if len(logits) <= 256 else torch.int32
    labels = torch.zeros(logits.shape[1:], dtype=dtype, device=logits.device)
    best = logits[0]
    for index, logit in enumerate(logits[1:], start=1):
        greater = (logit > best).view(torch.uint8).to(dtype)
        # A later class wins over all earlier ones, and has the greater index: the maximum is the label.
        torch.maximum(labels, greater.mul_(index), out=labels)
        if index + 1 < len(logits):
            best = torch.maximum(best, logit)
    return labels


def region_labels(logits: Tensor, values: Sequence[int]) -> Tensor:
    """Paint regions over each other: region i takes its value wherever its probability exceeds one half.

    Args:
        logits: (K, ...) floating, one per region; sigmoid(x) > 0.5 is x > 0.
        values: The label each region paints, in painting order.

    Returns:
        (...) int32.
    """
    labels = torch.zeros(logits.shape[1:], dtype=torch.int32, device=logits.device)
    for logit, value in zip(logits, values, strict=True):
        labels = torch.where(logit > 0, value, labels)
    return labels
