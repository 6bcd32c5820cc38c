"""Networks by the name of their trainer, against originals, other programs' versions, and plain twins."""

import ast
import re
import sys
from importlib import util
from pathlib import Path

import numpy as np
import pytest
import torch
from nnturbo.engine import BackendUnavailable, CheckpointError, Engine, ModelError, Volume
from nnturbo.engine.backends.channels_last import with_channels_last
from nnturbo.engine.backends.native import compiled_kernels, with_native_kernels
from nnturbo.engine.cli.inspect import describe
from nnturbo.engine.model.folder import read_model
from nnturbo.engine.model.folds import inference_network, with_low_convolutions, with_shuffles
from nnturbo.engine.model.mednext import BLOCKS, MedNeXt
from nnturbo.engine.model.named_networks import NAMED, UNCHANGED, named_network
from nnturbo.engine.model.network import build_network, make_network
from nnturbo.engine.model.plans import Architecture, parse_plan
from nnturbo.engine.model.stu_net import StuBlock, StuNet
from torch.nn import functional as F

from tests.engine.factory import dataset_json, plans_json, random_weights, smooth_scan, write_model

PATCH, LARGER = (32, 32, 32), (64, 64, 64)
UNET = "dynamic_network_architectures.architectures.unet.PlainConvUNet"


def plans_of(patch=PATCH, class_name=UNET, stages=6, **arguments):
    """A plan whose class says nothing about the network that was trained."""
    plans = plans_json(patch_size=list(patch), spacing=[2.0, 1.5, 1.5])
    described = plans["configurations"]["3d_fullres"]["architecture"]
    described["network_class_name"] = class_name
    described["arch_kwargs"] |= {"strides": [[1, 1, 1], *[[2, 2, 2]] * (stages - 1)], "n_stages": stages, **arguments}
    return plans


def filled(network, seed=0):
    """Seeded numbers for every weight of a network."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(tensor.shape, generator=generator) * (0.1 if tensor.ndim > 1 else 0.3)
        + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
        for name, tensor in network.state_dict().items()
    }


def model_of(folder, weights, trainer, plans=None):
    checkpoint = {"network_weights": weights, "trainer_name": trainer}
    return read_model(write_model(folder, plans=plans or plans_of(), checkpoint=checkpoint))


def tiles_of(patch=PATCH):
    return torch.randn(2, 1, *patch, generator=torch.Generator().manual_seed(1))


# STU-Net


def stu_net(base=4, depth=1, outputs=3, strides=((2, 2, 2),) * 5):
    widths = [base * factor for factor in (1, 2, 4, 8, 16, 16)]
    return StuNet(1, outputs, widths=widths, depths=[depth] * 6, kernels=[(3, 3, 3)] * 6, strides=strides)


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
    (2, [[1, 1, 1], [1, 2, 2], *[[2, 2, 2]] * 3]),
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


@pytest.mark.parametrize(("base", "depth"), [(16, 2), (32, 1)])
def test_the_kernels_run_stu_net(tmp_path, base, depth):
    network = inference_network(
        model_of(tmp_path / "m", filled(stu_net(base, depth)), "STUNetTrainer_small", plans_of(LARGER))
    )
    tiles, kernels = tiles_of(LARGER)[:1], compiled_kernels()
    with torch.inference_mode():
        expected = network(tiles)[0]
        native = with_native_kernels(network, kernels)
        assert not [module for module in native.modules() if isinstance(module, StuBlock)]
        for _ in range(2):  # memory of the first run is used again
            assert torch.allclose(native(tiles)[0], expected, atol=1e-3 * float(expected.abs().max()))
            kernels.give_back()


def test_inspect_names_the_network_that_was_trained(tmp_path):
    model_of(tmp_path / "m", filled(stu_net()), "STUNetTrainer_small", plans_of(LARGER))
    assert dict(describe(tmp_path / "m", None))["network"].startswith("STU-Net, told by trainer and class, 0.9")


def test_what_a_gpu_does_with_u_nets_is_not_done_with_others(tmp_path):
    network = inference_network(model_of(tmp_path / "m", filled(stu_net(16)), "STUNetTrainer_small", plans_of(LARGER)))
    with pytest.raises(BackendUnavailable, match="must be one of nnU-Net's U-Nets"):
        with_channels_last(network, torch.float16)


def test_the_kernels_refuse_a_stu_net_of_odd_widths(tmp_path):
    model = model_of(tmp_path / "m", filled(stu_net(3)), "STUNetTrainer_small", plans_of(LARGER))
    with pytest.raises(BackendUnavailable, match="whose channels are multiples of"):
        with_native_kernels(inference_network(model), compiled_kernels())


# MedNeXt

SIZES = {
    "S": ([2] * 9, [2] * 9),
    "B": ([2] * 9, [2, 3, 4, 4, 4, 4, 4, 3, 2]),
    "M": ([3, 4, 4, 4, 4, 4, 4, 4, 3], [2, 3, 4, 4, 4, 4, 4, 3, 2]),
    "L": ([3, 4, 8, 8, 8, 8, 8, 4, 3], [3, 4, 8, 8, 8, 8, 8, 4, 3]),
}
"""Blocks and expansions of the paper's table 1."""


def mednext(size="S", kernel=3, outputs=3, width=32, dimensions=3, shifted=False):
    """A MedNeXt; where its grid changes, it expands as what follows, or (`shifted`) as what comes before."""
    counts, expansions = (dict(zip(BLOCKS, of_size, strict=True)) for of_size in SIZES[size])
    for level in range(4):
        finer, coarser = (
            expansions[f"enc_block_{level}"],
            expansions[f"enc_block_{level + 1}" if level < 3 else "bottleneck"],
        )
        expansions[f"down_{level}"] = finer if shifted else coarser
        expansions[f"up_{level}"] = expansions[f"dec_block_{level}"]
    return MedNeXt(1, outputs, width=width, kernel=kernel, counts=counts, expansions=expansions, dimensions=dimensions)


@pytest.mark.parametrize(("size", "kernel", "millions"), [
    ("S", 3, 5.6), ("S", 5, 6.0), ("B", 3, 10.5), ("B", 5, 11.0), ("M", 3, 17.6), ("M", 5, 18.3), ("L", 3, 61.8),
    ("L", 5, 63.0),
])  # fmt: skip
def test_mednext_has_the_published_number_of_parameters(size, kernel, millions):
    with torch.device("meta"):
        network = mednext(size, kernel, 14)
    assert sum(parameter.numel() for parameter in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.055)


def of_monai(name):
    """The name that MONAI has for a weight."""
    for ours, theirs in (
        ("enc_block", "enc_stages"),
        ("down", "down_blocks"),
        ("up", "up_blocks"),
        ("dec_block", "dec_stages"),
    ):
        if match := re.match(rf"{ours}_(\d)\.(.*)", name):
            level = int(match[1]) if ours in ("enc_block", "down") else 3 - int(match[1])
            return f"{theirs}.{level}.{match[2]}"
    return name


@pytest.mark.parametrize(("size", "kernel"), [("S", 3), ("B", 5), ("M", 3)])
def test_mednext_is_monais(tmp_path, size, kernel):
    """Which was written by others; there, blocks that halve the grid expand as those before them."""
    nets = pytest.importorskip("monai.networks.nets.mednext", reason="compares with MONAI's version")
    weights = filled(mednext(size, kernel, width=8, shifted=True))
    counts, expansions = SIZES[size]
    theirs = nets.MedNeXt(
        init_filters=8,
        out_channels=3,
        kernel_size=kernel,
        use_residual_connection=True,
        encoder_expansion_ratio=expansions[:4],
        bottleneck_expansion_ratio=expansions[4],
        decoder_expansion_ratio=expansions[5:],
        blocks_down=counts[:4],
        blocks_bottleneck=counts[4],
        blocks_up=counts[5:],
    )
    renamed = {of_monai(name): tensor for name, tensor in weights.items()}
    theirs.load_state_dict({**theirs.state_dict(), **renamed})
    saved = {**weights, "dummy_tensor": torch.ones(1), "out_1.conv_out.weight": torch.zeros(64, 3, 1, 1, 1)}
    model = model_of(tmp_path / "m", saved, f"nnUNetTrainerV2_MedNeXt_{size}_kernel{kernel}")
    logits = inference_network(model)(tiles_of())[0]
    assert torch.allclose(logits, theirs.eval()(tiles_of()), atol=1e-4)
    assert logits.std() > 0.1


def test_mednext_of_slices(tmp_path):
    network = mednext(width=4, dimensions=2)
    plans = plans_of(patch=(32, 32), class_name="somewhere.MedNeXt")
    plans["configurations"]["3d_fullres"]["spacing"] = [1.0, 1.0]
    model = model_of(tmp_path / "m", filled(network), "nnUNetTrainer", plans)
    assert inference_network(model)(torch.randn(1, 1, 32, 32))[0].shape == (1, 3, 32, 32)
    assert model.remarks == ()


# Primus


@pytest.fixture(scope="module")
def timm():
    """Let timm be imported beside a torchvision of another build, whose operators are not there."""
    found = util.find_spec("torchvision")
    if found is None or util.find_spec("timm") is None:
        pytest.skip("Primus needs timm and torchvision")
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        source = (Path(found.origin).parent / "_meta_registrations.py").read_text()
        library = torch.library.Library("torchvision", "DEF")
        for name in {*re.findall(r'register_meta\("(\w+)"\)', source), *re.findall(r"torchvision::(\w+)", source)}:
            library.define(f"{name}(Tensor x) -> Tensor")
        yield library
    else:
        yield None


@pytest.mark.filterwarnings("ignore")  # of timm and torchvision about themselves
@pytest.mark.parametrize(
    ("trainer", "class_name"),
    [
        ("nnUNet_Primus_S_Trainer", UNET),
        ("nnUNet_PrimusV2S_Trainer", UNET),
        ("_Primus_S_96_BS1", UNET),
        ("nnUNetTrainer", "somewhere.PrimusS"),
    ],
)
def test_primus_is_the_librarys(tmp_path, timm, trainer, class_name):
    from dynamic_network_architectures.architectures import primus

    arguments = {"patch_embed_size": (8, 8, 8), "input_shape": PATCH, "scale_attn_inner": True, "init_values": 0.1}
    if "V2" in trainer:
        theirs = primus.PrimusV2S(1, 3, drop_path_rate=0.2, **arguments)
    else:  # as nnU-Net's trainer builds it
        sizes = {"embed_dim": 396, "num_classes": 3, "eva_depth": 12, "eva_numheads": 6}
        theirs = primus.Primus(1, drop_path_rate=0.2, **sizes, **arguments)
    theirs.load_state_dict(filled(theirs))
    model = model_of(tmp_path / "m", theirs.state_dict(), trainer, plans_of(class_name=class_name))
    network = inference_network(model)
    with torch.inference_mode():
        logits = network(tiles_of())[0]
        assert torch.allclose(logits, theirs.eval()(tiles_of()), atol=1e-5)
    assert logits.std() > 0.01
    low = with_low_convolutions(with_shuffles(network), torch.bfloat16)
    assert {parameter.dtype for parameter in low.networks[0].up_projection.decode[-1].parameters()} == {torch.float32}


@pytest.mark.parametrize("size", "SBML")
@pytest.mark.parametrize("version", ["", "V2", "V3"])
def test_each_primus_has_its_trainer(size, version):
    named = "_".join(["nnUNet", "Primus", *([] if version else [size]), "Trainer"])
    named = f"nnUNet_Primus{version}{size}_Trainer" if version else f"nnUNet_Primus_{size}_Trainer"
    found = named_network(Architecture(class_name=UNET, arguments={}, class_arguments=()), named)
    assert found.name == f"Primus{version} {size}"


def test_what_primus_needs_is_said(tmp_path, monkeypatch):
    from dynamic_network_architectures import architectures

    monkeypatch.setitem(sys.modules, "dynamic_network_architectures.architectures.primus", None)
    monkeypatch.delattr(architectures, "primus", raising=False)
    model = model_of(tmp_path / "m", {}, "nnUNet_Primus_B_Trainer")
    with pytest.raises(ModelError, match="Primus needs timm and einops, which cannot be imported here"):
        inference_network(model)


# Names


def test_a_residual_encoder_by_its_name(tmp_path):
    """For nnU-Net's own plans for residual encoders write what the name stands for."""
    plans = plans_json(patch_size=[32, 32, 32])
    plans["configurations"]["3d_fullres"]["architecture"] = {
        "network_class_name": "ResEncL",
        "arch_kwargs": {},
        "_kw_requires_import": [],
    }
    architecture = parse_plan(plans, dataset_json(), "3d_fullres").architecture
    network = make_network(architecture, 1, 3)
    counts = [len(stage.blocks) for stage in network.encoder.stages]
    assert (counts, network.encoder.output_channels) == ([1, 3, 4, 6, 6, 6], [32, 64, 128, 256, 320, 320])
    # 102 M parameters, as the paper of the residual encoders gives for L.
    assert sum(parameter.numel() for parameter in network.parameters()) / 1e6 == pytest.approx(102, abs=1)


def test_batch_norms_of_a_trainer(tmp_path):
    plans = plans_json()
    described = plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    normed = plans_json()
    normed["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"] = described | {
        "norm_op": "torch.nn.modules.batchnorm.BatchNorm3d"
    }
    weights = random_weights(normed, dataset_json())
    weights = {name: tensor.abs() + 0.1 if name.endswith("var") else tensor for name, tensor in weights.items()}
    model = model_of(tmp_path / "m", weights, "nnUNetTrainerBN", plans)
    expected = build_network(parse_plan(normed, dataset_json(), "3d_fullres"), weights)
    tiles = torch.randn(1, 1, 8, 12, 16)
    assert torch.equal(inference_network(model)(tiles)[0], expected(tiles))


def test_every_trainer_of_nnunet_is_decided():
    found = util.find_spec("nnunetv2")
    if found is None:
        pytest.skip("reads the names of nnU-Net's trainers")
    names = set()
    for path in (Path(found.origin).parent / "training" / "nnUNetTrainer").rglob("*.py"):
        classes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)]
        names |= {node.name for node in classes if "Trainer" in node.name or "Primus" in node.name}
    architecture = Architecture(class_name=UNET, arguments={}, class_arguments=())
    assert len(names) > 70
    undecided = {name for name in names if named_network(architecture, name) is None and not UNCHANGED.match(name)}
    assert undecided == {"nnUNetTrainerBN", "AbstractPrimus"}  # the plan's with batch norms; nobody trains the other


@pytest.mark.parametrize(
    "trainer",
    ["nnUNetTrainerUMambaBot", "nnUNetTrainerSwinUNETR", "nnUNetTrainer_SegMamba", "nnUNetTrainerV2_MedNeXtV2_B"],
)
def test_trainers_of_other_networks_are_refused(tmp_path, trainer):
    """Even where the weights would fit the plan's network."""
    model = model_of(tmp_path / "m", random_weights(plans_json(), dataset_json()), trainer, plans_json())
    with pytest.raises(ModelError, match=r"does not show and nnturbo does not have; give it .*network=") as raised:
        Engine.load(tmp_path / "m", device="cpu")
    assert trainer in str(raised.value)
    assert model.trainer == trainer


@pytest.mark.parametrize("trainer", ["nnUNetTrainerCoTraining", "nnUNetTrainerDA5", "nnUNetTrainerMine", "unknown"])
def test_other_trainers_are_taken_to_train_the_network_of_their_plan(trainer):
    assert named_network(Architecture(class_name=UNET, arguments={}, class_arguments=()), trainer) is None


def test_trainer_and_class_that_mean_two_networks_are_refused():
    architecture = Architecture(class_name="somewhere.MedNeXt", arguments={}, class_arguments=())
    with pytest.raises(ModelError, match="trains STU-Net, but plans.json names the network MedNeXt"):
        named_network(architecture, "STUNetTrainer_base")
    assert named_network(architecture, "nnUNetTrainer").name == "MedNeXt"
    assert {each.name for each in NAMED} >= {"STU-Net", "MedNeXt", "Primus S", "PrimusV2 L"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: {}, r"must be those of STU-Net; 'conv_blocks_context\.0\.0\.conv1\.weight' is missing"),
        (
            lambda weights: {**weights, "more.weight": torch.zeros(1)},
            r"those of STU-Net; 1 unknown, such as more\.weight",
        ),
        (lambda weights: {n: t for n, t in weights.items() if "norm1" not in n}, "those of STU-Net; 22 missing"),
        (
            lambda weights: {**weights, "conv_blocks_context.3.0.conv2.weight": torch.zeros(3)},
            r"1 of another shape, such as conv_blocks_context\.3\.0\.conv2\.weight is \(3,\)",
        ),
        (
            lambda weights: {**weights, "conv_blocks_context.0.0.conv1.weight": torch.zeros(())},
            "STU-Net cannot be built for this plan and these weights",
        ),
    ],
)
def test_weights_of_another_network_are_refused(tmp_path, change, message):
    model = model_of(tmp_path / "m", change(filled(stu_net())), "STUNetTrainer_small")
    with pytest.raises((CheckpointError, ModelError), match=message) as raised:
        inference_network(model)
    assert "\n" not in str(raised.value)


def test_a_patch_that_does_not_fit_is_refused(tmp_path):
    model = model_of(tmp_path / "m", filled(stu_net()), "STUNetTrainer_small", plans_of((72, 64, 64)))
    with pytest.raises(ModelError, match="must be divisible by the strides"):
        inference_network(model)
    model = model_of(tmp_path / "p", {}, "nnUNet_Primus_B_Trainer", plans_of((36, 32, 32)))
    with pytest.raises(ModelError, match=r"must have three axes, each a multiple of 8, the plan has \(36, 32, 32\)"):
        inference_network(model)


def test_a_named_network_labels_a_scan_the_same_with_every_backend(tmp_path):
    pytest.importorskip("openvino", reason="OpenVINO is not installed")
    model_of(tmp_path / "m", filled(mednext(width=8)), "nnUNetTrainer_MedNeXt_S")
    scan = Volume.from_array(smooth_scan((20, 40, 36)), (2.0, 1.5, 1.5), name="scan")
    plain, compiled = (
        Engine.load(tmp_path / "m", device="cpu", mirror=False, backend=backend) for backend in ("torch", "openvino")
    )
    expected = plain.predict(scan).segmentation
    assert len(np.unique(expected)) > 1
    assert (compiled.predict(scan).segmentation != expected).mean() < 0.001
