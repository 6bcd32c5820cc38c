"""Plain torch version of every operation: readable, runs anywhere, and the oracle for the fast ones.

Axes are (C, Z, Y, X), batched (N, C, Z, Y, X); spatial axes are counted from the end, -3 for z. Functions with
lists as arguments are in the part of Python that torch.jit.script compiles.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .operators import AxisOperator, matrix_blocks

LINE_VOXELS = 32768
"""Columns per matrix product of a z step. Measured on 512 x 512 planes, 32 of 55: 23 ms, and 125 ms in one piece."""


WORKING_BYTES = 16 * 2**20
"""Bytes of planes that are resampled at once. glibc returns blocks over 32 MiB to the system, and allocating them again
takes longer than the products: for 140 planes of 3 x 546 x 546 to 512 x 512, 28 MiB at once take 0.33 s and 57 MiB
1.1 s."""

ClipShiftScale = Sequence[tuple[float, float, float, float]]
"""Least, greatest, shift and scale of `(clamp(x, least, greatest) - shift) / scale` for each channel."""


def normalize(data: Tensor, normalization: list[tuple[float, float, float, float]]) -> Tensor:
    """Normalise each channel; steps that change nothing are skipped.

    Args:
        data: (C, Z, Y, X), any number type and strides.
        normalization: One entry per channel, see `ClipShiftScale`.

    Returns:
        As `data`, float32 and contiguous, never `data` itself.
    """
    out = torch.empty(data.shape, dtype=torch.float32, device=data.device).copy_(data)
    for channel, (least, greatest, shift, scale) in zip(out, normalization):  # noqa: B905  # TorchScript knows no strict
        if least > -math.inf or greatest < math.inf:
            channel.clamp_(least, greatest)
        if shift != 0:
            channel.sub_(shift)
        if scale != 1:
            channel.div_(scale)
    return out


def resample_axis(
    data: Tensor,
    operator: AxisOperator,
    axis: int,
    *,
    rows: tuple[int, int] | None = None,
    offset: int = 0,
    normalization: ClipShiftScale | None = None,
    limits: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Normalise, apply a linear operator along one spatial axis, and clamp.

    Args:
        data: (C, Z, Y, X) float32; with a normalisation, any number type.
        operator: Map along the axis.
        axis: -3, -2 or -1.
        rows: Half-open range of outputs to compute; all by default.
        offset: Index, on the operator's input axis, of the first element of `data` along `axis`.
        normalization: Normalisation of the inputs, for each channel.
        limits: Least and greatest output, each broadcast to the outputs.

    Returns:
        As `data`, with `axis` of length `rows[1] - rows[0]`. It may be `data` itself if nothing changes.
    """
    start, stop = rows or (0, operator.n_out)
    operator.require_inputs((start, stop), offset, data.shape[axis])
    if normalization is not None:
        data = normalize(data, list(normalization))
    out = _applied(data, operator, axis, start, stop, offset)
    return out if limits is None else torch.clamp(out, *limits)


def _applied(data: Tensor, operator: AxisOperator, axis: int, start: int, stop: int, offset: int) -> Tensor:
    if operator.is_identity:
        return data.narrow(axis, start - offset, stop - start)
    if operator.is_selection:
        return data.index_select(axis, (operator.first[start:stop] - offset).to(data.device))
    return multiply_blocks(data, matrix_blocks(operator, start, stop, data.device), axis, offset)


def multiply_blocks(
    data: Tensor,
    blocks: list[tuple[int, int, int, int, Tensor]],
    axis: int,
    offset: int,
    line_voxels: int = LINE_VOXELS,
) -> Tensor:
    """Apply an operator along one spatial axis, as small matrix products.

    Args:
        data: (C, Z, Y, X) float32.
        blocks: Blocks from `operators.cut_blocks` for the outputs to compute, at least one.
        axis: -3, -2 or -1.
        offset: Index, on the operator's input axis, of the first element of `data` along `axis`.
        line_voxels: Columns per matrix product of a z step.
    """
    start, stop = blocks[0][0], blocks[-1][1]
    shape = list(data.shape)
    shape[axis] = stop - start
    out = torch.empty(shape, dtype=data.dtype, device=data.device)
    # A z step is a y step on planes that are flattened to lines, for a part of each line at a time.
    source, target = (data.flatten(-2), out.flatten(-2)) if axis == -3 else (data, out)
    for first_out, last_out, low, high, matrix in blocks:
        first, last = first_out - start, last_out - start
        if axis == -1:
            target[..., first:last] = source[..., low - offset : high - offset] @ matrix.t()
        else:
            for column in range(0, source.shape[-1], line_voxels):
                stretch = source[..., low - offset : high - offset, column : column + line_voxels]
                target[..., first:last, column : column + line_voxels] = matrix @ stretch
    return out


def planes_at_once(shape: list[int], voxels_out: int, working_bytes: int = WORKING_BYTES) -> int:
    """Number of planes of a (C, Z, Y, X) array that fit in `working_bytes`, before and after in-plane resampling."""
    return max(1, working_bytes // (4 * shape[0] * max(shape[2] * shape[3], voxels_out)))


def plane_groups(shape: Sequence[int], voxels_out: int) -> Iterator[slice]:
    """Cut the planes of a (C, Z, Y, X) array into groups of `planes_at_once`."""
    step = planes_at_once(list(shape), voxels_out)
    return (slice(start, min(start + step, shape[1])) for start in range(0, shape[1], step))


def gather_tiles(volume: Tensor, corner: list[int], size: list[int], views: list[list[int]], out: Tensor) -> Tensor:
    """Copy one tile of a volume, mirrored in several ways, into a batch; it is zero outside the volume.

    Args:
        volume: (C, Z, Y, X) float32.
        corner: First voxel (z, y, x) of the tile; it may lie outside the volume.
        size: Size of the tile (z, y, x).
        views: For each view the spatial axes to flip, counted 0, 1, 2 for z, y, x.
        out: (len(views), C, *size), any floating dtype; written and returned.
    """
    tile = volume
    margins: list[int] = []
    for axis in (2, 1, 0):
        low, high = max(corner[axis], 0), min(corner[axis] + size[axis], volume.shape[axis + 1])
        tile = tile.narrow(axis + 1, low, high - low)
        margins += [low - corner[axis], corner[axis] + size[axis] - high]
    if any(margins):
        tile = F.pad(tile, margins)
    for target, axes in zip(out, views):  # noqa: B905  # TorchScript knows no strict
        target.copy_(tile.flip([axis + 1 for axis in axes]) if len(axes) > 0 else tile)
    return out


def accumulate_views(
    logits: Tensor, views: list[list[int]], weights: tuple[Tensor, Tensor, Tensor], out: Tensor
) -> None:
    """Add the weighted sum of a tile's mirrored views to the sums of all tiles.

    `out += wz * wy * wx * sum over views of unflip(logits)`, one read-modify-write of `out` for all views.

    Args:
        logits: (V, K, z, y, x), output of the network for each view.
        views: For each view the spatial axes it was flipped along.
        weights: Three float32 vectors of lengths z, y, x; they hold the Gaussian, its normaliser and 1 / views.
        out: (K, z, y, x) float32; the tile's place in the accumulator.
    """
    total = logits[0].float()
    if len(views[0]) > 0:
        total = total.flip([axis + 1 for axis in views[0]])
    for view, axes in zip(logits[1:], views[1:]):  # noqa: B905  # TorchScript knows no strict
        total = total + (view.flip([axis + 1 for axis in axes]) if len(axes) > 0 else view)
    wz, wy, wx = weights
    out.addcmul_(total, wz[:, None, None] * (wy[:, None] * wx))


def argmax_labels(logits: Tensor) -> Tensor:
    """Index of the greatest logit; the first of equal ones, as in numpy's argmax.

    Class by class over whole planes: torch's own argmax over the first axis is some 200 times slower on a CPU.

    Args:
        logits: (K, ...) floating.

    Returns:
        (...) uint8 for up to 256 classes, else int32.
    """
    dtype = torch.uint8 if len(logits) <= 256 else torch.int32
    labels = torch.zeros(logits.shape[1:], dtype=dtype, device=logits.device)
    best = logits[0]
    for index in range(1, len(logits)):
        greater = (logits[index] > best).to(dtype)
        # A class that wins over all earlier ones has the greatest index so far, so the maximum is the label.
        torch.maximum(labels, greater.mul_(index), out=labels)
        if index + 1 < len(logits):
            best = torch.maximum(best, logits[index])
    return labels


def region_labels(logits: Tensor, values: list[int]) -> Tensor:
    """Paint regions over each other: region i is painted where its probability is above one half.

    Args:
        logits: (K, ...) floating, one per region; sigmoid(x) > 0.5 is x > 0.
        values: The label each region paints, in painting order.

    Returns:
        (...) int32.
    """
    labels = torch.zeros(logits.shape[1:], dtype=torch.int32, device=logits.device)
    for logit, value in zip(logits, values):  # noqa: B905  # TorchScript knows no strict
        labels = torch.where(logit > 0, value, labels)
    return labels


def resample_labels(
    logits: Tensor,
    operators: tuple[AxisOperator, AxisOperator, AxisOperator],
    out: Tensor,
    *,
    rows: tuple[int, int],
    offset: int = 0,
    values: tuple[int, ...] | None = None,
    confidence: Tensor | None = None,
) -> None:
    """Resample logits along y, x and z, and write their labels, plane by plane.

    Args:
        logits: (K, z, Y, X) float32, the input planes of the rows.
        operators: Maps along z, y, x, of one or two taps.
        out: (rows, Y', X') uint8 or uint16; written.
        rows: Half-open range of outputs along z.
        offset: Index of the first plane of `logits`.
        values: For regions, the label that each paints, in painting order; None for classes.
        confidence: (rows, Y', X') float32, with the strides of `out`; gets the probability of the written label. For
            regions, this is the region that was painted last, and 0 if none was painted.
    """
    z, y, x = operators
    low, high = z.inputs_of(*rows)
    logits = logits[:, low - offset : high - offset]
    held: dict[int, Tensor] = {}
    row = rows[0]
    for part in plane_groups(logits.shape, y.n_out * x.n_out):
        planes = resample_axis(resample_axis(logits[:, part], y, -2), x, -1)
        held |= {low + part.start + index: plane for index, plane in enumerate(planes.unbind(1))}
        while row < rows[1] and int(z.first[row]) + z.taps <= low + part.stop:
            taps = range(int(z.first[row]), int(z.first[row]) + z.taps)
            mixed = weighted_sum([held[index] for index in taps], z.weights[row].tolist())
            out[row - rows[0]] = argmax_labels(mixed) if values is None else region_labels(mixed, list(values))
            if confidence is not None:
                confidence[row - rows[0]] = _confidence(mixed, of_regions=values is not None)
            row += 1
        held = {index: plane for index, plane in held.items() if row < rows[1] and index >= int(z.first[row])}


def weighted_sum(planes: list[Tensor], weights: list[float]) -> Tensor:
    """Add weighted planes; the result may be one of them."""
    if weights[0] == 1 and not any(weights[1:]):
        return planes[0]
    result = planes[0] * weights[0]
    for plane, weight in zip(planes[1:], weights[1:]):  # noqa: B905  # TorchScript knows no strict
        result.add_(plane, alpha=weight)
    return result


def _confidence(logits: Tensor, *, of_regions: bool) -> Tensor:
    if not of_regions:
        return torch.softmax(logits, 0).amax(0)
    painted = torch.zeros_like(logits[0])
    for logit in logits:
        painted = torch.where(logit > 0, logit, painted)
    return torch.where(painted > 0, torch.sigmoid(painted), 0)
