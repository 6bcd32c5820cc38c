"""Stages against nnU-Net's own functions, for pytest-benchmark; each pair is checked to agree before it is timed.

python -m pytest benchmarks --benchmark-only
"""

import numpy as np
import pytest
import torch
from nnturbo.engine.model.plans import parse_plan
from nnturbo.engine.model.resampling_function import parse_resampling
from nnturbo.engine.pipeline.labels import segment
from nnturbo.engine.pipeline.preprocessing import preprocess
from nnturbo.engine.pipeline.resampling import grid_map, resample
from nnturbo.engine.pipeline.tiling import axis_weights
from nnturbo.engine.pipeline.timing import Timings
from nnturbo.engine.pipeline.transfers import Transfers
from nnturbo.engine.pipeline.window import tile_positions
from nnturbo.engine.scans.volume import Volume
from nnturbo.kernels import accumulate_views

from .stages import PLANS, SPLINE, dataset_json, smooth_field, stock_functions

pytestmark = pytest.mark.filterwarnings("ignore")  # nnU-Net's own
SHAPE, NEW_SHAPE = (40, 160, 160), (50, 171, 171)
SPACING, NEW_SPACING = (2.5, 0.78, 0.78), (2.0, 0.732, 0.732)


@pytest.mark.benchmark(group="resampling order 3")
@pytest.mark.parametrize("side", ["stock", "nnturbo"])
def test_resampling(benchmark, side):
    from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape

    data = smooth_field((1, *SHAPE), 0)
    grid = grid_map(parse_resampling("resample_data_or_seg_to_shape", SPLINE), SHAPE, NEW_SHAPE, SPACING, NEW_SPACING)

    def stock():
        return resample_data_or_seg_to_shape(data.numpy(), NEW_SHAPE, SPACING, NEW_SPACING, **SPLINE)

    assert np.abs(resample(data, grid).numpy() - stock()).max() < 1e-5
    benchmark(stock if side == "stock" else lambda: resample(data, grid))


@pytest.mark.benchmark(group="logits to labels")
@pytest.mark.parametrize("side", ["stock", "nnturbo"])
@pytest.mark.parametrize("classes", [3, 20])
def test_labels(benchmark, side, classes):
    plan = parse_plan(PLANS, dataset_json(classes), "3d_fullres")
    scan = np.ones((1, *SHAPE), np.int16)
    case = preprocess(Volume.from_array(scan, SPACING), plan, torch.device("cpu"))
    prepare, finish = stock_functions(classes)
    _, properties = prepare(scan, SPACING)
    logits = smooth_field((classes, *case.shape), 1).half().float()

    def ours():
        return segment([logits], case, plan.labels, timings=Timings(), transfers=Transfers(torch.device("cpu")))[
            0
        ].numpy()

    def stock():
        return finish(logits, properties)

    assert (ours() != stock()).mean() < 1e-4
    benchmark(stock if side == "stock" else ours)


@pytest.mark.benchmark(group="stitching")
@pytest.mark.parametrize("side", ["stock", "nnturbo"])
def test_stitching(benchmark, side):
    """Weighted sums of tiles, with the network's answer given: nnU-Net's fp16 sums and count map against ours."""
    from nnunetv2.inference.sliding_window_prediction import compute_gaussian, compute_steps_for_sliding_window

    patch, shape, classes = (32, 64, 64), (48, 128, 128), 3
    field = smooth_field((classes, *shape), 2)
    steps = compute_steps_for_sliding_window(shape, patch, 0.5)
    assert steps == [tile_positions(n, p, 0.5) for n, p in zip(shape, patch, strict=True)]
    corners = [(z, y, x) for z in range(len(steps[0])) for y in range(len(steps[1])) for x in range(len(steps[2]))]

    def place(corner):
        starts = (steps[axis][index] for axis, index in enumerate(corner))
        return (slice(None), *(slice(s, s + p) for s, p in zip(starts, patch, strict=True)))

    def stock():
        weight = compute_gaussian(patch, value_scaling_factor=10, device=torch.device("cpu"))
        sums, count = torch.zeros(classes, *shape, dtype=torch.half), torch.zeros(shape, dtype=torch.half)
        for corner in corners:
            sums[place(corner)] += field[place(corner)] * weight
            count[place(corner)[1:]] += weight
        return sums / count

    def ours():
        weights = [axis_weights(n, p, s) for n, p, s in zip(shape, patch, steps, strict=True)]
        sums = torch.zeros(classes, *shape)
        for z, y, x in corners:
            target = sums[place((z, y, x))]
            accumulate_views(
                field[place((z, y, x))][None], ((),), (weights[0][z], weights[1][y], weights[2][x]), target
            )
        return sums

    assert (ours() - field).abs().max() < 1e-4
    # Not at the edges: there stock's weights are subnormal fp16 numbers, and its logits off by up to their own size.
    inside = (slice(None), slice(8, -8), slice(16, -16), slice(16, -16))
    assert (stock().float() - field)[inside].abs().max() < 0.02
    benchmark(stock if side == "stock" else ours)
