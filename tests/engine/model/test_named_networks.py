"""Networks by the name of their trainer, against originals, other programs' versions, and plain twins."""

import ast
import re
import sys
from importlib import util
from pathlib import Path

import numpy as np
import pytest
import torch
from nnturbo.engine import CheckpointError, Engine, ModelError, Volume
from nnturbo.engine.backends.rewrites import with_low_convolutions, with_shuffles
from nnturbo.engine.model.folds import inference_network
from nnturbo.engine.model.named_networks import NAMED, UNCHANGED, named_network
from nnturbo.engine.model.network import build_network, make_network
from nnturbo.engine.model.plans import Architecture, parse_plan

from tests.engine.factory import dataset_json, plans_json, random_weights, smooth_scan
from tests.engine.model.named_models import PATCH, UNET, filled, mednext, model_of, plans_of, stu_net, tiles_of


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
        pytest.param("_Primus_S_96_BS1", UNET, marks=pytest.mark.thorough),
        pytest.param("nnUNetTrainer", "somewhere.PrimusS", marks=pytest.mark.thorough),
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


@pytest.mark.thorough
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
