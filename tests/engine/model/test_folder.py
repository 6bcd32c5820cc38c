import io
import json
import logging
import pickle
import re
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nnturbo.engine import CheckpointError, ModelError
from nnturbo.engine.model.architecture import Architecture
from nnturbo.engine.model.folder import read_model
from nnturbo.engine.model.labels import parse_labels
from nnturbo.engine.model.network import build_network, is_known_to_fit, make_network
from nnturbo.engine.model.plans import parse_plan

from tests.engine.factory import dataset_json, multi_task, plans_json, random_weights, write_model


def changed(content, path, value):
    """Copy JSON with one entry replaced, or removed where the value is `...`."""
    content = json.loads(json.dumps(content))
    *parents, last = path
    place = content
    for key in parents:
        place = place[key]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return content


CONFIGURATION = ("configurations", "3d_fullres")
ARCHITECTURE = (*CONFIGURATION, "architecture")
ARGUMENTS = (*ARCHITECTURE, "arch_kwargs")


def test_a_model_folder_is_read(tmp_path):
    model = read_model(write_model(tmp_path / "m", folds=("0", "1", "all")))
    assert model.folds == ("0", "1")
    assert model.mirror_axes == (0, 1, 2)
    assert model.trainer == "nnUNetTrainer"
    assert model.plan.channels[0].low == -150
    assert model.plan.labels.foreground == (1, 2)
    network = build_network(model.plan, model.weights[0])
    assert sum(p.numel() for p in network.parameters()) == model.num_parameters
    assert network(torch.zeros(1, 1, 8, 12, 16)).shape == (1, 3, 8, 12, 16)


@pytest.mark.parametrize(
    ("folds", "chosen"), [(None, ("0", "2")), (("all",), ("all",)), ((2,), ("2",)), (("2", "0"), ("2", "0"))]
)
def test_folds_are_chosen(tmp_path, folds, chosen):
    assert read_model(write_model(tmp_path / "m", folds=("2", "0", "all")), folds=folds).folds == chosen


def test_fold_all_is_taken_where_it_is_the_only_one(tmp_path):
    assert read_model(write_model(tmp_path / "m", folds=("all",))).folds == ("all",)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_wrappers_prefixes_are_taken_off(tmp_path, prefix):
    weights = random_weights(plans_json(), dataset_json())
    plain = read_model(write_model(tmp_path / "a", checkpoint={"network_weights": weights}))
    wrapped = {prefix + name: tensor for name, tensor in weights.items()}
    model = read_model(write_model(tmp_path / "b", checkpoint={"network_weights": wrapped}))
    tiles = torch.randn(1, 1, 8, 12, 16)
    outputs = [build_network(m.plan, m.weights[0])(tiles) for m in (plain, model)]
    assert torch.equal(*outputs)


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


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return exec, (f"open({str(self.path)!r}, 'w').close()",)


def test_nothing_in_a_checkpoint_is_run(tmp_path):
    fired = tmp_path / "fired"
    folder = write_model(tmp_path / "m", checkpoint={"logging": Bomb(fired)})
    with pytest.raises(
        CheckpointError, match="must hold weights and plain values only; it names .*exec.*Nothing in it was run"
    ):
        read_model(folder)
    (folder / "fold_0" / "checkpoint_final.pth").write_bytes(pickle.dumps({"network_weights": Bomb(fired)}))
    with pytest.raises(CheckpointError):
        read_model(folder)
    assert not fired.exists()


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
        (("configurations",), ..., "plans.json must have 'configurations'"),
        (CONFIGURATION, ..., "must have the configuration '3d_fullres'"),
        ((*CONFIGURATION, "patch_size"), ..., "must have 'patch_size'"),
        ((*CONFIGURATION, "patch_size"), [8, 0, 8], "positive integers"),
        ((*CONFIGURATION, "patch_size"), [8, 8.5, 8], "positive integers"),
        ((*CONFIGURATION, "patch_size"), [8], "2 or 3 entries"),
        ((*CONFIGURATION, "patch_size"), [100000, 100000, 100000], "at most 2\\^31 voxels"),
        ((*CONFIGURATION, "spacing"), [1, 1], "2 or 3 entries"),
        ((*CONFIGURATION, "spacing"), [1, -1, 1], "positive numbers"),
        ((*CONFIGURATION, "normalization_schemes"), ["Fancy"], "normalization must be one of"),
        ((*CONFIGURATION, "normalization_schemes"), [], "for each of the 1 channels"),
        ((*CONFIGURATION, "use_mask_for_norm"), [], "for each of the 1 channels"),
        ((*CONFIGURATION, "resampling_fn_data"), "magic", "resampling function must be one of"),
        ((*CONFIGURATION, "inherits_from"), "3d_fullres", "in a circle: 3d_fullres -> 3d_fullres"),
        ((*CONFIGURATION, "architecture"), [], "'architecture' must be a dict"),
        ((*CONFIGURATION, "architecture"), ..., "must have 'UNet_class_name'"),
        ((*CONFIGURATION, "spacing"), [10**400, 1, 1], "positive numbers"),
        ((*CONFIGURATION, "use_mask_for_norm"), ["false"], "must hold true or false"),
        ((*CONFIGURATION, "preprocessor_name"), "MyPreprocessor", "trained with 'MyPreprocessor'"),
        (("label_manager",), "MyLabelManager", "trained with 'MyLabelManager'"),
        (("foreground_intensity_properties_per_channel", "0", "mean"), 10**400, "must be finite"),
        (("transpose_forward",), [0, 1, 1], "order of the axes"),
        (("transpose_forward",), "012", "must be a list"),
        (("image_reader_writer",), "MyReader", "trained with 'MyReader'"),
        (("foreground_intensity_properties_per_channel",), {}, "must have '0'"),
        (("foreground_intensity_properties_per_channel", "0", "std"), float("nan"), "must be finite"),
    ],
)
def test_what_is_wrong_with_a_plan_is_named(path, value, message):
    with pytest.raises(ModelError, match=message):
        parse_plan(changed(plans_json(), path, value), dataset_json(), "3d_fullres")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": {"pancreas": 1}}, "'background': 0"),
        ({"labels": {"background": 1}}, "'background': 0"),
        ({"labels": {"background": 0, "a": "one"}}, "'a' must be an integer"),
        ({"labels": {"background": 0, "a": "1.0"}}, "'a' must be an integer"),
        ({"labels": {"background": 0, "a": 1.5}}, "'a' must be an integer"),
        ({"labels": {"background": 0, "a": float("inf")}}, "'a' must be an integer"),
        ({"labels": {"background": 0, "a": []}}, "'a' must be an integer"),
        ({"labels": {"0": "background", "1": "a", "2": "a"}}, "a name of their own each"),
        (
            {"labels": {"background": 0, "a": 1, "ignore": "2"}},
            "'ignore' must be the integer .* other label, 2, got '2'",
        ),
        ({"labels": {"background": 0, "a": 1, "ignore": 3}}, "other label, 2, got 3"),
        ({"labels": {"background": "0", "a": [1, 2]}, "regions_class_order": [1]}, "must be the number 0, got '0'"),
        (
            {"labels": {"background": 0, "a": [1, 2]}, "regions_class_order": [1.5]},
            "regions_class_order must be integers",
        ),
        ({"labels": {"background": 0, "a": [1, 2]}}, "must have 'regions_class_order'"),
        ({"labels": {"background": 0, "a": [1, 2]}, "regions_class_order": [1, 2]}, "one label per region"),
        (
            {"labels": {"background": 0, "a": [1, 2]}, "regions_class_order": [300]},
            r"must hold values up to 255, which nnU-Net writes with so few labels, got \[300\]",
        ),
        ({"labels": 3}, "'labels' must be a dict"),
    ],
)
def test_what_is_wrong_with_labels_is_named(change, message):
    with pytest.raises(ModelError, match=message):
        parse_labels({**dataset_json(), **change})


def test_labels_regions_and_ignore():
    scheme = parse_labels(
        {"labels": {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}, "regions_class_order": [1, 2]}
    )
    assert (scheme.num_outputs, scheme.foreground, scheme.regions_class_order) == (2, (1, 2), (1, 2))
    many = parse_labels({"labels": {"background": 0, **{str(i): i for i in range(1, 256)}}})
    assert (many.num_outputs, many.dtype) == (256, np.uint16)


NESTED = {"background": 0, "none": [0, 0], "whole": [1, 2, 3], "core": [2, 3], "active": 3}


@pytest.mark.parametrize(
    ("labels", "order", "written", "renumbered"),
    [
        ({"background": 0, "a": 1, "b": 2}, None, {"a": (1,), "b": (2,)}, ()),
        ({"background": 0, "a": 3, "b": 7}, None, {"a": (1,), "b": (2,)}, ("a", "b")),
        ({"b": 7, "a": 1, "background": 0}, None, {"b": (2,), "a": (1,)}, ("b",)),
        ({"background": 0, "a": 1, "the same": 1, "b": 2}, None, {"a": (1,), "the same": (1,), "b": (2,)}, ()),
        (NESTED, [1, 2, 3], {"whole": (1, 2, 3), "core": (2, 3), "active": (3,)}, ()),
        (NESTED, [2, 3, 1], {"whole": (1, 2, 3), "core": (1, 3), "active": (1,)}, ("core", "active")),
        (NESTED, [4, 5, 6], {"whole": (4, 5, 6), "core": (5, 6), "active": (6,)}, ("whole", "core", "active")),
        (NESTED, [1, 1, 3], {"whole": (1, 3), "core": (1, 3), "active": (3,)}, ("core",)),
        (NESTED, [1, 0, 3], {"whole": (1, 3), "core": (3,), "active": (3,)}, ()),
        ({"background": 0, "left": [1, 2], "right": [2, 3]}, [1, 3], {"left": (1,), "right": (3,)}, ()),
    ],
)
def test_labels_have_the_values_that_nnunet_writes(tmp_path, caplog, labels, order, written, renumbered):
    dataset = dataset_json(labels=labels, **({} if order is None else {"regions_class_order": order}))
    scheme = parse_labels(dataset)
    assert scheme.written == written
    assert tuple(scheme.renumbered) == renumbered
    with caplog.at_level(logging.WARNING):
        read_model(write_model(tmp_path / "m", dataset=dataset))
    (*told,) = (message for message in caplog.messages if "other values than dataset.json's" in message)
    assert len(told) == bool(renumbered)
    for name in renumbered:
        assert f"{name} as {' or '.join(map(str, written[name]))}" in told[0]


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
@settings(max_examples=150, deadline=None)
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


@pytest.mark.parametrize(
    ("reader", "ending"),
    [
        *(("SimpleITKIO", ending) for ending in (".png", ".tif", "nii.gz", "/../../evil.nii.gz", "")),
        ("SimpleITKIOWithReorient", ".png"),
        ("NibabelIO", ".nrrd"),
        ("NibabelIOWithReorient", ".mha"),
        ("NaturalImage2DIO", ".jpg"),
        ("NaturalImage2DIO", ".nii.gz"),
        ("Tiff3DIO", ".png"),
    ],
)
def test_a_file_ending_that_the_reader_does_not_write_is_refused(reader, ending):
    with pytest.raises(ModelError, match=f"file_ending must be one of .* for {reader}, got '{re.escape(ending)}'"):
        parse_plan({**plans_json(), "image_reader_writer": reader}, dataset_json(file_ending=ending), "3d_fullres")


@pytest.mark.parametrize(
    ("reader", "endings"),
    [
        ("SimpleITKIO", ".nii.gz .nii .nrrd .nhdr .mha .mhd .gipl .NII.GZ .Nii.gz .NRRD .GIPL"),
        ("SimpleITKIOWithReorient", ".nii.gz .nrrd .mha .gipl"),
        ("NibabelIO", ".nii.gz .nii .NII.GZ"),
        ("NibabelIOWithReorient", ".nii.gz .nii"),
        ("NaturalImage2DIO", ".png .bmp .tif .PNG"),
        ("Tiff3DIO", ".tif .tiff .TIF"),
    ],
)
def test_every_file_ending_that_the_reader_writes_is_kept_as_it_is(reader, endings):
    for ending in endings.split():
        plans = {**plans_json(), "image_reader_writer": reader}
        assert parse_plan(plans, dataset_json(file_ending=ending), "3d_fullres").file_ending == ending


def test_missing_pieces_of_a_folder_are_named(tmp_path):
    with pytest.raises(ModelError, match="does not exist"):
        read_model(tmp_path / "nowhere")
    folder = write_model(tmp_path / "m")
    for name in ("plans.json", "dataset.json"):
        content = (folder / name).read_text()
        (folder / name).unlink()
        with pytest.raises(ModelError, match=f"must have {name}"):
            read_model(folder)
        (folder / name).write_text("{oops")
        with pytest.raises(ModelError, match="must be JSON"):
            read_model(folder)
        (folder / name).write_text("[1]")
        with pytest.raises(ModelError, match="must hold a JSON object"):
            read_model(folder)
        (folder / name).write_text(content)
    with pytest.raises(ModelError, match="fold 7 has none, found are 0"):
        read_model(folder, folds=[7])
    with pytest.raises(ModelError, match=r"fold with checkpoint_best\.pth.*it has fold_0/checkpoint_final\.pth"):
        read_model(folder, checkpoint="checkpoint_best.pth")
    with pytest.raises(ModelError, match="must be of configuration '2d', it is of '3d_fullres'"):
        read_model(folder, configuration="2d")
    with pytest.raises(ValueError, match="different folds"):
        read_model(folder, folds=[0, 0])
    with pytest.raises(ValueError, match="file name"):
        read_model(folder, checkpoint="../checkpoint_final.pth")


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ({"network_weights": None}, "tensors under 'network_weights'"),
        ({"network_weights": {"a": 1}}, "tensors under 'network_weights'"),
        ({"init_args": {}}, "must name its configuration"),
        ({"inference_allowed_mirroring_axes": (0, 5)}, "must be among 0, 1, 2"),
        ({"inference_allowed_mirroring_axes": 3}, "must be among 0, 1, 2"),
        ({"inference_allowed_mirroring_axes": torch.tensor([0, 1])}, "must be among 0, 1, 2"),
        ({"inference_allowed_mirroring_axes": [torch.tensor([0, 1])]}, "must be among 0, 1, 2"),
        ({"network_weights": {3: torch.zeros(1)}}, "plain, dense weights, 3 is none"),
        ({"network_weights": {"a": torch.zeros(2).to_sparse()}}, "plain, dense weights"),
        ({"network_weights": {"a": torch.zeros(2, dtype=torch.complex64)}}, "plain, dense weights"),
        ({"network_weights": {"a": torch.zeros(1).expand(10**9)}}, "plain, dense weights"),
        ({"network_weights": {"a": torch.tensor([0, float("inf")])}}, "finite weights, 'a'"),
    ],
)
def test_what_is_wrong_with_a_checkpoint_is_named(tmp_path, checkpoint, message):
    with pytest.raises(CheckpointError, match=message):
        read_model(write_model(tmp_path / "m", checkpoint=checkpoint))


@pytest.mark.parametrize("damage", ["truncated", "text", "empty", "no dictionary"])
def test_a_damaged_checkpoint_is_refused(tmp_path, damage):
    folder = write_model(tmp_path / "m")
    path = folder / "fold_0" / "checkpoint_final.pth"
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[: len(whole) // 2], "text": b"hello", "empty": b""}.get(damage, b""))
    if damage == "no dictionary":
        torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match=str(path)):
        read_model(folder)


def zipped(folder, target, prefix="Dataset900_Test/nnUNetTrainer__nnUNetPlans__3d_fullres"):
    with zipfile.ZipFile(target, "a") as archive:
        for path in folder.rglob("*"):
            if path.is_file():
                archive.write(path, f"{prefix}/{path.relative_to(folder)}")
    return target


def test_an_export_zip_is_read_and_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    folder = write_model(tmp_path / "m", folds=("0", "1"))
    archive = zipped(folder, tmp_path / "model.zip")
    model = read_model(archive)
    assert model.folds == ("0", "1")
    assert list((tmp_path / "tmp").iterdir()) == []
    zipped(folder, archive, "Dataset900_Test/nnUNetTrainer__nnUNetPlans__2d")
    with pytest.raises(ModelError, match="exactly one model; name a configuration; it holds .*2d, .*3d_fullres"):
        read_model(archive)
    assert read_model(archive, configuration="3d_fullres").folds == ("0", "1")


@pytest.mark.parametrize("member", ["m/../../escaped.json", "m/fold_0/..\\..\\escaped.json"])
def test_a_zip_cannot_write_outside_its_folder(tmp_path, member):
    archive = tmp_path / "model.zip"
    with zipfile.ZipFile(archive, "w") as writer:
        writer.writestr("m/plans.json", "{}")
        writer.writestr(member, "{}")
    with pytest.raises(ModelError, match="must not hold paths that leave its folder"):
        read_model(archive)
    assert not list(tmp_path.rglob("escaped*"))


@pytest.mark.parametrize("damage", ["truncated", "text", "flipped", "clash"])
def test_a_damaged_zip_is_refused(tmp_path, damage):
    archive = zipped(write_model(tmp_path / "m"), tmp_path / "model.zip")
    whole = bytearray(archive.read_bytes())
    if damage == "clash":
        with zipfile.ZipFile(archive, "a") as writer:
            writer.writestr("Dataset900_Test/nnUNetTrainer__nnUNetPlans__3d_fullres/a.json", "{}")
            writer.writestr("Dataset900_Test/nnUNetTrainer__nnUNetPlans__3d_fullres/a.json/b.json", "{}")
    elif damage == "flipped":
        start = whole.index(b"checkpoint_final.pth") + 2000
        whole[start : start + 64] = bytes(64)
        archive.write_bytes(whole)
    else:
        archive.write_bytes(whole[: len(whole) // 2] if damage == "truncated" else b"hello")
    with pytest.raises(ModelError, match="no whole zip|must be a whole zip"):
        read_model(archive)


def test_a_zip_with_the_model_at_its_top_is_read(tmp_path):
    folder = write_model(tmp_path / "m")
    with zipfile.ZipFile(tmp_path / "model.zip", "w") as archive:
        for path in folder.rglob("*.*"):
            archive.write(path, path.relative_to(folder))
    assert read_model(tmp_path / "model.zip").folds == ("0",)


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def places(content, path=()):
    """Every path into nested JSON."""
    if path:
        yield path
    if isinstance(content, dict):
        for key, value in content.items():
            yield from places(value, (*path, key))
    elif isinstance(content, list):
        for index, value in enumerate(content):
            yield from places(value, (*path, index))


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(list(places(plans_json()))), values | st.just(...))
def test_any_change_to_a_plan_gives_a_network_or_a_clear_error(path, value):
    try:
        plan = parse_plan(changed(plans_json(), path, value), dataset_json(), "3d_fullres")
        make_network(plan.architecture, plan.input_channels, plan.labels.num_outputs)
    except ModelError as error:
        assert "\n" not in str(error)


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(list(places(dataset_json()))), values | st.just(...))
def test_any_change_to_a_dataset_gives_a_plan_or_a_clear_error(path, value):
    try:
        parse_plan(plans_json(), changed(dataset_json(), path, value), "3d_fullres")
    except ModelError as error:
        assert "\n" not in str(error)


def test_legacy_checkpoints_without_a_zip_container_are_read(tmp_path):
    folder = write_model(tmp_path / "m")
    path = folder / "fold_0" / "checkpoint_final.pth"
    content = torch.load(path, weights_only=False)
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=False)
    path.write_bytes(buffer.getvalue())
    assert read_model(folder).folds == ("0",)
