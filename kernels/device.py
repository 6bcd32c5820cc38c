"""The operations of `reference` as CUDA kernels, with the same arguments and results."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from . import loader
from .operators import AxisOperator
from .reference import Norm

MOST_BLOCKS = 4096
"""Blocks of kernels in which each row of threads takes line after line: several waves on the largest GPUs."""

MOST_NORM_BLOCKS = 1024
LEAST_NORM_VALUES = 32768
"""Of an instance norm: blocks in all, and values that are worth a block of their own."""

NORM_GROUP = 8
"""Constant of instance_norm_scales.cu."""

THREADS = loader.THREADS[0] * loader.THREADS[1]

CONVOLVED, CONVOLVED_LINES, CONVOLVED_TILES, CONVOLVED_ROWS = 32, 2, 16, 4
"""Of convolve.cu: outputs of a block, lines of a row of threads, tiles of a block, and rows of threads."""

OUTPUTS, COLUMNS, FINISHED_PITCH = 8, 128, 33
"""Constants of resample_axis.cu."""

MOST_VIEWS = 8
"""Of common.cuh."""

MOST_SHARED_BYTES = 48 * 1024
LONGEST_RUN = OUTPUTS * loader.THREADS[1]


def _flips(views: Sequence[tuple[int, ...]]) -> int:
    """Three bits for each view: flipped along z, y, x."""
    if len(views) > MOST_VIEWS:
        raise ValueError(f"there are {MOST_VIEWS} views of a tile, got {len(views)}")
    return sum(1 << (3 * view + axis) for view, axes in enumerate(views) for axis in axes)


def _blocks(lines: int) -> int:
    return max(1, min(MOST_BLOCKS, -(-lines // loader.THREADS[1])))


def _require_lines(name: str, tensor: Tensor) -> None:
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise ValueError(f"{name} must be contiguous along x, got strides {tensor.stride()}")


@lru_cache(maxsize=512)
def _tables(operator: AxisOperator, device: torch.device) -> tuple[Tensor, Tensor]:
    """First taps (n_out,) int32 and weights (taps, n_out) float32 on a device."""
    return operator.first.to(device, torch.int32), operator.weights.t().contiguous().to(device)


@lru_cache(maxsize=64)
def _normalization_table(normalization: tuple[tuple[float, float, float, float], ...], device: torch.device) -> Tensor:
    return torch.tensor(normalization, dtype=torch.float32, device=device)


def gather_tiles(
    volume: Tensor, corner: Sequence[int], size: Sequence[int], views: Sequence[tuple[int, ...]], out: Tensor
) -> Tensor:
    """See `reference.gather_tiles`; the volume is float32, the batch float32, float16 or bfloat16."""
    _require_lines("volume", volume)
    channels = len(volume)
    loader.launch(
        "gather_tiles",
        out.dtype,
        [volume.data_ptr(), *volume.stride()[:3], *volume.shape[1:], *corner, channels, *size, _flips(views),
         len(views), out.data_ptr()],
        device=out.device,
        blocks=_blocks(channels * size[0] * size[1]),
    )  # fmt: skip
    return out


def accumulate_views(
    logits: Tensor, views: Sequence[tuple[int, ...]], weights: tuple[Tensor, Tensor, Tensor], out: Tensor
) -> None:
    """See `reference.accumulate_views`."""
    _require_lines("the sums", out)
    count, classes, *size = logits.shape
    if classes * math.prod(size) >= 2**31:
        raise ValueError(f"a view must have fewer than 2^31 logits, got {classes} x {tuple(size)}; use a smaller patch")
    logits = logits.contiguous()
    loader.launch(
        "accumulate_views",
        logits.dtype,
        [logits.data_ptr(), _flips(views), count, classes, *size, *(weight.data_ptr() for weight in weights),
         out.data_ptr(), *out.stride()[:3]],
        device=out.device,
        blocks=_blocks(classes * size[0] * size[1]),
    )  # fmt: skip


def instance_norm(
    values: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    epsilon: float,
    slope: float = 1.0,
    residual: Tensor | None = None,
    copy: Tensor | None = None,
) -> Tensor:
    """See `reference.instance_norm`."""
    return norm_apply(values, Norm(norm_scales(_norm_sums(values), weight, epsilon), bias, slope), residual, copy)


def _norm_sums(values: Tensor) -> Tensor:
    """Make the sums of `norm_scales` of (N, C, *grid) values."""
    _require_packs(values, None, None)
    images, channels = values.shape[:2]
    voxels, run, parts = _parts(values)
    sums = torch.empty(images, parts, 3, channels, dtype=torch.float32, device=values.device)
    loader.launch(
        "instance_norm_sums",
        values.dtype,
        [values.data_ptr(), voxels, channels, parts, run, sums.data_ptr()],
        device=values.device,
        blocks=images * parts,
        shared_bytes=8 * (16 // values.element_size()) * THREADS,
    )
    return sums


def norm_scales(sums: Tensor, weight: Tensor | None, epsilon: float) -> Tensor:
    """See `reference.norm_scales`."""
    images, parts, of_part, channels = sums.shape
    if of_part != 3 or sums.dtype != torch.float32 or not sums.is_contiguous():
        raise ValueError(
            f"sums must be contiguous float32 of shape (N, parts, 3, C), got {sums.dtype} of shape "
            f"{tuple(sums.shape)} with strides {sums.stride()}"
        )
    scales = torch.empty(images, 2, channels, dtype=torch.float32, device=sums.device)
    loader.launch(
        "instance_norm_scales",
        sums.dtype,
        [sums.data_ptr(), channels, parts, _address(weight), _bits(epsilon),
         scales.data_ptr()],
        device=sums.device,
        blocks=images * -(-channels // NORM_GROUP),
        shared_bytes=4 * THREADS,
    )  # fmt: skip
    return scales


def norm_apply(values: Tensor, norm: Norm, residual: Tensor | None = None, copy: Tensor | None = None) -> Tensor:
    """See `reference.norm_apply`."""
    pitch = _require_packs(values, residual, copy)
    images, channels = values.shape[:2]
    voxels, run, parts = _parts(values)
    loader.launch(
        "instance_norm_apply",
        values.dtype,
        [values.data_ptr(), voxels, channels, parts, run, norm.scales.data_ptr(), _address(norm.bias),
         _bits(norm.slope), _address(residual), _address(copy), pitch],
        device=values.device,
        blocks=images * parts,
    )  # fmt: skip
    return values


def _parts(values: Tensor) -> tuple[int, int, int]:
    """Voxels of an image, of a block that has a part of it, and the number of parts."""
    images, channels = values.shape[:2]
    voxels = values[0, 0].numel()
    parts = max(1, min(MOST_NORM_BLOCKS // images, -(-voxels * channels // LEAST_NORM_VALUES)))
    run = -(-voxels // parts)
    return voxels, run, -(-voxels // run)


def _require_packs(values: Tensor, residual: Tensor | None, copy: Tensor | None) -> int:
    """Check that all can be read in packs, and return how far voxels of the copy are apart."""
    channels, width = values.shape[1], 16 // values.element_size()
    pitch = channels if copy is None else copy.stride(-1)
    if channels % width or pitch % width:
        raise ValueError(f"channels must come in multiples of {width} in {values.dtype}, got {channels} of {pitch}")
    for name, tensor in (("values", values), ("the residual", residual), ("the copy", copy)):
        if tensor is not None:
            _require_channels_last(name, tensor, values, pitch if tensor is copy else channels)
    return pitch


def factors_of(weight: Tensor) -> Tensor:
    """Put a convolution's weights into the order in which the threads of `convolve` take them.

    Args:
        weight: (outputs, channels, kz, ky, kx), or without kz.

    Returns:
        (groups of 32 outputs, steps of 16 factors, 2, 32 threads, 8): a thread has four pairs of factors, for an output
        of each of two products.
    """
    weight = weight if weight.ndim == 5 else weight.unsqueeze(2)
    outputs, channels = weight.shape[:2]
    groups = -(-outputs // CONVOLVED)
    weight = F.pad(weight, (0, 0) * 4 + (0, groups * CONVOLVED - outputs))
    if channels % 32:
        factors = weight.flatten(1)
        steps = F.pad(factors, (0, -factors.shape[1] % 16)).view(groups, CONVOLVED, -1, 16).transpose(1, 2)
    else:
        by_chunk = weight.view(groups, CONVOLVED, channels // 32, 2, 16, *weight.shape[2:])
        # (groups, kz, chunks, ky, kx, 2, outputs, 16)
        steps = by_chunk.permute(0, 5, 2, 6, 7, 3, 1, 4).reshape(groups, -1, CONVOLVED, 16)
    # Outputs are numbered (thread, half, product, one of two), and factors (half, thread, one of two).
    parts = steps.reshape(groups, steps.shape[1], 4, 2, 2, 2, 2, 4, 2)
    return parts.permute(0, 1, 3, 2, 5, 7, 4, 6, 8).reshape(groups, steps.shape[1], 2, 32, 8).contiguous()


def convolve(
    values: Tensor, weight: Tensor, factors: Tensor, norm: Norm | None = None, bias: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """See `reference.convolve`; `factors` are what `factors_of` makes of the weight."""
    kernel = [1] * (5 - weight.ndim) + list(weight.shape[2:])
    images, channels = values.shape[:2]
    grid = [1] * (5 - values.ndim) + list(values.shape[2:])
    lines = channels % 32 != 0
    pitch = values.stride(-1)
    if lines:
        values = values.contiguous()
    else:
        _require_channels_last("values", values, values, pitch)
    rows, outputs = CONVOLVED_ROWS, len(weight)
    down = rows * CONVOLVED_LINES
    tiles = grid[0] * -(-grid[1] // down) * -(-grid[2] // 32)
    run = min(tiles, CONVOLVED_TILES)
    parts, groups = -(-tiles // run), len(factors)
    sums = None
    if bias is None:
        out = values.new_empty(images, *values.shape[2:], outputs).movedim(-1, 1)
        sums = torch.empty(images, parts, 3, outputs, dtype=torch.float32, device=values.device)
    else:
        out = values.new_empty(images, outputs, *values.shape[2:])
    plane = (down + 2) * 34
    halves = -(-(channels * kernel[0] * plane + 8) // 8) * 8 + 2 * 16 * factors.shape[1] if lines else 32 * plane
    scales, norm_bias, slope = (
        (0, 0, 1.0) if norm is None else (norm.scales.data_ptr(), _address(norm.bias), norm.slope)
    )
    loader.launch(
        "convolve",
        values.dtype,
        [values.data_ptr(), pitch, *grid, channels, *kernel, factors.data_ptr(), scales, norm_bias, _bits(slope),
         groups, parts, run, out.data_ptr(), outputs, _address(sums), _address(bias)],
        device=values.device,
        blocks=images * groups * parts,
        lines=lines,
        threads=(32, rows),
        shared_bytes=4 * (CONVOLVED + 16 * 32 * rows) + 2 * halves,
    )  # fmt: skip
    return out, sums


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _bits(value: float) -> int:
    """A float as an integer, since arguments are integers."""
    return struct.unpack("I", struct.pack("f", value))[0]


def _require_channels_last(name: str, tensor: Tensor, like: Tensor, pitch: int) -> None:
    """Check type, shape, and that voxels lie `pitch` numbers apart, one after the other, channels side by side."""
    steps, step = [], pitch
    for length in reversed((len(like), *like.shape[2:])):
        steps.append(step)
        step *= length
    *of_grid, of_images = steps
    expected = (of_images, 1, *reversed(of_grid))
    found = zip(tensor.shape, tensor.stride(), expected, strict=True)
    fits = tensor.shape == like.shape and all(length == 1 or stride == wanted for length, stride, wanted in found)
    if not fits or tensor.dtype != like.dtype or tensor.data_ptr() % 16:
        raise ValueError(
            f"{name} must be {like.dtype} of shape {tuple(like.shape)} with strides {expected}, at a multiple of 16 "
            f"bytes; got {tensor.dtype} of shape {tuple(tensor.shape)} with strides {tensor.stride()}"
        )


def spread_blocks(blocks: Tensor, out: Tensor) -> Tensor:
    """See `reference.spread_blocks`."""
    axes = out.ndim - 2
    grid, stride = blocks.shape[1 : 1 + axes], blocks.shape[1 + axes : -1]
    images, channels, width, pitch = len(blocks), blocks.shape[-1], 16 // blocks.element_size(), out.stride(-1)
    if channels % width or pitch % width or not blocks.is_contiguous() or blocks.data_ptr() % 16:
        raise ValueError(
            f"blocks must be contiguous, at a multiple of 16 bytes, channels in multiples of {width} in "
            f"{blocks.dtype}; got {channels} channels of {pitch} in strides {blocks.stride()}"
        )
    finer = [length * step for length, step in zip(grid, stride, strict=True)]
    like = torch.empty(images, channels, *finer, dtype=blocks.dtype, device="meta")
    _require_channels_last("the output", out, like, pitch)
    flat = [1] * (3 - axes)
    loader.launch(
        "spread_blocks",
        blocks.dtype,
        [blocks.data_ptr(), images, *flat, *grid, *flat, *stride, channels // width, out.data_ptr(), pitch // width],
        device=out.device,
        blocks=_blocks(images * math.prod(finer[:-1])),
    )
    return out


def resample_axis(
    data: Tensor,
    operator: AxisOperator,
    axis: int,
    *,
    rows: tuple[int, int] | None = None,
    offset: int = 0,
    normalization: tuple[tuple[float, float, float, float], ...] | None = None,
    limits: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """See `reference.resample_axis`; any strides, (C, Z, Y, X) of float32, int16 or uint8."""
    start, stop = rows or (0, operator.n_out)
    operator.require_inputs((start, stop), offset, data.shape[axis])
    if operator.is_identity and normalization is None and limits is None:
        return data.narrow(axis, start - offset, stop - start)
    shape = list(data.shape)
    shape[axis] = stop - start
    out = torch.empty(shape, dtype=torch.float32, device=data.device)
    a = axis + 4
    b, o = (2, 1) if a == 3 else (3, 3 - a)
    order = (0, a, b, o)
    limit = [0, 0, 0, 0] if limits is None else [limits[0].expand(shape).stride(of) for of in order]
    strides = [[data.stride(of) for of in order], [out.stride(of) for of in order], limit]
    lengths = [shape[b], shape[o]]
    if a == 1 and all(of[3] == lengths[0] * of[2] for of in strides):  # the plane's lines follow each other
        lengths = [lengths[0] * lengths[1], 1]
    first, _ = _tables(operator, data.device)
    bands = _bands(operator, start % OUTPUTS, data.device)
    run, rows_at_once = _run(operator, start, stop, lines=a == 3)
    low, high = (0, 0) if limits is None else (limits[0].data_ptr(), limits[1].data_ptr())
    table = None if normalization is None else _normalization_table(normalization, data.device)
    loader.launch(
        "resample_axis",
        data.dtype,
        [data.data_ptr(), *strides[0], out.data_ptr(), *strides[1], stop - start, *lengths, start, offset,
         first.data_ptr(), operator.taps, bands.data_ptr(), bands.shape[1], run, rows_at_once,
         0 if table is None else table.data_ptr(), low, high, *limit],
        device=data.device,
        blocks=shape[0] * lengths[1] * -(-(stop - start) // run) * -(-lengths[0] // COLUMNS),
        lines=a == 3,
        shared_bytes=_shared_bytes(bands.shape[1], run, rows_at_once, lines=a == 3),
    )  # fmt: skip
    return out


@lru_cache(maxsize=512)
def _bands(operator: AxisOperator, phase: int, device: torch.device) -> Tensor:
    """Weights of `OUTPUTS` outputs after each other as they lie in shared memory: (groups, inputs, OUTPUTS).

    Args:
        operator: Map along the axis.
        phase: The first output of the first group.
        device: Where they go.
    """
    outputs = torch.arange(phase, operator.n_out, OUTPUTS)[:, None] + torch.arange(OUTPUTS)
    known = outputs < operator.n_out
    outputs = outputs.clamp(max=operator.n_out - 1)
    begins = operator.first[outputs] - operator.first[outputs[:, :1]]
    rows = torch.arange(int(begins.max()) + operator.taps)
    taps = rows[:, None] - begins[:, None]
    weights = operator.weights[outputs[:, None].expand(taps.shape), taps.clamp(0, operator.taps - 1)]
    return torch.where((taps >= 0) & (taps < operator.taps) & known[:, None], weights, 0).contiguous().to(device)


def _shared_bytes(band_rows: int, run: int, rows: int, *, lines: bool) -> int:
    """Size of a block's weights, inputs and, along x, outputs on their way."""
    return 4 * (run * band_rows + rows * (COLUMNS + lines) + (run * FINISHED_PITCH if lines else 0))


@lru_cache(maxsize=512)
def _run(operator: AxisOperator, start: int, stop: int, *, lines: bool) -> tuple[int, int]:
    """Number of outputs of a block, and of inputs that it holds at once: all that they take, if there is room."""
    band_rows = _bands(operator, start % OUTPUTS, torch.device("cpu")).shape[1]
    for longest in range(LONGEST_RUN, 0, -OUTPUTS):
        runs = -(-(stop - start) // longest)
        run = OUTPUTS * -(-(stop - start) // (runs * OUTPUTS))  # as long as each other
        begins = torch.arange(start, stop, run)
        ends = (begins + run).clamp(max=stop) - 1
        rows = int((operator.first[ends] - operator.first[begins]).max()) + operator.taps
        if _shared_bytes(band_rows, run, rows, lines=lines) <= MOST_SHARED_BYTES:
            return run, rows
    rows = (MOST_SHARED_BYTES - _shared_bytes(band_rows, OUTPUTS, 0, lines=lines)) // (4 * (COLUMNS + lines))
    if rows < 1:
        most = (MOST_SHARED_BYTES - _shared_bytes(0, OUTPUTS, 1, lines=lines)) // (4 * OUTPUTS)
        raise ValueError(f"{OUTPUTS} outputs along an axis may take at most {most} inputs, got {band_rows}")
    return OUTPUTS, rows


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
    """See `reference.resample_labels`."""
    _require_lines("logits", logits)
    for name, operator, held, of in zip("zyx", operators, logits.shape[1:], (rows, None, None), strict=True):
        if operator.taps > 2:
            raise ValueError(f"labels take one or two taps along each axis, got {operator.taps} along {name}")
        operator.require_inputs(of or (0, operator.n_out), offset if of else 0, held)
    if confidence is not None and confidence.stride() != out.stride():
        raise ValueError(f"confidence must lie as the labels do, {out.stride()}, got strides {confidence.stride()}")
    tables = [_tables(operator, logits.device) for operator in operators]
    axes = [
        [first.data_ptr(), weights.data_ptr(), operator.taps, operator.n_out]
        for (first, weights), operator in zip(tables, operators, strict=True)
    ]
    painted = None if values is None else _values_table(values, logits.device)
    planes = rows[1] - rows[0]
    loader.launch(
        "resample_labels",
        out.dtype,
        [logits.data_ptr(), *logits.stride()[:3], len(logits), rows[0], planes, offset, *axes[0], *axes[1], *axes[2],
         0 if painted is None else painted.data_ptr(), out.data_ptr(), *out.stride(),
         0 if confidence is None else confidence.data_ptr()],
        device=logits.device,
        blocks=_blocks(planes * operators[1].n_out),
    )  # fmt: skip


@lru_cache(maxsize=64)
def _values_table(values: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)
