"""The launched kernel of each operation against its twin, on any device, with random arguments."""

import random

import torch
from nnturbo.kernels import AxisOperator, device, reference

from tests.kernels.layer_checks import (
    check_convolve,
    check_convolve_points,
    check_instance_norm,
    check_norm_scales,
    check_spread_blocks,
    check_upsample,
)
from tests.kernels.random_arguments import (
    ALL_VIEWS,
    CPU,
    EPS,
    FLOATS,
    embedded,
    length,
    random_operator,
    shape,
    shifted,
)


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
