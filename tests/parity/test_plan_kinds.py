"""Kinds of plan that are in use, odd ones among them: network and labels are those of nnU-Net's own code, or none."""

import copy
import logging
import zlib

import numpy as np
import pytest
import torch
from nnturbo.engine.errors import CheckpointError, ModelError
from nnturbo.engine.model.architecture import Architecture
from nnturbo.engine.model.folder import read_model
from nnturbo.engine.model.labels import parse_labels
from nnturbo.engine.model.network import build_network, make_network
from nnturbo.engine.model.plan_classes import remarks_on
from nnturbo.engine.model.plans import parse_plan
from nnturbo.engine.model.resampling_function import parse_resampling
from nnturbo.engine.pipeline.label_maps import resample_label_map
from scipy.ndimage import gaussian_filter

from tests.engine.factory import dataset_json, plans_json, random_weights, write_model

pytest.importorskip("nnunetv2", reason="compares with nnU-Net itself, which is not installed")

from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape
from nnunetv2.preprocessing.resampling.resample_torch import resample_torch_fornnunet
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from tests.parity.stock import quiet

UNET = "dynamic_network_architectures.architectures.unet"
BLOCKS = "dynamic_network_architectures.building_blocks.residual"
RESIDUAL = {"n_conv_per_stage": ..., "n_blocks_per_stage": [2, 3]}
NO_AFFINE = {"eps": 1e-5, "affine": False}

NETWORKS = {
    "planner's own": {},
    "residual": {"class": f"{UNET}.ResidualEncoderUNet", **RESIDUAL},
    "residual both ways": {"class": f"{UNET}.ResidualUNet", **RESIDUAL},
    "blocks as one number": {"class": f"{UNET}.ResidualEncoderUNet", "n_conv_per_stage": ..., "n_blocks_per_stage": 2},
    "bottleneck": {
        "class": f"{UNET}.ResidualEncoderUNet",
        "block": f"{BLOCKS}.BottleneckD",
        "bottleneck_channels": [2, 4],
        "features_per_stage": [8, 16],
        "import": ("conv_op", "norm_op", "dropout_op", "nonlin", "block"),
        **RESIDUAL,
    },
    "stem": {"class": f"{UNET}.ResidualEncoderUNet", "stem_channels": 6, **RESIDUAL},
    "anisotropic kernels": {"kernel_sizes": [[1, 3, 3], [3, 5, 1]], "strides": [[1, 1, 1], [1, 2, 2]]},
    "kernels as one number": {"kernel_sizes": 3, "strides": [1, 2]},
    "more convolutions": {"n_conv_per_stage": [2, 3], "n_conv_per_stage_decoder": [2]},
    "no bias": {"conv_bias": False},
    "norm without affine": {"norm_op_kwargs": NO_AFFINE},
    "norm by defaults": {"norm_op_kwargs": None},
    "norm by an empty list of arguments": {"norm_op_kwargs": {}},
    "no norm": {"norm_op": None, "norm_op_kwargs": None},
    "batch norm": {"norm_op": "torch.nn.BatchNorm3d"},
    "running instance norm": {"norm_op_kwargs": {"affine": True, "track_running_stats": True}},
    "dropout": {"dropout_op": "torch.nn.modules.dropout.Dropout3d", "dropout_op_kwargs": {"p": 0.5}},
    "dropout of a path that is not there": {"dropout_op": "torch.nn.modules.drop.Dropout3d"},
    "deep supervision as in training": {"deep_supervision": True},
    "activation before norm": {"nonlin_first": True},
    "ReLU": {"nonlin": "torch.nn.ReLU"},
    "LeakyReLU by its file": {"nonlin": "torch.nn.modules.activation.LeakyReLU"},
    "steeper LeakyReLU": {"nonlin_kwargs": {"negative_slope": 0.2, "inplace": True}},
    "GELU": {"nonlin": "torch.nn.GELU", "nonlin_kwargs": None},
    "SiLU": {"nonlin": "torch.nn.modules.SiLU", "nonlin_kwargs": {}},
    "PReLU": {"nonlin": "torch.nn.PReLU", "nonlin_kwargs": {}},
    "no activation": {"nonlin": None},
    "no activation between blocks": {"class": f"{UNET}.ResidualEncoderUNet", "nonlin": None, **RESIDUAL},
    "activation of a path that is not there": {"nonlin": "torch.nn.modules.activations.LeakyReLU"},
    "activation of two letters more": {"nonlin": "torch.nn.LeakyReLUss"},
    "dots too many": {"nonlin": "torch.nn..LeakyReLU"},
    "a name alone": {"nonlin": "LeakyReLU"},
    "norm of a path that is not there": {
        "norm_op": "torch.nn.modules.batchnorm.InstanceNorm3d",
        "norm_op_kwargs": NO_AFFINE,
    },
    "misspelt norm": {"norm_op": "torch.nn.modules.batchnorm.BatchNorm"},
    "misspelt convolution": {"conv_op": "torch.nn.modules.conv.Conv4d"},
    "convolution of a path that is not there": {"conv_op": "torch.nn.modules.convolution.Conv3d"},
    "a function": {"nonlin": "torch.nn.functional.relu"},
    "no class": {"nonlin": "torch.nn.modules.conv.Tensor"},
    "a number": {"nonlin": 3},
    "a block of a path that is not there": {
        "class": f"{UNET}.ResidualEncoderUNet",
        "block": f"{BLOCKS}s.BasicBlockD",
        "import": ("conv_op", "norm_op", "dropout_op", "nonlin", "block"),
        **RESIDUAL,
    },
    "an entry that is not listed": {"import": ("conv_op", "norm_op")},
    "a listed entry that is not there": {"import": ("conv_op", "norm_op", "dropout_op", "nonlin", "block")},
    "dropout without arguments": {"dropout_op": "torch.nn.Dropout3d", "dropout_op_kwargs": None},
    "an argument it does not take": {"pool": "avg"},
}
"""Changes to a plan's `arch_kwargs`; `class` and `import` stand for the entries beside them, `...` removes one."""

WITHOUT = {
    "dropout of a path that is not there": "dropout_op",
    "activation of a path that is not there": "nonlin",
    "activation of two letters more": "nonlin",
    "norm of a path that is not there": "norm_op",
    "misspelt norm": "norm_op",
}
"""What nnU-Net's network lacks, because a path leads nowhere; nnturbo says so."""

STRICTER = ("dots too many", "a name alone")
"""What nnU-Net builds a network of, and nnturbo does not: nobody means that."""


def architecture(changes: dict) -> Architecture:
    described = plans_json()["configurations"]["3d_fullres"]["architecture"]
    arguments = described["arch_kwargs"] | {k: v for k, v in changes.items() if k not in ("class", "import")}
    return Architecture(
        class_name=changes.get("class", described["network_class_name"]),
        arguments={key: value for key, value in arguments.items() if value is not ...},
        class_arguments=tuple(changes.get("import", described["_kw_requires_import"])),
    )


def stock_network(described: Architecture) -> torch.nn.Module | Exception:
    arguments, seed = copy.deepcopy(dict(described.arguments)), zlib.crc32(repr(described).encode())
    try:
        with quiet(), torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            return get_network_from_plans(
                described.class_name, arguments, described.class_arguments, 1, 3, deep_supervision=False
            ).eval()
    except Exception as error:
        return error


@pytest.mark.parametrize("kind", NETWORKS)
def test_networks_are_nnunets_or_are_refused(kind: str):
    described = architecture(NETWORKS[kind])
    theirs = stock_network(described)
    if isinstance(theirs, Exception) or kind in STRICTER:
        with pytest.raises(ModelError):
            make_network(described, 1, 3)
        return
    ours = make_network(described, 1, 3).eval()
    ours.load_state_dict(theirs.state_dict(), assign=True, strict=True)
    tiles = torch.randn(1, 1, 8, 12, 16, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert torch.equal(ours(tiles), theirs(tiles))
    lacks = WITHOUT.get(kind)
    assert [f"plans.json: {lacks} names " in remark for remark in remarks_on(described)] == [True] * (lacks is not None)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("misspelt convolution", r"conv_op names 'torch\.nn\.modules\.conv\.Conv4d', which does not exist$"),
        ("convolution of a path that is not there", r"conv_op names .* does not exist \(torch has torch\.nn\.Conv3d\)"),
        ("a function", "nonlin must name a module of torch.nn .* is not"),
        ("a name alone", "nonlin must name a module of torch.nn .* got 'LeakyReLU'"),
        ("an entry that is not listed", "_kw_requires_import must list 'nonlin'"),
        ("a listed entry that is not there", "lists 'block', which must be among arch_kwargs"),
    ],
)
def test_a_refusal_names_the_entry(kind: str, message: str):
    with pytest.raises(ModelError, match=message):
        make_network(architecture(NETWORKS[kind]), 1, 3)


def plans_with(changes: dict) -> dict:
    plans, described = plans_json(), architecture(changes)
    plans["configurations"]["3d_fullres"]["architecture"] = {
        "network_class_name": described.class_name,
        "arch_kwargs": dict(described.arguments),
        "_kw_requires_import": list(described.class_arguments),
    }
    return plans


def test_what_a_network_lacks_is_logged_and_named_where_weights_do_not_fit(tmp_path, caplog):
    weights = random_weights(plans_json(), dataset_json())
    plans = plans_with(NETWORKS["misspelt norm"])
    with caplog.at_level(logging.WARNING, logger="nnturbo"):
        model = read_model(write_model(tmp_path / "m", plans=plans, checkpoint={"network_weights": weights}))
    assert "norm_op names torch.nn.modules.batchnorm.BatchNorm, which does not exist" in caplog.text
    with pytest.raises(CheckpointError, match="must fit the network.*norm_op names .* the network has no norm_op"):
        build_network(model.plan, weights)


@pytest.mark.parametrize("short", ["PlainConvUNet", "ResidualEncoderUNet"])
def test_the_network_of_a_fork_is_found_by_its_name(tmp_path, caplog, short: str):
    changes = {} if short == "PlainConvUNet" else RESIDUAL
    path = f"nnunetv2.training.nnUNetTrainer.variants.network_architecture.{short}"
    plain, fork = (plans_with({"class": f"{prefix}", **changes}) for prefix in (f"{UNET}.{short}", path))
    weights = random_weights(plain, dataset_json())
    with caplog.at_level(logging.WARNING, logger="nnturbo"):
        model = read_model(write_model(tmp_path / "m", plans=fork, checkpoint={"network_weights": weights}))
    assert f"names the network {path}, which is never imported" in caplog.text
    tiles = torch.randn(1, 1, 8, 12, 16)
    expected = build_network(parse_plan(plain, dataset_json(), "3d_fullres"), weights)
    assert torch.equal(build_network(model.plan, model.weights[0])(tiles), expected(tiles))


@pytest.mark.parametrize(
    ("trainer", "reason"),
    [
        ("nnUNetTrainer", "Are checkpoint and plans from the same training"),
        ("nnUNetTrainer_250epochs_NoMirroring", "Are checkpoint and plans from the same training"),
        ("nnUNetTrainerDA5", "Are checkpoint and plans from the same training"),
        ("nnUNetTrainerBN", "trained by nnUNetTrainerBN, whose network"),
        ("MyTrainer", "trained by MyTrainer, whose network is probably not .*give it in Python"),
        ("STUNetTrainer_base", "trained by STUNetTrainer_base must be those of STU-Net"),
    ],
)
def test_where_weights_do_not_fit_the_trainer_is_named(trainer: str, reason: str):
    plan = parse_plan(plans_json(), dataset_json(), "3d_fullres")
    with pytest.raises(CheckpointError, match=reason):
        build_network(plan, {"vit.blocks.0.weight": torch.zeros(3)}, None, trainer)


LABELS = {
    "as nnU-Net writes them": ({"background": 0, "a": 1, "b": 2}, None),
    "strings": ({"background": "0", "a": "1", "b": "2"}, None),
    "floats": ({"background": 0.0, "a": 1.0, "b": 2.0}, None),
    "mixed": ({"background": "0", "a": 1.0, "b": 2, "ignore": 3}, None),
    "strings with spaces": ({"background": 0, "a": " 1 "}, None),
    "lists of one": ({"background": 0, "a": [1], "b": ["2"]}, None),
    "order without regions": ({"background": 0, "a": 1}, [1]),
    "gaps": ({"background": 0, "a": 3, "b": 7}, None),
    "no ignore": ({"background": 0, "a": 1, "ignore": None}, None),
    "a string of a fraction": ({"background": 0, "a": "1.0"}, None),
    "words": ({"background": 0, "a": "one"}, None),
    "regions": ({"background": 0, "w": [1, 2], "c": 2}, [1, 2]),
    "regions of strings": ({"background": 0, "w": ["1", "2"], "c": "2"}, [1, 2]),
    "regions of floats": ({"background": 0.0, "w": [1.0, 2.0], "c": 2.0}, [1.0, 2.0]),
    "order of strings": ({"background": 0, "w": [1, 2], "c": 2}, ["1", "2"]),
    "a region of zeros": ({"background": 0, "none": [0, 0], "w": [1, 2], "c": 2}, [1, 2]),
    "regions and background as a string": ({"background": "0", "w": ["1", "2"], "c": "2"}, [1, 2]),
    "too few in order": ({"background": 0, "w": [1, 2], "c": 2}, [1]),
    "no order": ({"background": 0, "w": [1, 2]}, None),
    "ignore as a string": ({"background": 0, "a": 1, "ignore": "2"}, None),
    "ignore as a float": ({"background": 0, "a": 1, "ignore": 2.0}, None),
    "ignore too high": ({"background": 0, "a": 1, "ignore": 5}, None),
    "background as a list": ({"background": [0], "a": 1}, None),
    "no background": ({"a": 1}, None),
}


@pytest.mark.parametrize("kind", LABELS)
def test_labels_are_read_as_nnunet_reads_them(kind: str):
    labels, order = copy.deepcopy(LABELS[kind])
    dataset = {"labels": labels} if order is None else {"labels": labels, "regions_class_order": order}
    unchanged = copy.deepcopy(dataset)
    try:
        theirs = LabelManager(*copy.deepcopy(LABELS[kind]))
    except (AssertionError, RuntimeError, ValueError):
        with pytest.raises(ModelError, match=r"dataset\.json"):
            parse_labels(dataset)
        return
    ours = parse_labels(dataset)
    assert dataset == unchanged
    assert ours.foreground == tuple(theirs.foreground_labels)
    assert ours.num_outputs == theirs.num_segmentation_heads
    alone = np.eye(ours.num_outputs, dtype=np.float32)  # voxel n is sure of output n
    present = set(theirs.convert_probabilities_to_segmentation(alone).tolist()) - {0}
    assert {value for values in ours.written.values() for value in values} == present
    assert (ours.regions_class_order is not None) == theirs.has_regions
    if ours.regions_class_order is not None:
        assert ours.regions_class_order == tuple(int(label) for label in order)
        assert {type(label) for label in ours.regions_class_order} == {int}


def test_labels_of_the_first_nnunet_are_read_too():
    ours = parse_labels({"labels": {"0": "Background", "1": "liver", "2": "tumor", "3": "ignore"}})
    assert ours.labels == {"background": 0, "liver": 1, "tumor": 2}


@pytest.mark.parametrize("key", ["channel_names", "modality"])
def test_channels_may_be_a_list(key: str):
    dataset = dataset_json() | {key: ["CT"]}
    assert parse_plan(plans_json(), dataset, "3d_fullres").channel_names == ("CT",)


def test_of_more_normalizations_than_channels_the_first_count():
    more = plans_json(normalization_schemes=["CTNormalization", "Unheard"], use_mask_for_norm=[False, True, "x"])
    assert parse_plan(more, dataset_json(), "3d_fullres") == parse_plan(plans_json(), dataset_json(), "3d_fullres")


GRIDS = {
    "finer": ((9, 14, 12), (15, 21, 13), (1.5, 1.5, 1.5), (1, 1, 1)),
    "half": ((12, 14, 16), (6, 7, 8), (1, 1, 1), (2, 2, 2)),
    "coarse z": ((6, 20, 18), (17, 25, 20), (5, 1.2, 1.1), (2, 1, 1)),
    "coarse z, half": ((8, 20, 18), (4, 40, 36), (5, 1, 1), (10, 0.5, 0.5)),
    "coarse z as it is": ((12, 14, 16), (12, 28, 32), (4, 1, 1), (4, 0.5, 0.5)),
    "coarse y": ((20, 5, 18), (22, 12, 13), (1, 4, 1), (1, 1, 1)),
    "coarse x": ((16, 16, 6), (8, 12, 15), (1, 1, 4), (2, 1.3, 1.4)),
}
SPLINE = resample_data_or_seg_to_shape
TORCH = resample_torch_fornnunet
RULES = {
    "as planned": (SPLINE, {"order": 1, "order_z": 0}),
    "nearest": (SPLINE, {"order": 0, "order_z": 0}),
    "linear z": (SPLINE, {"order": 1, "order_z": 1}),
    "nearest, linear z": (SPLINE, {"order": 0, "order_z": 1}),
    "square": (SPLINE, {"order": 2, "order_z": 0}),
    "cubic": (SPLINE, {"order": 3, "order_z": 0}),
    "quartic": (SPLINE, {"order": 4, "order_z": 0}),
    "quintic": (SPLINE, {"order": 5, "order_z": 1}),
    "cubic z": (SPLINE, {"order": 1, "order_z": 3}),
    "torch": (TORCH, {}),
    "torch, nearest": (TORCH, {"mode": "nearest-exact"}),
    "torch, linear z": (TORCH, {"aniso_axis_mode": "linear"}),
    "torch, majority": (TORCH, {"memefficient_seg_resampling": True}),
    "torch, majority, linear z": (TORCH, {"memefficient_seg_resampling": True, "aniso_axis_mode": "linear"}),
}
EQUAL_SCORES = {"cubic z": 0.03, "torch, majority, linear z": 1e-3}
"""Fraction of voxels, half way between two labels, where the last digit of nnU-Net's own sums decides."""


@pytest.mark.parametrize("separate", [None, True, False])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("rule", RULES)
def test_labels_of_a_previous_stage_are_resampled_as_by_nnunet(rule: str, grid: str, separate: bool | None):
    function, arguments = RULES[rule]
    arguments = {"is_seg": True, "force_separate_z": separate, **arguments}
    shape, new_shape, spacing, new_spacing = GRIDS[grid]
    field = gaussian_filter(np.random.default_rng(len(rule + grid)).standard_normal(shape), 1.5)
    labels = np.digitize(field, np.quantile(field, [0.3, 0.5, 0.7, 0.9])).astype(np.int32)
    labels[:, :2] = -1
    with quiet():
        theirs = function(labels[None].astype(np.float32), new_shape, spacing, new_spacing, **arguments)[0]
    ours = resample_label_map(labels, parse_resampling(function.__name__, arguments), new_shape, spacing, new_spacing)
    assert np.count_nonzero(ours.numpy() != theirs) <= EQUAL_SCORES.get(rule, 0) * theirs.size
