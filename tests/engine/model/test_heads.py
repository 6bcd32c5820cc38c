"""Every head against a plain numpy recomputation, and the network around them."""

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nnturbo.engine import CheckpointError, ModelError
from nnturbo.engine.backends.torch import TorchRunner
from nnturbo.engine.model.classification import ClassificationScheme
from nnturbo.engine.model.folds import InferenceNetwork
from nnturbo.engine.model.heads import FocusPooling, LinearClassifier, focus_map, make_head
from nnturbo.engine.model.network import build_network, make_network
from nnturbo.engine.model.plans import parse_plan

from tests.engine.factory import dataset_json, multi_task, plans_2d, plans_json, random_weights
from tests.engine.model.changed_json import changed, places, values

KINDS = ("gap_linear", "gap_mlp", "attention")
CHANNELS = (4, 6)
GRIDS = {3: ((4, 6, 8), (2, 3, 4)), 2: ((6, 8), (3, 4))}


def scheme_of(**changes):
    return ClassificationScheme(
        **{"kind": "gap_linear", "stages": (0, 1), "class_names": ("a", "b", "c"), "focus_channels": (2,), **changes}
    )


def network_of(plans, dataset=None, seed=0):
    dataset = dataset or dataset_json()
    return build_network(parse_plan(plans, dataset, "3d_fullres"), random_weights(plans, dataset, seed))


def inputs(dimensions, tiles=2):
    generator = torch.Generator().manual_seed(0)
    features = [
        torch.randn(tiles, channels, *grid, generator=generator)
        for channels, grid in zip(CHANNELS, GRIDS[dimensions], strict=True)
    ]
    return features, torch.rand(tiles, 1, *GRIDS[dimensions][0], generator=generator)


def head_of(scheme):
    torch.manual_seed(0)
    head = make_head(scheme, CHANNELS).eval()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return head


def numbers(head):
    return {name: tensor.double().numpy() for name, tensor in head.state_dict().items()}


def normed(values, weight, bias):
    mean, variance = values.mean(1, keepdims=True), values.var(1, keepdims=True)
    return (values - mean) / np.sqrt(variance + 1e-5) * weight + bias


def gelu(values):
    return values * 0.5 * (1 + np.vectorize(math.erf)(values / np.sqrt(2)))


def coarse(focus, factor):
    """Average over blocks of `factor` voxels along every spatial axis."""
    shape = focus.shape[:2]
    for axis in range(2, focus.ndim):
        shape = (*shape, focus.shape[axis] // factor, factor)
    return focus.reshape(shape).mean(tuple(range(3, 2 + 2 * (focus.ndim - 2), 2)))


def dilated(values):
    """Greatest value within two voxels along every axis, one voxel at a time."""
    result = np.empty_like(values)
    for place in np.ndindex(*values.shape[2:]):
        box = tuple(slice(max(i - 2, 0), i + 3) for i in place)
        result[(slice(None), slice(None), *place)] = values[(slice(None), slice(None), *box)].max(
            axis=tuple(range(2, values.ndim))
        )
    return result


@pytest.mark.parametrize("dimensions", [2, 3])
class TestAgainstNumpy:
    def test_gap_linear(self, dimensions):
        features, focus = inputs(dimensions)
        head = head_of(scheme_of())
        means = np.concatenate([f.double().numpy().reshape(2, f.shape[1], -1).mean(2) for f in features], 1)
        weights = numbers(head)
        rows = normed(means, weights["layers.0.weight"], weights["layers.0.bias"])
        expected = rows @ weights["layers.2.weight"].T + weights["layers.2.bias"]
        assert np.allclose(head(features, focus).detach(), expected, atol=1e-5)

    def test_gap_mlp_on_one_stage(self, dimensions):
        features, focus = inputs(dimensions)
        head = head_of(scheme_of(kind="gap_mlp", stages=(1,), hidden=5))
        means = features[1].double().numpy().reshape(2, 6, -1).mean(2)
        w = numbers(head)
        hidden = gelu(
            normed(means, w["layers.0.weight"], w["layers.0.bias"]) @ w["layers.1.weight"].T + w["layers.1.bias"]
        )
        assert np.allclose(
            head(features, focus).detach(), hidden @ w["layers.4.weight"].T + w["layers.4.bias"], atol=1e-5
        )

    def test_attention(self, dimensions):
        features, focus = inputs(dimensions)
        head = head_of(scheme_of(kind="attention", hidden=5, queries=3))
        w = numbers(head)
        pooled = []
        for stage, feature in enumerate(features):
            voxels = feature.double().numpy().reshape(2, feature.shape[1], -1).transpose(0, 2, 1)
            prior = np.log(np.clip(coarse(focus.double().numpy(), 2**stage).reshape(2, -1), 1e-4, None))
            keys = voxels @ w[f"keys.{stage}.weight"].T + w[f"keys.{stage}.bias"]
            values = voxels @ w[f"values.{stage}.weight"].T + w[f"values.{stage}.bias"]
            for tile in range(2):
                for query in range(3):
                    score = keys[tile] @ w["queries"][stage, query] / np.sqrt(5)
                    score = np.exp(score + w["guidance"][stage, query] * prior[tile])
                    pooled.append((tile, (score / score.sum()) @ values[tile]))
        rows = np.stack([np.concatenate([row for of, row in pooled if of == tile]) for tile in range(2)])
        rows = normed(rows, w["layers.0.weight"], w["layers.0.bias"])
        expected = rows @ w["layers.2.weight"].T + w["layers.2.bias"]
        assert np.allclose(head(features, focus).detach(), expected, atol=1e-4)

    def test_focus_pooling_and_the_linear_classifier(self, dimensions):
        features, focus = inputs(dimensions)
        expected = []
        for stage, feature in enumerate(features):
            voxels = feature.double().numpy().reshape(2, feature.shape[1], -1)
            inside = coarse(focus.double().numpy(), 2**stage)
            rim = np.clip(dilated(inside) - inside, 0, None)
            expected.append(voxels.mean(2))
            for shares in (inside, rim):
                shares = shares.reshape(2, 1, -1) + 1e-6
                expected.append((voxels * shares).sum(2) / shares.sum(2))
        expected = np.concatenate(expected, 1)
        pooled = FocusPooling((0, 1))(features, focus)
        assert pooled.shape == (2, 3 * sum(CHANNELS))
        assert np.allclose(pooled, expected, atol=1e-5)
        weight, bias = torch.randn(3, expected.shape[1]), torch.randn(3)
        answers = LinearClassifier((0, 1), weight, bias)(features, focus)
        assert np.allclose(answers, expected @ weight.double().numpy().T + bias.numpy(), atol=1e-4)


def test_the_focus_of_labels_is_the_sum_and_of_regions_the_greatest():
    logits = torch.randn(2, 4, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    values = np.exp(logits.double().numpy())
    shares = values / values.sum(1, keepdims=True)
    got = focus_map(logits, scheme_of(focus_channels=(1, 3)))
    assert np.allclose(got, shares[:, [1, 3]].sum(1, keepdims=True), atol=1e-6)
    sigmoid = 1 / (1 + np.exp(-logits.double().numpy()))
    got = focus_map(logits, scheme_of(focus_channels=(1, 3), regions=True))
    assert np.allclose(got, sigmoid[:, [1, 3]].max(1, keepdims=True), atol=1e-6)


def test_attention_begins_as_averages_over_the_focus_and_over_the_patch():
    features, focus = inputs(3)
    head = make_head(scheme_of(kind="attention", stages=(0,), queries=2), CHANNELS)
    torch.nn.init.zeros_(head.queries)
    head.layers = torch.nn.Identity()
    of_focus, of_patch = head(features, focus).unflatten(1, (2, 64)).unbind(1)
    voxels, shares = features[0].flatten(2), focus.flatten(2).clamp_min(1e-4)
    assert torch.allclose(of_focus, head.values[0]((voxels * shares).sum(2) / shares.sum(2)), atol=1e-5)
    assert torch.allclose(of_patch, head.values[0](voxels.mean(2)), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("plans", [plans_json, plans_2d])
class TestNetwork:
    def test_forward_is_the_segmentation_part_and_the_plain_unets(self, kind, plans):
        network = network_of(multi_task(plans(), kind=kind))
        tiles = torch.randn(2, 1, *((12, 16) if plans is plans_2d else (8, 12, 16)))
        seg_logits, class_logits = network.forward_multitask(tiles)
        assert torch.equal(network(tiles), seg_logits)
        assert class_logits.shape == (2, 3)
        assert len({round(value, 5) for value in class_logits.flatten().tolist()}) == 6  # it looks at the tiles
        weights = {name: t for name, t in network.state_dict().items() if not name.startswith("head.")}
        plain = build_network(parse_plan(plans(), dataset_json(), "3d_fullres"), weights)
        assert torch.equal(plain(tiles), seg_logits)

    def test_class_logits_are_fp32_under_bf16_autocast(self, kind, plans):
        network = network_of(multi_task(plans(), kind=kind))
        tiles = torch.randn(1, 1, *((12, 16) if plans is plans_2d else (8, 12, 16)))
        seen = []
        network.head.register_forward_hook(lambda _, given, out: seen.extend([given[1], out]))
        exact = TorchRunner(InferenceNetwork([network]), torch.device("cpu"), "fp32")(tiles)
        del seen[:]
        rounded = TorchRunner(InferenceNetwork([network]), torch.device("cpu"), "bf16")(tiles)
        assert rounded.seg_logits.dtype == torch.bfloat16
        assert rounded.class_logits.dtype == torch.float32
        assert {tensor.dtype for tensor in seen} == {torch.float32}
        # More digits than bf16 has: the head itself computed in float32.
        assert not torch.equal(rounded.class_logits.bfloat16().float(), rounded.class_logits)
        assert (rounded.class_logits - exact.class_logits).abs().max() < 0.3


def test_names_of_encoder_and_decoder_are_the_plain_unets():
    plain, multi = (
        make_network(parse_plan(plans, dataset_json(), "3d_fullres").architecture, 1, 3)
        for plans in (plans_json(), multi_task(plans_json()))
    )
    shapes = {name: tensor.shape for name, tensor in plain.state_dict().items()}
    of_multi = {name: tensor.shape for name, tensor in multi.state_dict().items()}
    assert {name: shape for name, shape in of_multi.items() if not name.startswith("head.")} == shapes
    multi.to_empty(device="cpu")
    result = multi.load_state_dict(random_weights(plans_json(), dataset_json()), strict=False)
    assert result.unexpected_keys == []
    assert result.missing_keys
    assert all(name.startswith("head.") for name in result.missing_keys)


def test_a_plain_unets_checkpoint_lacks_the_head():
    plan = parse_plan(multi_task(plans_json()), dataset_json(), "3d_fullres")
    with pytest.raises(CheckpointError, match=r"4 missing, such as head\.layers\.0\.weight"):
        build_network(plan, random_weights(plans_json(), dataset_json()))


def test_the_encoder_runs_once_for_both_answers():
    network = network_of(multi_task(plans_json(), kind="attention"))
    calls = {"encoder": 0, "decoder": 0, "head": 0}

    def counter(name):
        def count(*_):
            calls[name] += 1

        return count

    for name in calls:
        getattr(network, name).register_forward_hook(counter(name))
    network.forward_multitask(torch.zeros(1, 1, 8, 12, 16))
    assert calls == {"encoder": 1, "decoder": 1, "head": 1}
    network(torch.zeros(1, 1, 8, 12, 16))
    assert calls == {"encoder": 2, "decoder": 2, "head": 1}


def test_a_detached_head_leaves_the_encoder_alone():
    network = network_of(multi_task(plans_json())).requires_grad_(True)
    tiles = torch.randn(1, 1, 8, 12, 16)
    network.forward_multitask(tiles, detached=True)[1].sum().backward()
    assert all(parameter.grad is None for parameter in network.encoder.parameters())
    assert any(parameter.grad is not None for parameter in network.head.parameters())
    network.forward_multitask(tiles)[1].sum().backward()
    assert any(parameter.grad is not None for parameter in network.encoder.parameters())
    assert all(parameter.grad is None for parameter in network.decoder.seg_layers.parameters())


def test_folds_are_averaged_as_logits():
    networks = [network_of(multi_task(plans_json(), kind="gap_mlp"), seed=seed) for seed in (1, 2, 3)]
    tiles = torch.randn(2, 1, 8, 12, 16)
    averaged = TorchRunner(InferenceNetwork(networks), torch.device("cpu"), "fp32")(tiles)
    single = [network.forward_multitask(tiles) for network in networks]
    assert torch.allclose(averaged.seg_logits, sum(seg for seg, _ in single) / 3, atol=1e-5)
    assert torch.allclose(averaged.class_logits, sum(logits for _, logits in single) / 3, atol=1e-5)
    assert not torch.allclose(averaged.class_logits, single[0][1], atol=1e-2)


def test_a_network_without_a_head_gives_no_class_logits():
    runner = TorchRunner(InferenceNetwork([network_of(plans_json())] * 2), torch.device("cpu"), "fp32")
    assert runner(torch.zeros(1, 1, 8, 12, 16)).class_logits is None


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ({"kind": "magic"}, "kind must be one of gap_linear, gap_mlp, attention"),
        ({"stages": []}, "stages must be different numbers"),
        ({"stages": [0, 0]}, "stages must be different numbers"),
        ({"stages": [-1]}, "stages must be different numbers"),
        ({"stages": [True]}, "stages must be different numbers"),
        ({"class_names": ["one"]}, "class_names must be 2 to"),
        ({"class_names": ["a", "a"]}, "class_names must be 2 to"),
        ({"class_names": [0, 1]}, "class_names must be 2 to"),
        ({"focus_channels": [1.5]}, "focus_channels must be"),
        ({"focus_channels": [3]}, r"focus_channels \[3\] .* must fit the 3 labels"),
        ({"regions": True}, "regions True must fit the 3 labels"),
        ({"regions": 1}, "regions must be true or false"),
        ({"hidden": 0}, "hidden must be 1 to"),
        ({"queries": 10**6}, "queries must be 1 to"),
        ({"dropout": 1}, "dropout must be a number"),
        ({"dropout": "0.5"}, "dropout must be a number"),
        ({"surprise": 1}, "must have some of"),
    ],
)
def test_what_is_wrong_with_a_head_is_named(head, message):
    with pytest.raises(ModelError, match=message):
        parse_plan(multi_task(plans_json(), **head), dataset_json(), "3d_fullres")


def test_a_head_must_be_described_and_complete():
    plans = multi_task(plans_json())
    arguments = plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    for head, message in (
        ("linear", "'head' must be a dict"),
        ({"kind": "gap_linear"}, "missing 3 required"),
        (..., "must have 'head'"),
    ):
        if head is ...:
            del arguments["head"]
        else:
            arguments["head"] = head
        with pytest.raises(ModelError, match=message):
            parse_plan(plans, dataset_json(), "3d_fullres")
    with pytest.raises(ModelError, match="must have some of"):
        ClassificationScheme.parse([])  # type: ignore[arg-type]


def test_a_scheme_is_written_as_it_is_read():
    scheme = scheme_of(kind="attention", hidden=7, regions=True, dropout=0)
    assert ClassificationScheme.parse(scheme.describe()) == scheme


def test_a_head_on_a_stage_that_is_not_there_or_a_foreign_backbone_is_refused():
    plan = parse_plan(multi_task(plans_json(), stages=[0, 2]), dataset_json(), "3d_fullres")
    with pytest.raises(ModelError, match=r"reads stages \[0, 2\], the encoder has 2, from 0"):
        build_network(plan, {})
    plans = multi_task(plans_json())
    plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["backbone"] = "evil.OtherUNet"
    with pytest.raises(ModelError, match="never imported"):
        build_network(parse_plan(plans, dataset_json(), "3d_fullres"), {})


@pytest.mark.parametrize("backbone", ["ResidualEncoderUNet", "ResidualUNet"])
def test_a_head_goes_on_residual_networks(backbone):
    plans = plans_json()
    architecture = plans["configurations"]["3d_fullres"]["architecture"]
    architecture["network_class_name"] = f"dynamic_network_architectures.architectures.unet.{backbone}"
    architecture["arch_kwargs"]["n_blocks_per_stage"] = architecture["arch_kwargs"].pop("n_conv_per_stage")
    plans = multi_task(plans)
    network = build_network(parse_plan(plans, dataset_json(), "3d_fullres"), random_weights(plans, dataset_json()))
    logits, classes = network.forward_multitask(torch.ones(1, 1, 8, 12, 16))
    assert logits.shape == (1, 3, 8, 12, 16)
    assert classes.shape == (1, 3)
    assert torch.isfinite(classes).all()


def test_a_patch_that_does_not_fit_is_refused_for_multi_task_networks_too():
    plan = parse_plan(multi_task(plans_json(patch_size=[9, 12, 16])), dataset_json(), "3d_fullres")
    with pytest.raises(ModelError, match=r"shape \(1, 3, 9, 12, 16\) and \(1, 3\).*divisible by the strides"):
        build_network(plan, {})


OF_THE_HEAD = [
    path for path in places(multi_task(plans_json(), kind="attention")) if {"head", "backbone"} & set(map(str, path))
]


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(OF_THE_HEAD), values | st.just(...))
def test_any_change_to_a_head_gives_a_network_or_a_clear_error(path, value):
    try:
        plan = parse_plan(
            changed(multi_task(plans_json(), kind="attention"), path, value), dataset_json(), "3d_fullres"
        )
        make_network(plan.architecture, plan.input_channels, plan.labels.num_outputs)
    except ModelError as error:
        assert "\n" not in str(error)
