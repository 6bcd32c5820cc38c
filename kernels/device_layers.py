"""The operations of `reference_layers` as CUDA kernels, with the same arguments and results."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from . import loader
from .reference_layers import Norm

MOST_NORM_BLOCKS = 1024
LEAST_NORM_VALUES = 8192
"""Of an instance norm: blocks in all, and values that are worth a block of their own."""

NORM_GROUP = 8
"""Constant of instance_norm_scales.cu."""

THREADS = loader.THREADS[0] * loader.THREADS[1]

CONVOLVED, CONVOLVED_PITCH, CONVOLVED_STEP, CONVOLVED_LINES = 32, 34, 16, 2
"""Constants of convolve.cu: channels, and voxels of x, at once; these with a border; factors of a step; lines."""

CONVOLVED_TILES, CONVOLVED_ROWS, CONVOLVED_BLOCKS = 16, 4, 4
"""Tiles of a block one after the other, at most; its rows of threads; and blocks that a multiprocessor runs at once."""

MOST_POINTS_OUTPUTS, POINTS_BLOCKS, POINTS_ROWS = 16, 4096, 4
"""Of convolve_points.cu: most outputs, most blocks, and the rows of threads of a block."""

UPSAMPLED, UPSAMPLED_ROWS = 32, 4
"""Constant of upsample.cu: voxels, channels and results at once; and rows of threads of a block."""

LEAST_UPSAMPLE_BLOCKS = 1536
"""So many blocks share the work, if there is enough: twice what a large GPU runs at once."""


def instance_norm(
    values: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    epsilon: float,
    slope: float = 1.0,
    residual: Tensor | None = None,
    copy: Tensor | None = None,
) -> Tensor:
    """See `reference_layers.instance_norm`."""
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
    """See `reference_layers.norm_scales`."""
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
    """See `reference_layers.norm_apply`."""
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
    pitch = channels if copy is None else _pitch(copy)
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
    if channels % CONVOLVED:
        factors = weight.flatten(1)
        factors = F.pad(factors, (0, -factors.shape[1] % CONVOLVED_STEP))
        steps = factors.view(groups, CONVOLVED, -1, CONVOLVED_STEP).transpose(1, 2)
    else:
        by_chunk = weight.view(groups, CONVOLVED, channels // CONVOLVED, -1, CONVOLVED_STEP, *weight.shape[2:])
        # (groups, kz, chunks, ky, kx, 2, outputs, 16)
        steps = by_chunk.permute(0, 5, 2, 6, 7, 3, 1, 4).reshape(groups, -1, CONVOLVED, CONVOLVED_STEP)
    # Outputs are numbered (thread, half, product, one of two), and factors (half, thread, one of two).
    parts = steps.reshape(groups, steps.shape[1], 4, 2, 2, 2, 2, 4, 2)
    return parts.permute(0, 1, 3, 2, 5, 7, 4, 6, 8).reshape(groups, steps.shape[1], 2, 32, 8).contiguous()


def convolve(
    values: Tensor, weight: Tensor, factors: Tensor, norm: Norm | None = None, bias: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """See `reference_layers.convolve`; `factors` are what `factors_of` makes of the weight."""
    kernel = [1] * (5 - weight.ndim) + list(weight.shape[2:])
    _require_halves(values, weight.shape[1])
    images, channels = values.shape[:2]
    grid = [1] * (5 - values.ndim) + list(values.shape[2:])
    outputs, lines = len(weight), channels % CONVOLVED != 0
    if lines:
        values = values.contiguous()
    else:
        _require_channels_last("values", values, values, _pitch(values))
    usable = set(kernel) <= {1, 3} and (bias is not None or outputs % CONVOLVED == 0)
    if not usable or (norm is not None and (lines or not 0 <= norm.slope <= 1)):
        raise ValueError(
            f"a convolution must have kernels of 1 or 3 voxels, and outputs in multiples of {CONVOLVED} or a bias; "
            f"after a norm, channels in multiples of {CONVOLVED} and a slope from 0 to 1; got a kernel of {kernel}, "
            f"{outputs} outputs and {channels} channels"
        )
    pitch = _pitch(values)
    if grid[1] * grid[2] * max(pitch, outputs) >= 2**31:
        raise ValueError(f"a plane must have fewer than 2^31 numbers, got {grid[1:]} times {max(pitch, outputs)}")
    if bias is not None and set(kernel) == {1} and channels == CONVOLVED and outputs <= MOST_POINTS_OUTPUTS:
        return _convolve_points(values, factors, norm, bias), None
    down = CONVOLVED_ROWS * CONVOLVED_LINES
    tiles = grid[0] * -(-grid[1] // down) * -(-grid[2] // CONVOLVED)
    groups = len(factors)
    at_once = CONVOLVED_BLOCKS * loader.multiprocessors(values.device)
    run = _tiles_of_block(tiles, images * groups, at_once, CONVOLVED_TILES)
    parts = -(-tiles // run)
    sums = None
    if bias is None:
        out = values.new_empty(images, *values.shape[2:], outputs).movedim(-1, 1)
        sums = torch.empty(images, parts, 3, outputs, dtype=torch.float32, device=values.device)
    else:
        out = values.new_empty(images, outputs, *values.shape[2:])
    plane = (down + 2) * CONVOLVED_PITCH
    if (
        lines
    ):  # the tile, eight halves so that a place follows that is a multiple of 16 bytes, and an int for each factor
        halves = (channels * kernel[0] * plane + 8) // 8 * 8 + 2 * CONVOLVED_STEP * factors.shape[1]
    else:
        halves = CONVOLVED * plane
    loader.launch(
        "convolve",
        values.dtype,
        [values.data_ptr(), pitch, *grid, channels, *kernel, factors.data_ptr(), *_norm_arguments(norm), groups, parts,
         run, out.data_ptr(), outputs, _address(sums), _address(bias)],
        device=values.device,
        blocks=images * groups * parts,
        lines=lines,
        threads=(32, CONVOLVED_ROWS),
        shared_bytes=4 * (CONVOLVED + 16 * 32 * CONVOLVED_ROWS) + 2 * halves,
    )  # fmt: skip
    return out, sums


@lru_cache(maxsize=512)
def _tiles_of_block(tiles: int, images: int, at_once: int, most: int) -> int:
    """Choose how many tiles a block takes, so that few run alone at the end; a block begins for a tile's time."""

    def rounds(run: int) -> int:
        return -(-images * -(-tiles // run) // at_once)

    return min(range(1, most + 1), key=lambda run: (rounds(run) * (run + 1), -run))


def _convolve_points(values: Tensor, factors: Tensor, norm: Norm | None, bias: Tensor) -> Tensor:
    """Convolve with a kernel of one voxel, with the arguments of `convolve`."""
    images, _, *grid = values.shape
    out = values.new_empty(images, len(bias), *grid)
    voxels = math.prod(grid)
    blocks = max(1, min(-(-voxels // (32 * POINTS_ROWS)), POINTS_BLOCKS // images))
    loader.launch(
        "convolve_points",
        values.dtype,
        [values.data_ptr(), _pitch(values), voxels, factors.data_ptr(), *_norm_arguments(norm), blocks,
         out.data_ptr(), len(bias), bias.data_ptr()],
        device=values.device,
        blocks=images * blocks,
        threads=(32, POINTS_ROWS),
    )  # fmt: skip
    return out


def _norm_arguments(norm: Norm | None) -> tuple[int, int, int]:
    """Scales, bias and slope of the norm of a convolution's input."""
    return (0, 0, _bits(1.0)) if norm is None else (norm.scales.data_ptr(), _address(norm.bias), _bits(norm.slope))


def _require_halves(values: Tensor, channels: int) -> None:
    """Check what every kernel on tensor cores takes: voxels of half numbers, in as many channels as the weight has."""
    pitch, width = _pitch(values), 16 // values.element_size()
    apart = channels % CONVOLVED == 0 and pitch % width != 0
    if values.dtype not in (torch.float16, torch.bfloat16) or values.shape[1] != channels or apart:
        raise ValueError(
            f"values must be float16 or bfloat16 in the weight's {channels} channels, voxels a multiple of {width} "
            f"numbers apart; got {values.dtype} in {values.shape[1]}, {pitch} apart"
        )


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _bits(value: float) -> int:
    """A float as an integer, since arguments are integers."""
    return struct.unpack("I", struct.pack("f", value))[0]


def _pitch(values: Tensor) -> int:
    """Numbers from a voxel to the next, by the innermost axis that has more than one: strides of others say nothing."""
    lengths, strides = (len(values), *values.shape[2:]), (values.stride(0), *values.stride()[2:])
    steps = (step for length, step in zip(reversed(lengths), reversed(strides), strict=True) if length > 1)
    return next(steps, values.shape[1])


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


def _require_finer(
    out: Tensor, images: int, channels: int, grid: Sequence[int], stride: Sequence[int], dtype: torch.dtype
) -> list[int]:
    """Check an output that is `stride` times as large as a grid, and return its own grid."""
    finer = [length * step for length, step in zip(grid, stride, strict=True)]
    like = torch.empty(images, channels, *finer, dtype=dtype, device="meta")
    _require_channels_last("the output", out, like, _pitch(out))
    return finer


def factors_of_upsampling(weight: Tensor) -> Tensor:
    """Put the weights of a transposed convolution into the order in which the threads of `upsample` take them.

    Args:
        weight: (C, K, *stride), both in multiples of 32.

    Returns:
        (groups of 32 results, steps of 32 channels, 4, 32 threads, 8): a thread has the factors of eight channels for a
        result of each of four products. Results are numbered by their place in a block, then by output.
    """
    channels = len(weight)
    rows = weight.flatten(2).permute(2, 1, 0)  # (stride, K, C)
    # Results are numbered (thread, product, one of two), and channels (step, thread, eight).
    parts = rows.reshape(-1, 4, 4, 2, channels // UPSAMPLED, 4, 8)
    return parts.permute(0, 4, 2, 1, 3, 5, 6).reshape(-1, channels // UPSAMPLED, 4, 32, 8).contiguous()


def upsample(values: Tensor, weight: Tensor, factors: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """See `reference_layers.upsample`; `factors` are what `factors_of_upsampling` makes of the weight."""
    _require_halves(values, len(weight))
    (channels, outputs), stride, grid = weight.shape[:2], weight.shape[2:], values.shape[2:]
    images, width, pitch = len(values), 16 // values.element_size(), _pitch(out)
    if channels % UPSAMPLED or outputs % UPSAMPLED or pitch % width:
        raise ValueError(
            f"an upsampling must have channels and outputs in multiples of {UPSAMPLED}, and voxels a multiple of "
            f"{width} numbers apart; got {channels} channels and {outputs} outputs of {pitch}"
        )
    _require_channels_last("values", values, values, channels)
    finer = _require_finer(out, images, outputs, grid, stride, values.dtype)
    if images * math.prod(finer) >= 2**31:
        raise ValueError(f"an upsampling must make fewer than 2^31 voxels, got {images} times {finer}")
    voxels, flat = images * math.prod(grid), [1] * (5 - values.ndim)
    tiles = -(-voxels // (UPSAMPLED * UPSAMPLED_ROWS))
    run = -(-len(factors) // min(len(factors), -(-LEAST_UPSAMPLE_BLOCKS // tiles)))
    groups = -(-len(factors) // run)
    loader.launch(
        "upsample",
        values.dtype,
        [values.data_ptr(), voxels, *grid[-2:], channels, factors.data_ptr(), _address(bias), *flat, *stride, outputs,
         groups, run, out.data_ptr(), pitch],
        device=values.device,
        blocks=tiles * groups,
        threads=(32, UPSAMPLED_ROWS),
    )  # fmt: skip
    return out


def spread_blocks(blocks: Tensor, out: Tensor) -> Tensor:
    """See `reference_layers.spread_blocks`."""
    axes = out.ndim - 2
    grid, stride = blocks.shape[1 : 1 + axes], blocks.shape[1 + axes : -1]
    images, channels, width, pitch = len(blocks), blocks.shape[-1], 16 // blocks.element_size(), _pitch(out)
    if channels % width or pitch % width or not blocks.is_contiguous() or blocks.data_ptr() % 16:
        raise ValueError(
            f"blocks must be contiguous, at a multiple of 16 bytes, channels in multiples of {width} in "
            f"{blocks.dtype}; got {channels} channels of {pitch} in strides {blocks.stride()}"
        )
    finer = _require_finer(out, images, channels, grid, stride, blocks.dtype)
    flat = [1] * (3 - axes)
    loader.launch(
        "spread_blocks",
        blocks.dtype,
        [blocks.data_ptr(), images, *flat, *grid, *flat, *stride, channels // width, out.data_ptr(), pitch // width],
        device=out.device,
        blocks=-(-images * math.prod(finer[:-1]) // loader.THREADS[1]),
    )
    return out
