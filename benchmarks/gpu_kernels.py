"""The part of `gpu.py` that measures each kernel: bytes that it must move, per second, as a share of a copy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
from nnturbo.engine.model.mirroring import mirror_views
from nnturbo.engine.pipeline.resampling import spline_operator
from nnturbo.kernels import Norm, device, device_layers, factors_of, factors_of_upsampling, reference, reference_layers
from nnturbo.kernels.loader import has_cupy
from torch import Tensor

from .gpu_device import Bench

MOST_BUFFERS = 8
VIEWS = mirror_views((0, 1, 2))
CLASSES = 3
PATH, LAYERS = (device, reference), (device_layers, reference_layers)
"""Where operations are: as kernels, and as their twins."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One operation on one size.

    Args:
        name: Of the kernel.
        size: (z, y, x) of a tile, or of what is resampled.
        dtype: Number type of what it reads or writes.
        moved_bytes: That have to be read and written.
        modules: `PATH` or `LAYERS`.
        buffers: Makes what it works on.
        call: Runs it: takes the kernels, or their twins, and what `buffers` has made.
    """

    name: str
    size: tuple[int, int, int]
    dtype: torch.dtype
    moved_bytes: int
    modules: tuple[ModuleType, ModuleType]
    buffers: Callable[[], tuple[Tensor, ...]]
    call: Callable[..., Any]


def kernels(bench: Bench) -> list[dict[str, Any]]:
    """Measure each kernel on a tile and on more than a cache holds, and torch's twin beside it."""
    rows: list[dict[str, Any]] = []
    for size, resampled in ((bench.sizes.tile, bench.sizes.scanned), (bench.sizes.patch, bench.sizes.tile)):
        for operation in operations(bench.device, size, resampled):
            row: dict[str, Any] = {
                "kernel": operation.name, "type": str(operation.dtype).removeprefix("torch."), "size": operation.size,
                "bytes": operation.moved_bytes,
            }  # fmt: skip
            rows.append(row)
            try:
                row |= _measured(bench, operation)
            except (RuntimeError, ValueError) as error:
                row["failed"] = f"{type(error).__name__}: {error}"[:500]
            bench.keep(rows)
            print("  ", row, flush=True)
    return rows


def _measured(bench: Bench, operation: Operation) -> dict[str, float]:
    count = max(1, min(MOST_BUFFERS, -(-bench.sizes.rotated_bytes // operation.moved_bytes)))
    buffers = [operation.buffers() for _ in range(count)]
    kernels, twins = operation.modules
    fast = kernels if bench.on_gpu and has_cupy() else twins
    seconds = bench.launch_seconds([partial(operation.call, fast, *each) for each in buffers])
    twin = bench.seconds(partial(operation.call, twins, *buffers[0]), 3, 1)
    rate = operation.moved_bytes / seconds / 1e9
    return {
        "seconds": seconds, "gb_per_s": rate, "of_copy": rate / bench.peak("copy_gb_per_s"), "twin_seconds": twin,
    }  # fmt: skip


def operations(
    device: torch.device, size: tuple[int, int, int], resampled: tuple[int, int, int]
) -> Iterator[Operation]:
    """Yield every kernel's operation on a tile, or on a scan that is resampled."""
    yield from _of_tiles(device, size)
    yield from _of_layers(device, size)
    yield from _of_convolutions(device, size)
    yield from _of_resampling(device, resampled)


def _of_tiles(device: torch.device, size: tuple[int, int, int]) -> Iterator[Operation]:
    half, voxels, views = torch.float16, math.prod(size), len(VIEWS)
    larger = tuple(n + 8 for n in size)
    yield Operation(
        name="gather_tiles",
        size=size,
        dtype=half,
        moved_bytes=voxels * (4 + 2 * views),
        modules=PATH,
        buffers=lambda: (
            torch.randn(1, *larger, device=device),
            torch.empty(views, 1, *size, dtype=half, device=device),
        ),
        call=lambda of, volume, batch: of.gather_tiles(volume, (3, 5, 7), size, VIEWS, batch),
    )
    weights = tuple(torch.rand(n, device=device) for n in size)
    yield Operation(
        name="accumulate_views",
        size=size,
        dtype=half,
        moved_bytes=CLASSES * voxels * (2 * views + 8),
        modules=PATH,
        buffers=lambda: (
            torch.randn(views, CLASSES, *size, device=device).to(half),
            torch.zeros(CLASSES, *larger, device=device)[:, 3:-5, 5:-3, 7:-1],
        ),
        call=lambda of, logits, place: of.accumulate_views(logits, VIEWS, weights, place),
    )


def _of_layers(device: torch.device, size: tuple[int, int, int]) -> Iterator[Operation]:
    """Of eight views: norms of a stage's first features, with a residual, with the decoder's copy; and upsampling."""
    half, images, channels = torch.float16, len(VIEWS), 32
    grid = tuple(n // 2 for n in size)
    numbers = images * channels * math.prod(grid)
    weight, bias = (torch.rand(channels, device=device) for _ in range(2))

    def features(count: int) -> Tensor:
        return torch.randn(images, *grid, count, device=device).to(half).movedim(-1, 1)

    # The norm needs all values before it can write the first: they are read twice.
    for name, passes, others in (("", 3, 0), (" with a residual", 4, 1), (" with a copy", 4, 2)):
        yield Operation(
            name=f"instance_norm{name}",
            size=size,
            dtype=half,
            moved_bytes=passes * 2 * numbers,
            modules=LAYERS,
            buffers=lambda others=others: (features(channels), *([features(others * channels)] if others else [])),
            call=lambda of, values, other=None, others=others: of.instance_norm(
                values, weight, bias, 1e-5, 0.01, other if others == 1 else None,
                other[:, channels:] if others == 2 else None,
            ),
        )  # fmt: skip
    # Beside the features that a decoder's stage gets too, as in the norm with a copy.
    yield Operation(
        name="spread_blocks",
        size=size,
        dtype=half,
        moved_bytes=2 * 2 * numbers,
        modules=LAYERS,
        buffers=lambda: (
            torch.randn(images, *(n // 2 for n in grid), 2, 2, 2, channels, device=device).to(half),
            features(2 * channels),
        ),
        call=lambda of, blocks, joined: of.spread_blocks(blocks, joined[:, :channels]),
    )
    coarse = (grid[0], *(n // 2 for n in grid[1:]))
    transposed = torch.randn(2 * channels, channels, 1, 2, 2, device=device).to(half)
    arguments = (transposed, factors_of_upsampling(transposed), bias)
    yield Operation(
        name="upsample",
        size=size,
        dtype=half,
        moved_bytes=2 * (images * 2 * channels * math.prod(coarse) + numbers),
        modules=LAYERS,
        buffers=lambda: (
            torch.randn(images, *coarse, 2 * channels, device=device).to(half).movedim(-1, 1),
            features(2 * channels),
        ),
        call=lambda of, values, joined: of.upsample(values, *arguments, joined[:, :channels]),
    )


def _of_convolutions(device: torch.device, size: tuple[int, int, int]) -> Iterator[Operation]:
    """Convolutions of eight views at full resolution: of the scan, of features, of joined ones, and the logits."""
    half, images, channels = torch.float16, len(VIEWS), 32
    voxels = images * math.prod(size)
    scales, bias = torch.rand(images, 2, channels, device=device), torch.rand(channels, device=device)
    for name, inputs, outputs, kernel in (
        ("of a scan", 1, channels, (1, 3, 3)),
        ("1 x 3 x 3", channels, channels, (1, 3, 3)),
        ("3 x 3 x 3", channels, channels, (3, 3, 3)),
        ("of joined features", 2 * channels, channels, (1, 3, 3)),
        ("to logits", channels, CLASSES, (1, 1, 1)),
    ):
        weight = torch.randn(outputs, inputs, *kernel, device=device).to(half)
        norm = Norm(scales, bias, 0.01) if inputs == channels else None
        arguments = (weight, factors_of(weight), norm, bias[:outputs] if outputs == CLASSES else None)
        yield Operation(
            name=f"convolve {name}",
            size=size,
            dtype=half,
            moved_bytes=2 * voxels * (inputs + outputs),
            modules=LAYERS,
            buffers=lambda inputs=inputs: (
                (torch.randn(images, *size, inputs, device=device).to(half).movedim(-1, 1),)
            ),
            call=lambda of, values, arguments=arguments: of.convolve(values, *arguments),
        )


def _of_resampling(device: torch.device, size: tuple[int, int, int]) -> Iterator[Operation]:
    voxels = math.prod(size)
    for axis, name in ((-3, "z"), (-2, "y"), (-1, "x")):
        operator = spline_operator(size[axis], round(1.1 * size[axis]), 3)
        dtype = torch.int16 if axis == -3 else torch.float32
        options: dict[str, Any] = {"normalization": ((-56.0, 180.0, 74.06, 44.36),)} if axis == -3 else {}
        yield Operation(
            name=f"resample_axis {name}",
            size=size,
            dtype=dtype,
            moved_bytes=voxels * dtype.itemsize + 4 * voxels // size[axis] * operator.n_out,
            modules=PATH,
            buffers=lambda dtype=dtype: ((200 * torch.randn(1, *size, device=device)).to(dtype),),
            call=lambda of, data, o=operator, a=axis, k=options: of.resample_axis(data, o, a, **k),
        )
    grid = tuple(spline_operator(n, round(0.9 * n), 1) for n in size)
    shape = tuple(operator.n_out for operator in grid)
    yield Operation(
        name="resample_labels",
        size=size,
        dtype=torch.uint8,
        moved_bytes=4 * CLASSES * voxels + math.prod(shape),
        modules=PATH,
        buffers=lambda: (
            torch.randn(CLASSES, *size, device=device),
            torch.empty(shape, dtype=torch.uint8, device=device),
        ),
        call=lambda of, logits, out: of.resample_labels(logits, grid, out, rows=(0, shape[0])),
    )
