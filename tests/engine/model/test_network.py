"""Networks built from plans, and the weights that go into them."""

import re
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nnturbo.engine import CheckpointError, ModelError
from nnturbo.engine.model.architecture import Architecture
from nnturbo.engine.model.folder import read_model
from nnturbo.engine.model.network import build_network, is_known_to_fit, make_network
from nnturbo.engine.model.plans import parse_plan

from tests.engine.factory import dataset_json, multi_task, plans_json, random_weights, write_model
from tests.engine.model.changed_json import ARCHITECTURE, ARGUMENTS, changed


def deep_plans():
    plans = plans_json()
    arguments = plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    arguments.update(
        n_stages=3,
        features_per_stage=[4, 8, 8],
        kernel_sizes=[[3] * 3] * 3,
        n_conv_per_stage=[1] * 3,
        strides=[[1] * 3, [2] * 3, [2] * 3],
        n_conv_per_stage_decoder=[1, 1],
    )
    return plans


def test_deep_supervision_heads_may_be_missing_but_not_the_last(tmp_path):
    plans = deep_plans()
    weights = random_weights(plans, dataset_json())
    tiles = torch.randn(1, 1, 8, 12, 16)
    expected = build_network(parse_plan(plans, dataset_json(), "3d_fullres"), weights)(tiles)
    fewer = {name: t for name, t in weights.items() if not name.startswith("decoder.seg_layers.0.")}
    assert len(fewer) < len(weights)
    model = read_model(write_model(tmp_path / "m", plans=plans, checkpoint={"network_weights": fewer}))
    assert torch.equal(build_network(model.plan, model.weights[0])(tiles), expected)
    none = {name: t for name, t in weights.items() if not name.startswith("decoder.seg_layers.")}
    with pytest.raises(CheckpointError, match=r"missing, such as decoder\.seg_layers\.1"):
        build_network(model.plan, none)


def test_a_network_class_of_ones_own_is_never_imported(tmp_path, monkeypatch):
    (tmp_path / "evil_module.py").write_text(
        f"open({str(tmp_path / 'fired')!r}, 'w').close()\nclass PlainConvUNet: pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for path, value in (
        ((*ARCHITECTURE, "network_class_name"), "evil_module.OtherUNet"),
        ((*ARGUMENTS, "nonlin"), "evil_module.PlainConvUNet"),
        ((*ARGUMENTS, "nonlin"), "torch.nn..evil_module"),
        ((*ARGUMENTS, "nonlin"), "torch.nn.functional"),
        ((*ARGUMENTS, "nonlin"), "torch.nn.modules.conv.Tensor"),
        ((*ARGUMENTS, "nonlin"), ["torch.nn.ReLU"]),
        ((*ARGUMENTS, "nonlin"), "os.system"),
    ):
        plans = changed(plans_json(), path, value)
        folder = write_model(tmp_path / "m", plans=plans, checkpoint={"network_weights": {}})
        model = read_model(folder)
        with pytest.raises(ModelError, match="never imported"):
            build_network(model.plan, model.weights[0])
    plans = changed(plans_json(), (*ARCHITECTURE, "network_class_name"), "evil_module.PlainConvUNet")
    model = read_model(write_model(tmp_path / "m", plans=plans))
    build_network(model.plan, model.weights[0])
    assert not (tmp_path / "fired").exists()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ((*ARGUMENTS, "n_stages"), 10**9, "n_stages must be 1 to 16"),
        ((*ARGUMENTS, "n_stages"), 3, "cannot be built"),
        ((*ARGUMENTS, "features_per_stage"), [4, 10**9], "must lie in 0 to"),
        ((*ARGUMENTS, "unheard_of"), 1, "cannot be built"),
        ((*ARGUMENTS, "conv_op"), ..., "lists 'conv_op', which must be among arch_kwargs"),
        ((*ARGUMENTS, "strides"), "two", "cannot be built"),
    ],
)
def test_an_architecture_that_makes_no_network_is_refused(path, value, message):
    plan = parse_plan(changed(plans_json(), path, value), dataset_json(), "3d_fullres")
    with pytest.raises(ModelError, match=message):
        make_network(plan.architecture, 1, 3)


TAPS, STRIDES = st.sampled_from([1, 3, 3, 3, 3, 3, 3, 2]), st.sampled_from([1, 2, 2, 3])


@given(
    network=st.sampled_from(["PlainConvUNet", "ResidualEncoderUNet", "ResidualUNet"]),
    kernels=st.lists(st.lists(TAPS, min_size=3, max_size=3), min_size=3, max_size=3),
    first=st.sampled_from([*[[1, 1, 1]] * 5, [1, 2, 2]]),
    strides=st.lists(st.lists(STRIDES, min_size=3, max_size=3), min_size=2, max_size=2),
    patch=st.lists(st.sampled_from([1, 4, 12, 12, 36, 36, 36]), min_size=3, max_size=3),
    norm=st.sampled_from([*["instancenorm.InstanceNorm3d"] * 4, "batchnorm.BatchNorm3d"]),
)
@settings(max_examples=60, deadline=None)
def test_what_is_known_to_fit_keeps_the_patch(network, kernels, first, strides, patch, norm):
    arguments = plans_json()["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    arguments |= {"n_stages": 3, "features_per_stage": [4, 8, 8], "kernel_sizes": kernels}
    arguments |= {"strides": [first, *strides], "norm_op": f"torch.nn.modules.{norm}"}
    arguments["n_conv_per_stage_decoder"] = [1, 1]
    if network == "PlainConvUNet":
        arguments["n_conv_per_stage"] = [1, 1, 1]
    else:
        del arguments["n_conv_per_stage"]
        arguments["n_blocks_per_stage"] = [1, 1, 1]
    architecture = Architecture(
        class_name=f"dynamic_network_architectures.architectures.unet.{network}",
        arguments=arguments,
        class_arguments=("conv_op", "norm_op", "dropout_op", "nonlin"),
    )
    made = make_network(architecture, 1, 3).eval()
    try:
        gives = tuple(made(torch.empty(1, 1, *patch, device="meta")).shape)
    except (RuntimeError, ValueError) as error:
        gives = error
    divided = all(size % (one * other) == 0 for size, one, other in zip(patch, *strides, strict=True))
    ordinary = (
        norm.startswith("instance") and first == [1, 1, 1] and all(taps % 2 for stage in kernels for taps in stage)
    )
    if is_known_to_fit(architecture, patch):
        assert gives == (1, 3, *patch)
    elif ordinary and divided:
        assert isinstance(gives, ValueError)  # a norm over one voxel


@pytest.mark.thorough
def test_loading_does_not_import_what_only_compilers_need(tmp_path):
    plain = write_model(tmp_path / "plain")
    heads = write_model(tmp_path / "heads", plans=multi_task(plans_json(), kind="attention"))
    script = (
        "import sys; from nnturbo.engine import Engine\n"
        "for model in sys.argv[1:]: Engine.load(model, device='cpu', backend='torch')\n"
        "assert 'torch' in sys.modules; print({'sympy', 'torch._dynamo'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script, plain, heads], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_weights_that_do_not_fit_are_counted_and_named():
    plan = parse_plan(plans_json(), dataset_json(), "3d_fullres")
    weights = random_weights(plans_json(), dataset_json())
    head = "decoder.seg_layers.0.weight"
    with pytest.raises(
        CheckpointError, match=r"seg_layers\.0\.weight is \(9, 4, 1, 1, 1\) instead of \(3, 4, 1, 1, 1\)"
    ):
        build_network(plan, {**weights, head: torch.zeros(9, 4, 1, 1, 1)})
    with pytest.raises(CheckpointError, match="1 unknown, such as extra"):
        build_network(plan, {**weights, "extra": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=f"{len(weights)} missing"):
        build_network(plan, {})


def test_weights_are_checked_under_every_name(tmp_path):
    plan = parse_plan(plans_json(), dataset_json(), "3d_fullres")
    weights = random_weights(plans_json(), dataset_json())
    for name in weights:
        with pytest.raises(CheckpointError, match=re.escape("is (3, 7) instead of")):
            build_network(plan, {**weights, name: torch.zeros(3, 7)})
