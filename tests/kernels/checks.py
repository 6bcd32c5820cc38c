"""Random arguments for each operation: the launched kernel against its twin, on any device."""

import math
import random

import torch
from nnturbo.kernels import AxisOperator, device, device_layers, reference, reference_layers

ALL_VIEWS = [(), (0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)]
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
CPU = torch.device("cpu")
EPS = torch.finfo(torch.float32).eps


def random_operator(n_in, n_out, taps, *, positive=False):
    first = torch.sort(torch.randint(0, n_in - taps + 1, (n_out,))).values
    weights = torch.rand(n_out, taps) if positive else torch.randn(n_out, taps)
    if taps == 1:
        weights = torch.ones(n_out, 1)
    return AxisOperator(n_in, first, weights)


def shape(low, high, count=3):
    return tuple(random.randint(low, high) for _ in range(count))


def embedded(values, target):
    """The same values on a device, as part of a larger array whose other elements are not numbers."""
    margins = shape(0, 3, values.ndim - 1)
    whole = torch.full([n + 2 * m for n, m in zip(values.shape, (*margins, 2), strict=True)], torch.nan, device=target)
    part = whole[tuple(slice(m, m + n) for n, m in zip(values.shape, (*margins, 2), strict=True))]
    return part.copy_(values)


def length(least, greatest, *others):
    """A random length, in a third of all calls one of the others: of many threads, or that packs divide."""
    return random.choice(others) if random.random() < 0.33 else random.randint(least, greatest)


def shifted(tensor):
    """The same numbers, contiguous, not always at a multiple of more than one number's size."""
    whole = torch.empty(tensor.numel() + 3, dtype=tensor.dtype, device=tensor.device)
    begin = random.choice([0, 0, 1, 2, 3])
    return whole[begin : begin + tensor.numel()].view(tensor.shape).copy_(tensor)


def check_gather_tiles(target):
    channels, size = random.randint(1, 3), (*shape(1, 9, 2), length(1, 9, 8, 12, 64, 70, 76))
    volume = torch.randn(channels, *shape(1, 12, 2), length(1, 12, 90))
    # At least one voxel of the tile lies in the volume, as in any padded scan.
    corner = tuple(random.randint(1 - n, length - 1) for n, length in zip(size, volume.shape[1:], strict=True))
    views = random.sample(ALL_VIEWS, random.randint(1, 8))
    dtype = random.choice(FLOATS)
    expected = reference.gather_tiles(
        volume, corner, size, views, torch.empty(len(views), channels, *size, dtype=dtype)
    )
    out = shifted(torch.full_like(expected, torch.nan, device=target))
    device.gather_tiles(embedded(volume, target), corner, size, views, out)
    assert torch.equal(out.cpu(), expected)


def check_accumulate_views(target):
    classes, size = random.randint(1, 5), (*shape(1, 9, 2), length(1, 9, 8, 18, 64))
    views = random.sample(ALL_VIEWS, random.randint(1, 8))
    logits = (8 * torch.randn(len(views), classes, *size)).to(random.choice(FLOATS))
    weights = tuple(torch.rand(n) for n in size)
    before = torch.randn(classes, *size)
    expected = before.clone()
    reference.accumulate_views(logits, views, weights, expected)
    out = embedded(before, target)
    device.accumulate_views(shifted(logits.to(target)), views, tuple(weight.to(target) for weight in weights), out)
    assert torch.equal(out.cpu(), expected)


def check_resample_axis(target):
    axis, taps, long = random.choice([-3, -2, -1]), random.randint(1, 26), random.random() < 0.3
    channels, lengths = random.randint(1, 1 if long else 3), list(shape(1, 3))
    lengths[-2 if axis == -1 else -1] = random.randint(1, 40) if long else length(1, 40, 12, 32, 132, 161)
    lengths[axis] = 300 if long else taps + random.randint(0, 30)
    operator = random_operator(lengths[axis], random.choice([random.randint(1, 60), 290 if long else 40]), taps)
    start = random.randrange(operator.n_out)
    stop = random.randint(start + 1, operator.n_out)
    low, high = operator.inputs_of(start, stop)
    offset = random.randint(0, low)
    lengths[axis] = high - offset + random.randint(0, 2)
    dtype = random.choice([torch.float32, torch.int16, torch.uint8])
    data = (100 * torch.randn(channels, *lengths)).abs().to(dtype)
    options = {"rows": (start, stop), "offset": offset}
    if dtype != torch.float32 or random.random() < 0.5:
        options["normalization"] = tuple((20.0, 90.0, 31.4, 15.9) for _ in range(channels))
    expected = reference.resample_axis(data, operator, axis, **options)
    clip = random.choice(["none", "volume", "slice"])
    if clip != "none":
        over = (1, 2, 3) if clip == "volume" else tuple(a for a in (1, 2, 3) if a != 1 + (axis + 1) % 3)
        low, high = 0.7 * expected.amin(over, keepdim=True), 0.7 * expected.amax(over, keepdim=True)
        expected = reference.resample_axis(data, operator, axis, **options, limits=(low, high))
        options["limits"] = low.to(target), high.to(target)
    # As scans come: with any order of axes in memory.
    order = random.choice([(0, 1, 2, 3), (0, 3, 1, 2), (0, 2, 3, 1)])
    inverse = [order.index(i) for i in range(4)]
    stored = data.permute(order).contiguous().to(target).permute(inverse)
    usual, device.RUN_WARPS = device.RUN_WARPS, random.randint(1, 2) if target == CPU else device.RUN_WARPS
    try:
        out = device.resample_axis(shifted(stored) if stored.is_contiguous() else stored, operator, axis, **options)
    finally:
        device.RUN_WARPS = usual
    inputs = reference.normalize(data, options.get("normalization", [(-torch.inf, torch.inf, 0, 1)] * channels))
    scale = inputs.abs().max() * operator.weights.abs().sum(1).max()
    assert out.shape == expected.shape
    assert torch.allclose(out.cpu(), expected, rtol=0, atol=float(4 * EPS * taps * scale))


def check_resample_labels(target):
    classes, lengths = random.randint(1, 6), shape(2, 12)
    operators = tuple(random_operator(n, random.randint(1, 20), random.randint(1, 2), positive=True) for n in lengths)
    start = random.randrange(operators[0].n_out)
    stop = random.randint(start + 1, operators[0].n_out)
    low, high = operators[0].inputs_of(start, stop)
    offset = random.randint(0, low)
    logits = torch.randn(classes, high - offset, *lengths[1:])
    if random.random() < 0.3:  # ties, which the first class wins; exact in any order of additions
        logits = logits.round()
        operators = tuple(AxisOperator(o.n_in, o.first, o.weights.mul(4).round() / 4) for o in operators)
    values = None
    if random.random() < 0.4:
        values = tuple(random.sample(range(1, 250), classes))
    dtype = random.choice([torch.uint8, torch.uint16])
    out_shape = (stop - start, operators[1].n_out, operators[2].n_out)
    options = {"rows": (start, stop), "offset": offset, "values": values}
    expected, expected_confidence = torch.zeros(out_shape, dtype=dtype), torch.zeros(out_shape)
    reference.resample_labels(logits, operators, expected, **options, confidence=expected_confidence)
    order = random.choice([(0, 1, 2), (2, 0, 1), (1, 2, 0)])  # of the scan's axes in memory
    inverse = [order.index(i) for i in range(3)]
    permuted = [out_shape[i] for i in order]
    out = torch.zeros(permuted, dtype=dtype, device=target).permute(inverse)
    confidence = torch.full(permuted, torch.nan, device=target).permute(inverse) if random.random() < 0.5 else None
    device.resample_labels(embedded(logits, target), operators, out, **options, confidence=confidence)
    resampled = logits
    for operator, axis in zip(operators, (-3, -2, -1), strict=True):
        rows = {"rows": (start, stop), "offset": offset} if axis == -3 else {}
        resampled = reference.resample_axis(resampled, operator, axis, **rows)
    # Only where two classes, or a region and 0, are as near as rounding may another label be right.
    rounding = 16 * EPS * float(logits.abs().max())
    if values is not None:
        clear = (resampled.abs() > rounding).all(0)
    else:
        best = resampled.topk(min(2, classes), 0).values
        clear = torch.ones(out_shape, dtype=torch.bool) if classes == 1 else best[0] - best[1] > rounding
    assert torch.equal(out.cpu().int()[clear], expected.int()[clear])
    assert (out.cpu().int() != expected.int()).float().mean() < 0.2
    if confidence is not None:
        assert torch.allclose(confidence.cpu()[clear], expected_confidence[clear], atol=1e-5)


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


CHECKS = {
    "gather_tiles": check_gather_tiles,
    "accumulate_views": check_accumulate_views,
    "instance_norm": check_instance_norm,
    "convolve": check_convolve,
    "convolve_points": check_convolve_points,
    "norm_scales": check_norm_scales,
    "resample_axis": check_resample_axis,
    "resample_labels": check_resample_labels,
    "spread_blocks": check_spread_blocks,
    "upsample": check_upsample,
}

SHARE = {"convolve": 0.1, "convolve_points": 0.5, "resample_axis": 0.5, "upsample": 0.5}
"""Of the checks, of what takes seconds where each thread of a warp is one of the CPU's."""

LAUNCHES = dict.fromkeys(CHECKS, 1) | {"instance_norm": 3}
"""Of kernels, in each check."""


def run(name, count, target, seed=0):
    """Check one operation with as many random arguments."""
    for index in range(count):
        random.seed(f"{name} {seed} {index}")
        torch.manual_seed(random.getrandbits(30))
        try:
            CHECKS[name](target)
        except AssertionError as error:
            raise AssertionError(f"{name}, arguments number {index} of seed {seed}: {error}") from error
