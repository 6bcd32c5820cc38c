"""Heads of other programs against plain torch modules, written as those programs write them."""

import json
import logging

import numpy as np
import pytest
import torch
from nnturbo.engine import BackendUnavailable, Engine, ModelError, Volume
from nnturbo.engine.backends.channels_last import with_channels_last
from nnturbo.engine.model.folder import read_model
from nnturbo.engine.model.folds import inference_network
from nnturbo.engine.model.head_description import HeadDescription
from nnturbo.engine.model.network import build_network
from nnturbo.engine.model.plans import parse_plan
from torch import nn
from torch.nn import functional as F

from tests.engine.factory import (
    dataset_json,
    multi_task,
    plans_2d,
    plans_json,
    pooled_classifier,
    random_weights,
    smooth_scan,
    write_model,
)
from tests.engine.model.changed_json import changed
from tests.engine.model.head_twins import (
    CHANNELS,
    CLASSES,
    TWINS,
    Gap,
    MaskedPowers,
    deep_plans,
    fork,
    seeded,
    tiles_of,
    twin_answer,
)


@pytest.mark.parametrize("kind", TWINS)
def test_a_family_is_told_by_its_keys_and_answers_as_its_twin(tmp_path, caplog, kind):
    head = seeded(TWINS[kind])
    with caplog.at_level(logging.WARNING, logger="nnturbo"):
        model = read_model(fork(tmp_path / "m", head))
    assert "was recognised by its keys" in caplog.text
    assert "nothing uses" not in caplog.text
    assert model.plan.classification.class_names == ("0", "1", "2")
    assert model.plan.classification.focus_channels == (1, 2)
    tiles = tiles_of(model)
    seg_logits, class_logits = inference_network(model)(tiles)
    expected = twin_answer(model, head, tiles)
    assert torch.equal(seg_logits, expected[0])
    assert torch.allclose(class_logits, expected[1], atol=1e-5)
    assert class_logits.std() > 1e-3


def test_where_the_mask_is_nearly_empty_the_average_counts(tmp_path):
    head = seeded(MaskedPowers)

    def background_only(unet):
        unet = {name: tensor.clone() for name, tensor in unet.items()}
        for name, tensor in unet.items():
            if name.endswith("seg_layers.2.bias"):
                tensor[0] = 1e4
        return unet

    model = read_model(fork(tmp_path / "m", head, background_only))
    tiles = tiles_of(model)
    _, class_logits = inference_network(model)(tiles)
    average = inference_network(model).networks[0].encoder(tiles)[-1].mean((2, 3, 4))
    assert torch.allclose(class_logits, head.classification_head(average), atol=1e-5)


def inside(prefix):
    return lambda unet: {prefix + name: tensor for name, tensor in unet.items()}


def aliased(unet):
    """Parts under further names, as modules that are registered twice; one of them saved as a copy."""
    decoder = {n: t for n, t in unet.items() if n.startswith("decoder.")}
    return {
        **unet,
        **{n.replace("decoder.", "segmentation_head.", 1): t.clone() for n, t in decoder.items()},
        **{f"seg_network.{n}": t for n, t in unet.items()},
    }


@pytest.mark.parametrize("rename", [inside("segmentation_net."), inside("net.unet."), aliased])
def test_the_u_net_is_found_under_other_names(tmp_path, caplog, rename):
    head = seeded(Gap)
    with caplog.at_level(logging.WARNING, logger="nnturbo"):
        model = read_model(fork(tmp_path / "m", head, rename))
    assert "nothing uses" not in caplog.text
    tiles = tiles_of(model)
    for one, other in zip(inference_network(model)(tiles), twin_answer(model, head, tiles), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


class Attention(nn.Module):
    """A head that no description can say."""

    def __init__(self):
        super().__init__()
        self.classification_pool = nn.MultiheadAttention(CHANNELS[-1], 4)
        self.classification_head = nn.Sequential(nn.LayerNorm(CHANNELS[-1]), nn.Linear(CHANNELS[-1], CLASSES))


def test_with_an_unknown_head_the_segmentation_runs_and_the_keys_are_named(tmp_path, caplog):
    folder = fork(tmp_path / "m", seeded(Attention), inside("seg_network."))
    with caplog.at_level(logging.WARNING, logger="nnturbo"):
        model = read_model(folder)
    assert (
        "has 8 weights that the segmentation does not need and nothing uses: classification_pool.in_proj" in caplog.text
    )
    assert "describe it in classification_head.json (docs/networks.md)" in caplog.text
    tiles = tiles_of(model)
    (seg_logits,) = inference_network(model)(tiles)
    plain = parse_plan(deep_plans(), dataset_json(), "3d_fullres")
    assert torch.equal(seg_logits, build_network(plain, random_weights(deep_plans(), dataset_json()))(tiles))
    engine = Engine.load(folder, device="cpu", mirror=False)
    assert any("classification_pool.in_proj_weight" in remark for remark in engine.provenance[0].plan_remarks)


def test_names_of_a_family_with_other_shapes_are_an_unknown_head(tmp_path, caplog):
    wrong = {"classification_head.2.weight": torch.zeros(3, 11), "classification_head.2.bias": torch.zeros(3)}
    with caplog.at_level(logging.WARNING, logger="nnturbo"):
        model = read_model(fork(tmp_path / "m", None, lambda unet: {**unet, **wrong}))
    assert model.plan.classification is None
    assert "nothing uses: classification_head.2.weight, classification_head.2.bias" in caplog.text


def test_unknown_weights_inside_the_u_net_are_refused(tmp_path):
    """They change the segmentation, which is not to be had without them."""
    model = read_model(fork(tmp_path / "m", None, lambda unet: {**unet, "encoder.gate.weight": torch.zeros(3)}))
    with pytest.raises(ModelError, match=r"1 unknown, such as encoder\.gate\.weight"):
        inference_network(model)


class Described(nn.Module):
    """Average, maximum, powers and masked average of encoder and decoder, with each norm and activation."""

    def __init__(self):
        super().__init__()
        self.skip = nn.Conv3d(CHANNELS[0], 4, 1)
        self.norm = nn.GroupNorm(2, 4)
        self.maps = nn.InstanceNorm3d(CHANNELS[1], affine=True)
        self.power = nn.Parameter(torch.tensor([2.0]))
        self.first = nn.Linear(4 + 2 * CHANNELS[1] + CHANNELS[2] + CHANNELS[3], 6)
        self.second = nn.LayerNorm(6)
        self.last = nn.Linear(6, 2, bias=False)

    def forward(self, features, decoded, seg_logits):
        mask = F.adaptive_avg_pool3d(torch.softmax(seg_logits, 1)[:, [2]], features[1].shape[2:])
        parts = [
            F.leaky_relu(self.norm(self.skip(decoded[0])), 0.2).amax((2, 3, 4)),
            F.silu(self.maps(features[1])).mean((2, 3, 4)),
            (features[1] * mask).sum((2, 3, 4)) / mask.sum((2, 3, 4)).clamp_min(1e-6),
            torch.tanh(features[2]).clamp_min(1e-6).pow(self.power).mean((2, 3, 4)).pow(1 / self.power),
            F.adaptive_max_pool3d(features[-1], 1).flatten(1),
        ]
        return self.last(F.relu(self.second(self.first(torch.cat(parts, 1)))))


DESCRIPTION = {
    "class_names": ["low", "high"],
    "focus_channels": [2],
    "taps": [
        {
            "decoder": 0,
            "layers": [
                {"kind": "conv", "key": "skip"},
                {"kind": "group_norm", "key": "norm", "groups": 2},
                {"kind": "leaky_relu", "slope": 0.2},
                {"kind": "pool", "how": "max"},
            ],
        },
        {
            "encoder": 1,
            "layers": [{"kind": "instance_norm", "key": "maps"}, {"kind": "silu"}, {"kind": "pool"}],
        },
        {"encoder": 1, "layers": [{"kind": "pool", "how": "masked_average"}]},
        {"encoder": -2, "layers": [{"kind": "tanh"}, {"kind": "pool", "how": "gem", "key": "power"}]},
        {"encoder": -1, "layers": [{"kind": "pool", "how": "max", "grid": [1, 1, 1]}, {"kind": "flatten"}]},
    ],
    "layers": [
        {"kind": "linear", "key": "first"},
        {"kind": "layer_norm", "key": "second"},
        {"kind": "relu"},
        {"kind": "dropout"},
        {"kind": "linear", "key": "last"},
    ],
}


@pytest.fixture(scope="module")
def described(tmp_path_factory):
    folder = fork(tmp_path_factory.mktemp("described") / "m", seeded(Described), folds=("0", "1"))
    (folder / "classification_head.json").write_text(json.dumps(DESCRIPTION))
    return folder


def test_a_described_head_answers_as_its_twin(described):
    model, head = read_model(described, folds=[0]), seeded(Described)
    tiles = tiles_of(model)
    seg_logits, class_logits = inference_network(model)(tiles)
    plain = parse_plan(deep_plans(), dataset_json(), "3d_fullres")
    unet = build_network(plain, random_weights(deep_plans(), dataset_json()))
    features, decoded = unet.encoder(tiles), []
    values = features[-1]
    for index in range(3):
        values = torch.cat([unet.decoder.transpconvs[index](values), features[2 - index]], 1)
        values = unet.decoder.stages[index](values)
        decoded.insert(0, values)
    assert torch.allclose(seg_logits, unet.decoder(features), atol=1e-5)
    assert torch.allclose(class_logits, head(features, decoded, seg_logits), atol=1e-5)
    assert class_logits.std() > 1e-3


def test_the_answer_for_a_case_is_weighted_over_tiles_views_and_folds(described):
    """As of nnturbo's own heads: the mean over tiles, weighted by the focus, of the mean over views and folds."""
    scan = Volume.from_array(smooth_scan((24, 20, 16)), (2.0, 1.5, 1.5), name="scan")
    engine = Engine.load(described, device="cpu")
    answer = engine.predict(scan).classification
    assert answer.class_names == ("low", "high")
    network = inference_network(read_model(described))
    seen = []

    def runner(tiles):
        seen.append(network(tiles))
        return inner(tiles)

    inner, engine.segmenter.runner = engine.segmenter.runner, runner
    engine.predict(scan)
    shown = torch.stack([torch.softmax(logits, 1)[:, 2].mean() for logits, _ in seen]).reshape(-1, 8).mean(1)
    logits = torch.cat([logits for _, logits in seen]).reshape(-1, 8, 2).mean(1)
    assert len(shown) > 1
    assert answer.logits == pytest.approx(((shown[:, None] * logits).sum(0) / shown.sum()).tolist(), abs=1e-4)


@pytest.mark.parametrize("backend", ["torchscript", pytest.param("openvino", marks=pytest.mark.thorough), "native"])
def test_backends_run_heads_of_families(tmp_path, backend):
    if backend == "openvino":
        pytest.importorskip("openvino", reason="OpenVINO is not installed")
    engine = Engine.load(fork(tmp_path / "m", seeded(MaskedPowers), plans=None), device="cpu", backend="torch")
    tiles = tiles_of(engine.model)
    other = Engine.load(tmp_path / "m", device="cpu", backend=backend)
    for one, two in zip(engine.segmenter.runner(tiles), other.segmenter.runner(tiles), strict=True):
        assert torch.allclose(one, two, atol=2e-3)


def test_the_kernels_give_a_head_features_of_the_decoder_and_a_bundle_keeps_both(tmp_path, described):
    from nnturbo.engine import build

    engine = Engine.load(described, device="cpu", backend="torch")
    bundle = build(described, tmp_path / "bundle", device="cpu", backend="native")
    tiles = tiles_of(engine.model)
    for other in (Engine.load(described, device="cpu", backend="native"), Engine.load(bundle, device="cpu")):
        for one, two in zip(engine.segmenter.runner(tiles), other.segmenter.runner(tiles), strict=True):
            assert torch.allclose(one, two, atol=2e-3)


def test_layers_of_a_network_with_taps_on_its_decoder_are_not_replaced_on_a_gpu(described):
    with pytest.raises(BackendUnavailable, match="must be one of nnU-Net's U-Nets"):
        with_channels_last(inference_network(read_model(described)), torch.float16)


def test_a_bundle_keeps_the_head(tmp_path):
    from nnturbo.engine import build

    folder = fork(tmp_path / "m", seeded(Gap))
    build(folder, tmp_path / "bundle", backend="torch", device="cpu")
    scan = Volume.from_array(smooth_scan((18, 20, 16)), (2.0, 1.5, 1.5), name="scan")
    one, other = (Engine.load(path, device="cpu").predict(scan) for path in (folder, tmp_path / "bundle"))
    assert np.array_equal(one.segmentation, other.segmentation)
    assert one.classification == other.classification


def test_weights_beside_those_of_the_network_can_be_described(tmp_path):
    """As mikami520 keeps them."""
    layer = nn.Linear(CHANNELS[-1], CLASSES)
    folder = fork(tmp_path / "m", None, class_decoder_weights={"fc." + n: t for n, t in layer.state_dict().items()})
    assert read_model(folder).plan.classification is None
    description = {
        "class_names": ["a", "b", "c"],
        "focus_channels": [2],
        "taps": [{"encoder": -1, "layers": [{"kind": "pool", "how": "max"}]}],
        "layers": [{"kind": "linear", "key": "class_decoder.fc"}],
    }
    (folder / "classification_head.json").write_text(json.dumps(description))
    model = read_model(folder)
    tiles = tiles_of(model)
    network = inference_network(model)
    expected = layer(network.networks[0].encoder(tiles)[-1].amax((2, 3, 4)))
    assert torch.allclose(network(tiles)[1], expected, atol=1e-6)


def test_slices_have_heads_too(tmp_path):
    layer = nn.Linear(8, 2)
    plans = plans_2d()
    weights = {**random_weights(plans, dataset_json()), **{f"classifier.{n}": t for n, t in layer.state_dict().items()}}
    model = read_model(write_model(tmp_path / "m", plans=plans, checkpoint={"network_weights": weights}))
    tiles = torch.randn(2, 1, 12, 16)
    network = inference_network(model)
    assert torch.allclose(network(tiles)[1], layer(network.networks[0].encoder(tiles)[-1].mean((2, 3))), atol=1e-6)


def test_a_classifier_that_was_fitted_afterwards_takes_its_place(tmp_path):
    weights = {**random_weights(plans_json(), dataset_json()), "cls_head.weight": torch.zeros(3, 8)}
    fitted = {"pooled_classifier": pooled_classifier()}
    model = read_model(write_model(tmp_path / "m", checkpoint={"network_weights": weights, **fitted}))
    _, class_logits = inference_network(model)(torch.randn(1, 1, 8, 12, 16))
    assert class_logits.abs().max() > 0.1


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            ("layers", 0, "key"),
            "third",
            r"names third\.weight, which the checkpoint must have; keys that are not the U-Net.s: power",
        ),
        (("taps", 3, "layers", 1, "key"), "exponent", "names exponent, which the checkpoint must have"),
        (("taps", 3, "layers", 1, "key"), "first.bias", r"first\.bias must be one number, it has the shape \(6,\)"),
        (("taps", 0, "layers", 0, "key"), "first", r"first\.weight must have 5 axes, it has the shape \(6, 40\)"),
        (("taps", 0, "layers", 1), {"kind": "batch_norm", "key": "norm"}, r"names norm\.running_mean"),
        (("layers", 1, "key"), "nowhere", r"names nowhere\.weight"),
        (("layers", 4), {"kind": "relu"}, r"must turn features of 4, 8, 8, 12, 4, 8, 8 channels into .* \(1, 6\)"),
        (("taps", 1, "encoder"), 0, "must turn features of"),
        (("taps", 1, "encoder"), 4, "the encoder has stages 0 to 3, a tap names 4"),
        (("taps", 0, "decoder"), 3, "the decoder has stages 0 to 2, a tap names 3"),
        (("taps", 0, "encoder"), 0, "a tap must have the number of a stage under encoder or decoder"),
        (("taps", 0, "decoder"), "0", "a tap must have the number of a stage"),
        (("taps",), [], "taps must be a list of 1 to 64"),
        (("layers",), {}, "layers must be a list of 0 to 64"),
        (("layers", 0, "kind"), "lstm", "a layer must have a kind of linear, conv, .* got"),
        (("layers", 0), "linear", "a layer must have a kind of"),
        (("layers", 2, "slope"), 0.1, "layer relu may have nothing, got 'slope'"),
        (("layers", 0, "key"), ..., "layer linear: key must be a text"),
        (("taps", 0, "layers", 1, "groups"), 0, "layer group_norm: groups must be 1"),
        (("taps", 0, "layers", 0, "padding"), -1, "layer conv: padding must be 0 to 64"),
        (("taps", 0, "layers", 2, "slope"), "x", "slope, p, least_sum and least_share must be numbers"),
        (("taps", 0, "layers", 3, "how"), "median", "how must be one of average, max"),
        (("taps", 2, "layers", 0, "grid"), [1, 1, 1], "grid must be left out for gem and masks"),
        (("taps", 4, "layers", 0, "grid"), [0, 1, 1], "grid must be 2 or 3 numbers"),
        (("taps", 3, "layers", 1, "p_range"), [1], "p_range must be two numbers"),
        (("class_names",), ["a"], "class_names must be 2 to 1024 different texts"),
        (("class_names",), ["a", "b", "c"], r"into class logits \(1, 3\), they give \(1, 2\)"),
        (("focus_channels",), [3], "must name channels 0 to 2 of dataset.json's labels, got 3"),
        (("focus_channels",), [], "focus_channels must be a list of different numbers"),
        (("mask",), {"channels": [7]}, "got 7"),
        (("mask",), {"combine": "min"}, "combine must be one of sum, max, got 'min'"),
        (("mask",), [1], "mask may have channels and combine"),
        (("taps_",), 1, "must have taps, layers, class_names, focus_channels, and may have mask; it has"),
    ],
)
def test_what_is_wrong_with_a_description_is_named(described, tmp_path, path, value, message):
    folder = tmp_path / "m"
    folder.mkdir()
    for name in ("plans.json", "dataset.json", "fold_0"):
        (folder / name).symlink_to(described / name)
    (folder / "classification_head.json").write_text(json.dumps(changed(DESCRIPTION, path, value)))
    with pytest.raises(ModelError, match=message) as raised:
        inference_network(read_model(folder))
    assert "\n" not in str(raised.value)


def test_a_description_can_lie_in_the_plans_but_not_beside_nnturbos_own_head():
    plans = {**deep_plans(), "classification_head": DESCRIPTION}
    assert parse_plan(plans, dataset_json(), "3d_fullres").head == HeadDescription.from_json(DESCRIPTION)
    own = {**multi_task(plans_json()), "classification_head": DESCRIPTION}
    with pytest.raises(ModelError, match="must be left out for nnturbo's own multi-task network"):
        parse_plan(own, dataset_json(), "3d_fullres")
    with pytest.raises(ModelError, match="kind must be one of gap_linear, gap_mlp, attention, got 'described'"):
        parse_plan(multi_task(plans_json(), kind="described"), dataset_json(), "3d_fullres")
