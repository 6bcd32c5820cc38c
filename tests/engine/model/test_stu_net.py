"""STU-Net, against a plain twin and the numbers of its paper."""

import pytest
import torch
from nnturbo.engine import BackendUnavailable
from nnturbo.engine.backends.channels_last import with_channels_last
from nnturbo.engine.backends.native import NativeBackend
from nnturbo.engine.cli.inspect import describe
from nnturbo.engine.model.folds import inference_network
from torch.nn import functional as F

from tests.engine.model.named_models import (
    LARGER,
    by_formula,
    figures,
    filled,
    model_of,
    plans_of,
    stu_net,
    tiles_of,
    waves_of,
)


def stu_twin(weights, tiles, strides):
    """The paper's network step by step: upsampling before its convolution, as published."""

    def convolve(name, values, stride=1):
        weight = weights[f"{name}.weight"]
        return F.conv3d(values, weight, weights[f"{name}.bias"], stride, [taps // 2 for taps in weight.shape[2:]])

    def norm(name, values):
        return F.instance_norm(values, weight=weights[f"{name}.weight"], bias=weights[f"{name}.bias"])

    def stage(name, values, stride=1):
        block = 0
        while f"{name}.{block}.conv1.weight" in weights:
            at = f"{name}.{block}"
            inner = F.leaky_relu(norm(f"{at}.norm1", convolve(f"{at}.conv1", values, stride)), 0.01)
            inner = norm(f"{at}.norm2", convolve(f"{at}.conv2", inner))
            around = convolve(f"{at}.conv3", values, stride) if f"{at}.conv3.weight" in weights else values
            values, stride, block = F.leaky_relu(inner + around, 0.01), 1, block + 1
        return values

    skips = [stage("conv_blocks_context.0", tiles)]
    for index, stride in enumerate(strides):
        skips.append(stage(f"conv_blocks_context.{index + 1}", skips[-1], stride))
    values = skips.pop()
    for index, stride in enumerate(reversed(strides)):
        finer = F.interpolate(values, scale_factor=[float(factor) for factor in stride], mode="nearest")
        finer = convolve(f"upsample_layers.{index}.conv", finer)
        values = stage(f"conv_blocks_localization.{index}", torch.cat([finer, skips.pop()], 1))
    return convolve("seg_outputs.4", values)


def with_deep_supervision(weights):
    """Weights as trainers save them, with an output for each resolution."""
    widths = [len(weights[f"conv_blocks_localization.{stage}.0.conv1.weight"]) for stage in range(4)]
    more = {f"seg_outputs.{stage}.weight": torch.zeros(3, width, 1, 1, 1) for stage, width in enumerate(widths)}
    return {**weights, **more, **{f"seg_outputs.{stage}.bias": torch.zeros(3) for stage in range(4)}}


@pytest.mark.parametrize(("size", "base", "depth", "millions"), [
    ("small", 16, 1, 14.60), ("base", 32, 1, 58.26), ("large", 64, 2, 440.30), ("huge", 96, 3, 1457.33)
])  # fmt: skip
def test_stu_net_has_the_published_number_of_parameters(size, base, depth, millions):
    """Table 2 of the paper, for 104 classes and background, with the outputs for deep supervision."""
    with torch.device("meta"):
        network = stu_net(base, depth, 105)
    outputs = sum(105 * (base * factor + 1) for factor in (2, 4, 8, 16))
    assert (sum(p.numel() for p in network.parameters()) + outputs) / 1e6 == pytest.approx(millions, abs=0.005)


@pytest.mark.parametrize(("depth", "planned"), [
    (1, [[1, 1, 1], *[[2, 2, 2]] * 5]),
    pytest.param(2, [[1, 1, 1], [1, 2, 2], *[[2, 2, 2]] * 3], marks=pytest.mark.thorough),
    (3, [[1, 1, 1], *[[2, 2, 2]] * 5, [1, 2, 2]]),
])  # fmt: skip
def test_stu_net_computes_what_its_paper_says(tmp_path, depth, planned):
    strides = [tuple(stride) for stride in [*planned[1:6], *[[1, 1, 1]] * 5][:5]]
    weights = filled(stu_net(depth=depth, strides=strides))
    plans = plans_of(LARGER, strides=planned)
    model = model_of(tmp_path / "m", with_deep_supervision(weights), "STUNetTrainer_base_ft", plans)
    tiles = tiles_of(LARGER)
    logits = inference_network(model)(tiles)[0]
    assert torch.allclose(logits, stu_twin(weights, tiles, strides), atol=1e-4)
    assert logits.std() > 0.1


@pytest.mark.parametrize(("depth", "strides", "patch", "expected"), [
    (1, [(2, 2, 2)] * 5, (64, 64, 64), [0.466383, 3.493227, -0.23384, -0.10355, 0.32723]),
    (2, [(1, 2, 2), *[(2, 2, 2)] * 3, (1, 1, 1)], (32, 64, 64), [0.687152, 4.633882, 6.63507, -8.22778, 8.76798]),
])  # fmt: skip
def test_stu_net_is_its_authors(tmp_path, depth, strides, patch, expected):
    """The figures are those of the class STUNet in their repository, uni-medical/STU-Net, with the same weights."""
    weights = by_formula(stu_net(depth=depth, strides=strides))
    plans = plans_of(patch, strides=[[1, 1, 1], *map(list, strides)])
    model = model_of(tmp_path / "m", with_deep_supervision(weights), "STUNetTrainer_base", plans)
    assert figures(inference_network(model)(waves_of(patch))[0]) == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize(
    ("base", "depth"), [*(pytest.param(*size, marks=pytest.mark.thorough) for size in ((16, 2), (32, 1))), (3, 2)]
)
def test_the_kernels_run_stu_net(tmp_path, base, depth):
    model = model_of(tmp_path / "m", filled(stu_net(base, depth)), "STUNetTrainer_small", plans_of(LARGER))
    tiles = tiles_of(LARGER)
    expected = inference_network(model)(tiles)[0]
    runner = NativeBackend().load(model, None, torch.device("cpu"), "fp32")
    for _ in range(2):
        assert torch.allclose(runner(tiles).seg_logits, expected, atol=1e-3 * float(expected.abs().max()))


def test_inspect_names_the_network_that_was_trained(tmp_path):
    model_of(tmp_path / "m", filled(stu_net()), "STUNetTrainer_small", plans_of(LARGER))
    assert dict(describe(tmp_path / "m", None))["network"].startswith("STU-Net, recognised by trainer and class, 0.9")


def test_what_a_gpu_does_with_u_nets_is_not_done_with_others(tmp_path):
    network = inference_network(model_of(tmp_path / "m", filled(stu_net(16)), "STUNetTrainer_small", plans_of(LARGER)))
    with pytest.raises(BackendUnavailable, match="must be one of nnU-Net's U-Nets"):
        with_channels_last(network, torch.float16)
