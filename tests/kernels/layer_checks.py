"""The kernels of networks against their twins, on any device, with random arguments."""

import math
import random

import torch
from nnturbo.kernels import device_layers, reference_layers

from tests.kernels.random_arguments import CPU, EPS, FLOATS, shape


def check_instance_norm(target):
    dtype = random.choice(FLOATS)
    width = 16 // torch.empty(0, dtype=dtype).element_size()
    channels, grid = width * random.choice([1, 1, 2, 3, 5, 11]), shape(1, 6, random.randint(2, 3))
    images = random.randint(1, 3)
    # Means far from zero, and channels that are constant but for a few voxels.
    values = torch.randn(images, channels, *grid) * 10 ** (2 * torch.rand(1, channels, *[1] * len(grid)) - 1)
    values += random.choice([0, 5, -40]) * torch.randn(1, channels, *[1] * len(grid))
    values[:, : channels // 2] = torch.where(torch.rand(images, 1, *grid) < 0.8, 3.0, values[:, : channels // 2])
    values[:, 0] = 1234.567
    memory = torch.channels_last if len(grid) == 2 else torch.channels_last_3d

    def lies(tensor, where=CPU):
        last = tensor.to(where, dtype).contiguous(memory_format=memory)
        return last.as_strided(tensor.shape, last_strides(tensor.shape, channels))

    weight, bias = (torch.randn(channels) if random.random() < 0.8 else None for _ in range(2))
    residual = lies(torch.randn(values.shape)) if random.random() < 0.4 else None
    pitch = channels + width * random.choice([0, 1, channels // width])
    copies = random.random() < 0.5
    slope, epsilon = random.choice([1.0, 0.01, 0.0]), 1e-5
    expected = reference_layers.instance_norm(
        lies(values).double().float(), weight, bias, epsilon, slope, None if residual is None else residual.float()
    )
    whole = torch.full((images, math.prod(grid), pitch), torch.nan, dtype=dtype, device=target)
    copy = whole.as_strided(values.shape, last_strides(values.shape, pitch), pitch - channels) if copies else None
    given = lies(values, target)
    affine = [None if part is None else part.to(target) for part in (weight, bias)]
    least = device_layers.LEAST_NORM_VALUES
    device_layers.LEAST_NORM_VALUES = random.choice(
        [64, 500, least]
    )  # so that few values too are the work of several blocks
    try:
        out = device_layers.instance_norm(
            given, *affine, epsilon, slope, None if residual is None else residual.to(target), copy
        )
    finally:
        device_layers.LEAST_NORM_VALUES = least
    assert out.data_ptr() == given.data_ptr()
    if residual is None:  # of a channel that is constant nothing but the bias is left
        left = torch.zeros(()) if bias is None else bias[0]
        assert torch.equal(out[:, 0].cpu(), torch.where(left > 0, left, slope * left).to(dtype).expand(images, *grid))
    # Sums are rounded in another order; what that does grows with how far the mean is from zero.
    deviation = values.std(list(range(2, values.ndim)), keepdim=True, correction=0)
    off = 2e-5 * (1 + values.abs().amax(list(range(2, values.ndim)), keepdim=True) / (deviation + 3e-3))
    scale = 1 if weight is None else weight.abs().view(1, -1, *[1] * len(grid))
    rounded = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    assert bool(((out.cpu().float() - expected).abs() <= off * scale + rounded * (1 + expected.abs())).all())
    if copies:
        assert torch.equal(copy, out)
        if pitch > channels:  # nothing is written between
            assert torch.isnan(whole[..., : pitch - channels]).all()


def check_convolve(target):
    dtype = random.choice([torch.float16, torch.bfloat16])
    lines, dimensions = random.random() < 0.4, random.randint(2, 3)
    channels = random.randint(1, 4) if lines else random.choice([32, 64])
    outputs = random.choice([32, 64])
    bias = None
    if random.random() < 0.3:
        outputs = random.randint(1, 40)
        bias = torch.randn(outputs)
    images, grid = random.randint(1, 2), (*shape(1, 5, dimensions - 1), random.choice([1, 7, 32, 33, 40]))
    kernel = tuple(random.choice([1, 3, 3]) for _ in grid)
    weight = torch.randn(outputs, channels, *kernel).div(math.sqrt(channels * math.prod(kernel))).to(dtype)
    values = torch.randn(images, channels, *grid).to(dtype)
    norm = None
    if not lines and random.random() < 0.6:
        scales = torch.stack([torch.randn(images, channels), torch.rand(images, channels)], 1)
        norm = reference_layers.Norm(
            scales, torch.randn(channels) if random.random() < 0.8 else None, random.choice([1.0, 0.01, 0.0])
        )
    pitch = 1 if lines else channels + 8 * random.choice([0, 0, 1, 4])
    given = values.to(target)
    if not lines:
        whole = torch.full((images, math.prod(grid), pitch), torch.nan, dtype=dtype, device=target)
        given = whole.as_strided(values.shape, last_strides(values.shape, pitch), pitch - channels).copy_(values)
    factors = device_layers.factors_of(weight).to(target)
    expected, _ = reference_layers.convolve(values, weight, factors, norm, bias)
    there = norm and norm._replace(
        scales=norm.scales.to(target), bias=None if norm.bias is None else norm.bias.to(target)
    )
    usual = device_layers.CONVOLVED_TILES, device_layers.CONVOLVED_ROWS
    if target == CPU:
        device_layers.CONVOLVED_ROWS = random.randint(1, 2)
    device_layers.CONVOLVED_TILES = random.choice([1, 3, usual[0]])
    try:
        out, of_parts = device_layers.convolve(
            given, weight.to(target), factors, there, None if bias is None else bias.to(target)
        )
    finally:
        device_layers.CONVOLVED_TILES, device_layers.CONVOLVED_ROWS = usual
    rounded = {torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    assert out.shape == expected.shape
    assert bool(((out.cpu().float() - expected.float()).abs() <= rounded * (1 + 2 * expected.float().abs())).all())
    if bias is not None:
        assert of_parts is None
        assert out.is_contiguous()
        return
    assert out.stride() == last_strides(out.shape, outputs)
    counts, means, squares = of_parts.cpu().double().unbind(2)
    voxels = out.cpu().double().flatten(2)
    assert torch.equal(counts.sum(1), torch.full((images, outputs), voxels.shape[2], dtype=torch.float64))
    mean = (counts * means).sum(1) / counts.sum(1)
    assert torch.allclose(mean, voxels.mean(2), rtol=1e-5, atol=1e-5)
    variance = (squares + counts * (means - mean[:, None]) ** 2).sum(1) / counts.sum(1)
    assert torch.allclose(variance, voxels.var(2, correction=0), rtol=1e-4, atol=1e-6)


def check_convolve_points(target):
    """Logits: of 32 channels, each voxel for itself."""
    dtype, images, outputs = random.choice([torch.float16, torch.bfloat16]), random.randint(1, 2), random.randint(1, 16)
    grid, pitch = (*shape(1, 3, random.randint(1, 2)), random.choice([1, 7, 8, 40])), 32 + 8 * random.choice([0, 1, 4])
    weight = torch.randn(outputs, 32, *[1] * len(grid)).div(6).to(dtype)
    values, bias = torch.randn(images, 32, *grid).to(dtype), torch.randn(outputs)
    norm = there = None
    if random.random() < 0.7:
        scales = torch.stack([torch.randn(images, 32), torch.rand(images, 32)], 1)
        norm_bias = torch.randn(32) if random.random() < 0.7 else None
        norm = reference_layers.Norm(scales, norm_bias, random.choice([1.0, 0.01, 0.0]))
        there = norm._replace(scales=scales.to(target), bias=None if norm_bias is None else norm_bias.to(target))
    whole = torch.full((images, math.prod(grid), pitch), torch.nan, dtype=dtype, device=target)
    given = whole.as_strided(values.shape, last_strides(values.shape, pitch), pitch - 32).copy_(values)
    factors = device_layers.factors_of(weight)
    expected, _ = reference_layers.convolve(values, weight, factors, norm, bias)
    usual = device_layers.POINTS_ROWS, device_layers.POINTS_BLOCKS
    if target == CPU:
        device_layers.POINTS_ROWS = 1
    device_layers.POINTS_BLOCKS = random.choice([1, 3, usual[1]])
    try:
        out, of_parts = device_layers.convolve(given, weight.to(target), factors.to(target), there, bias.to(target))
    finally:
        device_layers.POINTS_ROWS, device_layers.POINTS_BLOCKS = usual
    assert of_parts is None
    assert out.shape == expected.shape
    assert out.is_contiguous()
    rounded = {torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    assert bool(((out.cpu().float() - expected.float()).abs() <= rounded * (1 + 2 * expected.float().abs())).all())


def check_norm_scales(target):
    """Sums of parts of any sizes, as another kernel may write them."""
    images, channels = random.randint(1, 3), random.choice([1, 4, 8, 24, 33])
    counts = torch.randint(1, 40, (random.choice([1, 2, 7, 60, 3000]),))
    counts[1:] *= torch.rand(len(counts) - 1) < 0.9  # some are empty, but not the first
    whole = torch.randn(images, int(counts.sum()), channels) * 10 ** (2 * torch.rand(channels) - 1)
    whole += random.choice([0, 5, -400]) * torch.randn(channels)
    whole[:, :, 0] = 1234.567
    exact = whole.double()
    parts = []
    for part in exact.split(counts.tolist(), 1):
        count, nothing = torch.full((images, channels), part.shape[1]), torch.zeros(images, channels)
        mean = part.mean(1) if part.shape[1] else nothing
        parts.append(torch.stack([count, mean, ((part - mean[:, None]) ** 2).sum(1)], 1))
    sums = torch.stack(parts, 1).float()
    weight, epsilon = torch.randn(channels) if random.random() < 0.8 else None, 1e-5
    variance, mean = torch.var_mean(exact, 1, correction=0)
    scales = device_layers.norm_scales(sums.to(target), None if weight is None else weight.to(target), epsilon).cpu()
    assert torch.equal(scales[:, 0, 0], whole[:, 0, 0])
    deviation = (variance + epsilon).sqrt()
    assert bool(((scales[:, 0] - mean).abs() <= 2 * EPS * mean.abs() + 1e-5 * deviation).all())
    expected = (1 if weight is None else weight) / deviation
    # The means of parts come rounded, which counts where they lie close together but far from zero.
    off = 1e-5 + 2 * EPS * mean.abs() / deviation
    off[:, 0] = 1e-6
    assert bool(((scales[:, 1] - expected).abs() <= off * expected.abs()).all())


def check_spread_blocks(target):
    dtype = random.choice(FLOATS)
    width = 16 // torch.empty(0, dtype=dtype).element_size()
    axes, images, channels = random.randint(2, 3), random.randint(1, 3), width * random.choice([1, 2, 3, 5])
    grid, stride = shape(1, 5, axes), shape(1, 3, axes)
    blocks = torch.randn(images, *grid, *stride, channels).to(dtype)
    finer = tuple(n * s for n, s in zip(grid, stride, strict=True))
    pitch = channels + width * random.choice([0, 1, channels // width])
    expected = reference_layers.spread_blocks(blocks, torch.empty(images, channels, *finer, dtype=dtype))
    # Each voxel of the finer grid, by its place in the coarse one.
    voxel = tuple(random.randrange(n) for n in finer)
    coarse, within = zip(*(divmod(place, step) for place, step in zip(voxel, stride, strict=True)), strict=True)
    assert torch.equal(expected[(slice(None), slice(None), *voxel)], blocks[(slice(None), *coarse, *within)])
    whole = torch.full((images, math.prod(finer), pitch), torch.nan, dtype=dtype, device=target)
    out = whole.as_strided(expected.shape, last_strides(expected.shape, pitch), pitch - channels)
    assert device_layers.spread_blocks(blocks.to(target), out) is out
    assert torch.equal(out.cpu(), expected)
    assert torch.isnan(whole[..., : pitch - channels]).all()  # nothing is written between


def check_upsample(target):
    dtype = random.choice([torch.float16, torch.bfloat16])
    axes, images = random.randint(2, 3), random.randint(1, 2)
    channels, outputs = random.choice([32, 64, 96, 128]), random.choice([32, 32, 64])
    grid, stride = shape(1, 5, axes), random.choice([(2,) * axes, (1, 2, 2)[-axes:], shape(1, 3, axes)])
    values = torch.randn(images, channels, *grid).to(dtype)
    weight = torch.randn(channels, outputs, *stride).div(math.sqrt(channels)).to(dtype)
    bias = torch.randn(outputs) if random.random() < 0.8 else None
    finer = tuple(n * s for n, s in zip(grid, stride, strict=True))
    factors = device_layers.factors_of_upsampling(weight)
    expected = reference_layers.upsample(values, weight, factors, bias, torch.empty(images, outputs, *finer))
    # Each voxel of the finer grid, by its place in the coarse one.
    voxel = tuple(random.randrange(n) for n in finer)
    coarse, within = zip(*(divmod(place, step) for place, step in zip(voxel, stride, strict=True)), strict=True)
    product = values[(..., *coarse)].float() @ weight[(..., *within)].float() + (0 if bias is None else bias)
    assert torch.allclose(expected[(..., *voxel)], product, atol=1e-5)
    last = torch.channels_last if axes == 2 else torch.channels_last_3d
    given = values.to(target).contiguous(memory_format=last)
    pitch = outputs + 8 * random.choice([0, 1, outputs // 8])
    whole = torch.full((images, math.prod(finer), pitch), torch.nan, dtype=dtype, device=target)
    out = whole.as_strided(expected.shape, last_strides(expected.shape, pitch), pitch - outputs)
    usual = device_layers.UPSAMPLED_ROWS, device_layers.LEAST_UPSAMPLE_BLOCKS
    if target == CPU:
        device_layers.UPSAMPLED_ROWS = random.randint(1, 2)
    device_layers.LEAST_UPSAMPLE_BLOCKS = random.choice([1, 5, usual[1]])
    bias = None if bias is None else bias.to(target)
    try:
        made = device_layers.upsample(given, weight.to(target), factors.to(target), bias, out)
    finally:
        device_layers.UPSAMPLED_ROWS, device_layers.LEAST_UPSAMPLE_BLOCKS = usual
    assert made is out
    # Sums in another order, and then rounded once.
    rounded = {torch.float16: 2**-11, torch.bfloat16: 2**-8}[dtype]
    assert bool(((out.cpu().float() - expected).abs() <= 1e-5 + rounded * 1.01 * expected.abs()).all())
    assert torch.isnan(whole[..., : pitch - outputs]).all()  # nothing is written between


def last_strides(size, pitch):
    """Strides of (N, C, *grid) whose voxels are `pitch` numbers apart, channels side by side."""
    steps, step = [], pitch
    for length in reversed(size[2:]):
        steps.append(step)
        step *= length
    return (step, 1, *reversed(steps))
