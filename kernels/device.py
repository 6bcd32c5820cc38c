"""The operations of `reference` as CUDA kernels, with the same arguments and results; see `device_layers` too."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from . import loader
from .operators import AxisOperator

OUTPUTS, STEP, COLUMNS = 16, 8, 64
"""Constants of resample_axis.cu: outputs of a warp, inputs of a step, and columns of a block."""

RUN_GROUPS, RUN_WARPS = 6, 6
"""Of a block of resample_axis: most groups of outputs, and warps."""

MOST_VIEWS = 8
"""Of common.cuh."""

MOST_SHARED_BYTES = 48 * 1024


def _flips(views: Sequence[tuple[int, ...]]) -> int:
    """Three bits for each view: flipped along z, y, x."""
    if len(views) > MOST_VIEWS:
        raise ValueError(f"there are {MOST_VIEWS} views of a tile, got {len(views)}")
    return sum(1 << (3 * view + axis) for view, axes in enumerate(views) for axis in axes)


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
        blocks=loader.blocks_of(channels * size[0] * size[1]),
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
        blocks=loader.blocks_of(classes * size[0] * size[1]),
    )  # fmt: skip


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
    run, rows_at_once, pitch = _run(operator, start, stop, lines=a == 3)
    low, high = (0, 0) if limits is None else (limits[0].data_ptr(), limits[1].data_ptr())
    table = None if normalization is None else _normalization_table(normalization, data.device)
    loader.launch(
        "resample_axis",
        data.dtype,
        [data.data_ptr(), *strides[0], out.data_ptr(), *strides[1], stop - start, *lengths, start, offset,
         first.data_ptr(), operator.taps, bands.data_ptr(), bands.shape[1], run, rows_at_once, pitch,
         0 if table is None else table.data_ptr(), low, high, *limit],
        device=data.device,
        blocks=shape[0] * lengths[1] * -(-(stop - start) // run) * -(-lengths[0] // COLUMNS),
        lines=a == 3,
        threads=(32, RUN_WARPS),
        shared_bytes=_shared_bytes(rows_at_once, lines=a == 3),
    )  # fmt: skip
    return out


@lru_cache(maxsize=512)
def _bands(operator: AxisOperator, phase: int, device: torch.device) -> Tensor:
    """Weights of `OUTPUTS` outputs after each other, in the order in which threads take them.

    Args:
        operator: Map along the axis.
        phase: The first output of the first group.
        device: Where they go.

    Returns:
        (groups, steps of `STEP` inputs, 2, 32 threads, 4): a thread has two outputs of two inputs; of each weight the
        upper 11 bits, as many as TF32 has, and what is left.
    """
    outputs = torch.arange(phase, operator.n_out, OUTPUTS)[:, None] + torch.arange(OUTPUTS)
    known = outputs < operator.n_out
    outputs = outputs.clamp(max=operator.n_out - 1)
    begins = operator.first[outputs] - operator.first[outputs[:, :1]]
    steps = -(-(int(begins.max()) + operator.taps) // STEP)
    taps = torch.arange(steps * STEP)[:, None] - begins[:, None]
    weights = operator.weights[outputs[:, None].expand(taps.shape), taps.clamp(0, operator.taps - 1)]
    weights = torch.where((taps >= 0) & (taps < operator.taps) & known[:, None], weights, 0)
    # Inputs are numbered (half, quarter), and outputs (half, line).
    parts = weights.view(-1, steps, 2, 4, 2, 8).permute(0, 1, 5, 3, 2, 4).reshape(-1, steps, 32, 4)
    upper = (parts.view(torch.int32) + 0x1000 & -0x2000).view(torch.float32)
    return torch.stack([upper, parts - upper], 2).to(device)


def _pitch(rows: int, *, lines: bool) -> int:
    """Numbers from row to row, or for lines from line to line, so that what a warp reads lies in different banks."""
    return rows + (4 - rows) % 8 if lines else COLUMNS + 8


def _shared_bytes(rows: int, *, lines: bool) -> int:
    """Size of the inputs that a block holds."""
    return 4 * _pitch(rows, lines=lines) * (COLUMNS if lines else rows)


@lru_cache(maxsize=512)
def _run(operator: AxisOperator, start: int, stop: int, *, lines: bool) -> tuple[int, int, int]:
    """Number of outputs of a block, of rows that it holds at once, all that they take if there is room, and the pitch.

    Beyond what outputs take, a step may reach `STEP - 1` rows; along x a block may begin with up to three more.
    """
    rows = 0
    for longest in range(OUTPUTS * RUN_GROUPS, 0, -OUTPUTS):
        runs = -(-(stop - start) // longest)
        run = OUTPUTS * -(-(stop - start) // (runs * OUTPUTS))  # as long as each other
        begins = torch.arange(start, stop, run)
        ends = (begins + run).clamp(max=stop) - 1
        rows = int((operator.first[ends] - operator.first[begins]).max()) + operator.taps + STEP - 1 + 3 * lines
        if _shared_bytes(rows, lines=lines) <= MOST_SHARED_BYTES:
            return run, rows, _pitch(rows, lines=lines)
    rows -= rows % 4
    while _shared_bytes(rows, lines=lines) > MOST_SHARED_BYTES:
        rows -= 4
    return OUTPUTS, rows, _pitch(rows, lines=lines)


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
        blocks=loader.blocks_of(planes * operators[1].n_out),
    )  # fmt: skip


@lru_cache(maxsize=64)
def _values_table(values: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)
