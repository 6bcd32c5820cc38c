"""The path as TorchScript gives what `Engine.predict` gives; its parts give what their twins in plain Python give."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nnturbo.engine import Engine, EngineOptions, ModelError, Volume, read_volume
from nnturbo.engine.export.scripted.path import scan_path, whole_path
from nnturbo.engine.export.scripted.preprocessing import filled, occupied_box
from nnturbo.engine.export.scripted.resampling import ScriptResampling, inputs_of, resample_rows
from nnturbo.engine.export.scripted.resampling import value_range as script_value_range
from nnturbo.engine.model.folder import read_model
from nnturbo.engine.model.folds import inference_network
from nnturbo.engine.model.plans import parse_plan
from nnturbo.engine.model.resampling_function import Resampling
from nnturbo.engine.model.runner import NetworkOutput
from nnturbo.engine.options import AGGREGATIONS
from nnturbo.engine.pipeline.interpolation import PREFILTERS, spline_band, torch_band
from nnturbo.engine.pipeline.preprocessing import filled_mask, nonzero_box, shape_at_spacing
from nnturbo.engine.pipeline.resampling import (
    GridMap,
    grid_map,
    resample,
    spline_operator,
    torch_operator,
    value_range,
)
from nnturbo.engine.pipeline.sliding_window import axis_weights
from nnturbo.engine.pipeline.voting import Votes
from nnturbo.engine.pipeline.window import tile_positions
from nnturbo.kernels import argmax_labels, region_labels

from tests.engine.factory import SPLINE, dataset_json, multi_task, plans_2d, plans_json, smooth_scan, write_model

SHARED = Path(__file__).resolve().parents[3].parent / "shared"
TRAINED_MODEL = SHARED / "models" / "Dataset501_Abdomen" / "nnUNetTrainer__smallPlans__3d_fullres"
SPACING = (3.0, 1.2, 1.3)


def traced(model):
    """A model's network as TorchScript."""
    network = inference_network(model)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torch.jit is deprecated, and that shapes become constants
        tiles = torch.randn(2, model.plan.input_channels, *model.plan.patch_size)
        return torch.jit.trace(network, (tiles,), check_trace=False)


def compiled(folder, aggregation="foreground"):
    """The whole path of a model folder."""
    model = read_model(folder)
    return whole_path(traced(model), model.plan, model.mirror_axes, aggregation)


def loaded(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that torch.jit is deprecated
        return torch.jit.load(path)


def assert_same(folder, array, spacing, *, mirror=False, step=0.5, aggregation="foreground", path=None):
    """Compare labels and class probabilities of the whole path with the engine's, and return them."""
    engine = Engine.load(
        folder,
        device="cpu",
        backend="torch",
        mirror=mirror,
        tile_step_size=step,
        options=EngineOptions(aggregation=aggregation),
    )
    array = array if array.ndim == 4 else array[None]
    expected = engine.predict(Volume.from_array(array, spacing))
    path = path or compiled(folder, aggregation)
    labels, probabilities = path(torch.from_numpy(array), list(spacing), step, mirror)
    assert labels.shape == array.shape[1:]
    assert np.array_equal(labels.numpy(), expected.segmentation)
    if expected.classification is None:
        assert probabilities.shape == (0,)
    else:
        assert torch.allclose(probabilities, torch.tensor(expected.classification.probabilities), atol=1e-6, rtol=0)
    return labels, probabilities


def scan(shape=(9, 24, 26), seed=0):
    return smooth_scan(shape, seed)


def bordered(shape=(13, 24, 26)):
    """A body with a hole in it and a corner cut off, in a frame of zeros that is different on every side."""
    array = scan(shape)
    array[array == 0] = 1
    framed = np.zeros_like(array)
    framed[2:-1, 3:-4, 1:-5] = array[2:-1, 3:-4, 1:-5]
    framed[5:7, 8:11, 9:12] = 0
    framed[:5, :10, :9] = 0
    return framed


def resampled_by(function, arguments, seg_arguments):
    changes = {}
    for kind, values in (("data", arguments), ("seg", seg_arguments), ("probabilities", seg_arguments)):
        changes[f"resampling_fn_{kind}"] = function
        changes[f"resampling_fn_{kind}_kwargs"] = values
    return plans_json(**changes)


def spline(**changes):
    return resampled_by("resample_data_or_seg_to_shape", {**SPLINE, **changes}, {**SPLINE, "order": 1, **changes})


def normalized_by(scheme, mask):
    return plans_json(normalization_schemes=[scheme], use_mask_for_norm=[mask])


def transposed(plans, order):
    return {**plans, "transpose_forward": order, "transpose_backward": [order.index(axis) for axis in range(3)]}


MODELS = {
    "cubic splines": (plans_json(), scan(), SPACING),
    "smaller than the patch": (plans_json(), scan((3, 5, 7)), SPACING),
    "one voxel": (plans_json(), scan((1, 1, 1)), (2.0, 1.5, 1.5)),
    "the network's own grid": (plans_json(), scan((11, 13, 17)), (2.0, 1.5, 1.5)),
    "coarse z": (plans_json(), scan((7, 24, 27)), (5.0, 1.2, 1.2)),
    "coarse x": (plans_json(), scan((19, 24, 7)), (1.2, 1.3, 5.0)),
    "two coarse axes": (plans_json(), scan((9, 9, 21)), (5.0, 5.0, 1.2)),
    "coarse z of the model": (plans_json(spacing=[5.0, 1.0, 1.0]), scan((15, 15, 18)), (1.5, 1.5, 1.5)),
    "coarse z, never alone": (spline(force_separate_z=False), scan((7, 24, 27)), (5.0, 1.2, 1.2)),
    "z always alone": (spline(force_separate_z=True, order_z=1), scan(), SPACING),
    "cubic z alone": (spline(force_separate_z=True, order_z=3), scan(), SPACING),
    "logits by cubic splines": (spline(order=3), scan(), SPACING),
    "logits by cubic splines, coarse y": (spline(order=3), scan((19, 7, 24)), (1.2, 5.0, 1.3)),
    "splines of even order": (spline(order=2, order_z=4), scan(), SPACING),
    "splines of order 5 alone": (spline(force_separate_z=True, order=5, order_z=5), scan(), SPACING),
    "nearest": (spline(order=0), scan(), SPACING),
    "torch": (resampled_by("resample_torch_fornnunet", {"is_seg": False}, {"is_seg": False}), scan(), SPACING),
    "torch, linear whatever it says": (
        resampled_by("resample_torch_fornnunet", {"mode": "nearest"}, {"mode": "nearest"}),
        scan(),
        SPACING,
    ),
    "torch, coarse z": (
        resampled_by("resample_torch_fornnunet", {"mode": "linear"}, {"aniso_axis_mode": "nearest"}),
        scan((7, 24, 27)),
        (5.0, 1.2, 1.2),
    ),
    "torch_simple": (resampled_by("resample_torch_simple", {"mode": "linear"}, {"mode": "nearest"}), scan(), SPACING),
    "no resampling": (resampled_by("no_resampling_hack", {}, {}), scan(), SPACING),
    "transposed": (transposed(plans_json(), [2, 0, 1]), bordered(), (1.2, 3.0, 1.3)),
    "transposed the other way": (transposed(plans_json(), [1, 2, 0]), bordered(), (1.3, 1.2, 3.0)),
    "slices": (plans_2d(), scan(), (2.6, 1.2, 1.3)),
    "slices, transposed": (transposed(plans_2d(), [1, 0, 2]), bordered(), (1.3, 5.0, 1.2)),
    "zeros around": (plans_json(), bordered(), SPACING),
    "nothing but zeros": (plans_json(), np.zeros((9, 14, 15), np.int16), SPACING),
    "z-score": (normalized_by("ZScoreNormalization", False), bordered(), SPACING),
    "z-score within the body": (normalized_by("ZScoreNormalization", True), bordered(), SPACING),
    "z-score within the body, coarse z": (normalized_by("ZScoreNormalization", True), bordered(), (6.0, 1.2, 1.3)),
    "z-score of zeros": (normalized_by("ZScoreNormalization", True), np.zeros((9, 14, 15), np.int16), SPACING),
    "no normalization": (normalized_by("NoNormalization", False), scan() / 300, SPACING),
    "rescaled": (normalized_by("RescaleTo01Normalization", True), scan(), SPACING),
    "colours": (normalized_by("RGBTo01Normalization", False), (scan() % 256).astype(np.uint8), SPACING),
}


@pytest.fixture
def unoptimised():
    """Run compiled code as it is: torch takes most of a second to optimise it while it runs for the first times."""
    with torch.jit.optimized_execution(False):
        yield


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """The tiny network for volumes and the one for slices: models of one seed differ in their plans alone."""
    folder = tmp_path_factory.mktemp("networks")
    plans = {"3d": plans_json(), "2d": plans_2d()}
    return {name: traced(read_model(write_model(folder / name, plans=plans[name]))) for name in plans}


@pytest.mark.usefixtures("unoptimised")
@pytest.mark.parametrize("name", MODELS)
def test_labels_are_the_engines(name, networks, tmp_path):
    plans, array, spacing = MODELS[name]
    folder = write_model(tmp_path / "m", plans=plans)
    plan = read_model(folder).plan
    path = whole_path(networks[f"{len(plan.patch_size)}d"], plan, ())
    labels, _ = assert_same(folder, array, spacing, path=path)
    assert labels.dtype == torch.uint8
    assert array.size == 1 or len(labels.unique()) > 1


@pytest.mark.usefixtures("unoptimised")
@pytest.mark.parametrize("plans", [plans_json(), plans_2d()], ids=["3d", "2d"])
def test_mirroring_is_the_engines(plans, tmp_path):
    folder = write_model(tmp_path / "m", plans=plans, checkpoint={"inference_allowed_mirroring_axes": (1, 0)})
    path = compiled(folder)
    mirrored, _ = assert_same(folder, scan(), SPACING, mirror=True, path=path)
    plain, _ = assert_same(folder, scan(), SPACING, mirror=False, step=0.8, path=path)
    assert not torch.equal(mirrored, plain)


def with_class(regions=False, **head):
    """A multi-task plan and its data set; for regions, the second lies within the first."""
    dataset = dataset_json()
    if regions:
        dataset = dataset_json(labels={"background": 0, "whole": [1, 2], "core": 2}, regions_class_order=[1, 2])
    head = {"class_names": ["a", "b", "c"], "regions": regions, "focus_channels": [1], **head}
    return multi_task(plans_json(), **head), dataset


@pytest.mark.usefixtures("unoptimised")
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("regions", [False, True], ids=["labels", "regions"])
def test_labels_and_class_of_a_case_are_the_engines(aggregation, regions, tmp_path):
    plans, dataset = with_class(regions)
    folder = write_model(tmp_path / "m", plans=plans, dataset=dataset, folds=("0", "1"))
    labels, probabilities = assert_same(folder, scan((7, 16, 21)), SPACING, mirror=True, aggregation=aggregation)
    assert len(labels.unique()) > 1
    assert probabilities.dtype == torch.float32
    assert 0.34 < probabilities.max() < 0.999


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("regions", [False, True], ids=["labels", "regions"])
def test_tiles_count_as_votes_do(aggregation, regions):
    """Logits that differ from tile to tile and from view to view, unlike those of a random network."""
    plan = parse_plan(*with_class(regions, focus_channels=[1, 0]), "3d_fullres")
    path = scan_path(plan, (2,), aggregation)
    assert path.class_names == ["a", "b", "c"]
    assert path.label_names == ([] if regions else ["background", "pancreas", "lesion"])
    votes = Votes(plan.classification, views=2, aggregation=aggregation)
    other = Votes(plan.classification, views=2, aggregation="mean" if aggregation == "foreground" else "foreground")
    generator = torch.Generator().manual_seed(0)

    def network(views):
        level = 3 * torch.randn(2, plan.labels.num_outputs, 1, 1, 1, generator=generator)
        output = NetworkOutput(level.expand(-1, -1, 8, 12, 16), torch.randn(2, 3, generator=generator))
        votes.add(output)
        other.add(output)
        return output

    _, probabilities, _ = stepwise(path, network, scan(), SPACING)
    assert torch.allclose(probabilities, torch.tensor(votes.count().probabilities), atol=1e-6, rtol=0)
    assert not torch.allclose(probabilities, torch.tensor(other.count().probabilities), atol=1e-3, rtol=0)


def test_without_foreground_all_tiles_count_alike():
    plan = parse_plan(*with_class(), "3d_fullres")

    def network(views):
        level = torch.tensor([0.0, -1000.0, 0.0])[None, :, None, None, None]
        network.calls += 1
        return level.expand(1, -1, 8, 12, 16), torch.tensor([[float(network.calls), 0.0, 0.0]])

    network.calls = 0
    _, probabilities, _ = stepwise(scan_path(plan, ()), network, scan(), SPACING)
    mean = torch.tensor([(network.calls + 1) / 2, 0, 0])
    assert network.calls > 10
    assert torch.allclose(probabilities, mean.softmax(0))


def test_several_channels_are_the_engines(tmp_path):
    plans = plans_json(
        normalization_schemes=["CTNormalization", "ZScoreNormalization"], use_mask_for_norm=[False, True]
    )
    dataset = dataset_json(channel_names={"0": "CT", "1": "PET"})
    folder = write_model(tmp_path / "m", plans=plans, dataset=dataset)
    path = compiled(folder)
    assert path.channels == path.path.channels == 2
    array = np.stack([bordered(), np.roll(bordered(), 1, axis=2) ** 2 % 500])
    labels, _ = assert_same(folder, array, SPACING, path=path)
    array[1] = 0
    assert not np.array_equal(assert_same(folder, array, SPACING, path=path)[0], labels)


@pytest.mark.usefixtures("unoptimised")
def test_many_labels_are_int32(tmp_path):
    labels = {"background": 0, **{f"label {value}": value for value in range(1, 320)}}
    folder = write_model(tmp_path / "m", dataset=dataset_json(labels=labels))
    found, _ = assert_same(folder, scan((5, 14, 17)), SPACING)
    assert found.dtype == torch.int32
    assert found.max() > 255


DTYPES = ["bool", "uint8", "uint16", "uint32", "uint64", "int8", "int32", "int64", "float16", "float64"]


def test_every_type_of_voxels_is_taken(tmp_path):
    folder = write_model(tmp_path / "m")
    path = compiled(folder)
    for dtype in DTYPES:
        array = scan() > 50 if dtype == "bool" else (scan() / 3).clip(0 if dtype[0] == "u" else -128, 127)
        assert_same(folder, array.astype(dtype), SPACING, path=path)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = write_model(tmp_path_factory.mktemp("model") / "m", plans=multi_task(plans_json()))
    return folder, compiled(folder)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    shape=st.tuples(*[st.integers(1, 15)] * 3),
    spacing=st.tuples(*[st.sampled_from([1.1, 1.5, 2.0, 2.3, 5.0])] * 3),
    step=st.sampled_from([0.45, 0.5, 1.0]),
    seed=st.integers(0, 99),
)
def test_any_size_and_spacing(model, shape, spacing, step, seed):
    folder, path = model
    assert_same(folder, scan(shape, seed), spacing, step=step, path=path)


def test_a_saved_path_gives_the_same(model, tmp_path):
    folder, path = model
    path.save(str(tmp_path / "path.pt"))
    assert_same(folder, scan(), SPACING, mirror=True, path=loaded(tmp_path / "path.pt"))


def stepwise(path, network, array, spacing):
    """What a C++ program does with a scan path and a network of its own."""
    state = path.start(torch.from_numpy(array)[None], list(spacing), 0.5, True)
    most_held = 0
    for tile in range(state["tiles"].shape[0]):
        with torch.no_grad():
            seg_logits, class_logits = network(path.views(state, tile))
        state = path.add(state, tile, seg_logits, class_logits)
        most_held = max(most_held, state["held"].shape[1])
    return *path.finish(state), most_held


def test_a_program_may_run_the_network_itself(model, tmp_path):
    folder, _ = model
    read = read_model(folder)
    scan_path(read.plan, read.mirror_axes).save(str(tmp_path / "path.pt"))
    path = loaded(tmp_path / "path.pt")
    labels, probabilities, _ = stepwise(path, traced(read), scan(), SPACING)
    expected = Engine.load(folder, device="cpu", backend="torch").predict(Volume.from_array(scan(), SPACING))
    # All views at once add up in another order inside the convolutions.
    assert (labels.numpy() != expected.segmentation).sum() <= 1
    assert torch.allclose(probabilities, torch.tensor(expected.classification.probabilities), atol=1e-5, rtol=0)


def constant_network(views):
    """Logits of the tiny models' shapes; label 1 everywhere."""
    seg_logits = torch.zeros(len(views), 3, *views.shape[2:])
    seg_logits[:, 1] = 1
    return seg_logits, torch.zeros(len(views), 3)


def test_logits_do_not_wait_for_the_end_of_the_scan(model):
    """What is held is what one step of tiles finishes, in a scan of 60 planes as in one of 20."""
    read = read_model(model[0])
    path = scan_path(read.plan, ())
    for planes in (20, 60):
        labels, _, most_held = stepwise(path, constant_network, scan((planes, 12, 16)), (2.2, 1.5, 1.5))
        assert (labels == 1).all()
        assert most_held <= 2


def test_views_are_mirror_images_whatever_was_asked_before(model):
    read = read_model(model[0])
    path = scan_path(read.plan, (0, 2))
    state = path.start(torch.from_numpy(scan((20, 24, 26)))[None], list(SPACING), 0.5, True)
    ahead = [path.views(state, tile) for tile in range(state["tiles"].shape[0])]
    assert len(ahead) > 20
    for tile in (7, 3, 3, 20, 0, 11):
        # In another order, planes are made in other groups, and sums come out a little otherwise.
        assert torch.allclose(path.views(state, tile), ahead[tile], atol=1e-5)
    views = ahead[4]
    assert views.shape == (4, 1, 8, 12, 16)
    for view, axes in zip(views, ((), (1,), (3,), (1, 3)), strict=True):
        assert torch.equal(view, views[0].flip(axes))
    assert not torch.equal(views[1], views[0])


def changed(array, value):
    array = array.astype(np.float32)
    array[0, 4, 5, 6] = value
    return array


@pytest.mark.parametrize(
    ("array", "spacing", "step", "message"),
    [
        (scan(), SPACING, 0.5, r"image must be \(1, Z, Y, X\) and not empty, got \[9, 24, 26\]"),
        (np.zeros((2, 9, 9, 9)), SPACING, 0.5, r"image must be \(1, Z, Y, X\)"),
        (np.zeros((1, 0, 9, 9)), SPACING, 0.5, "not empty"),
        (np.zeros((1, 9, 9, 9), np.complex64), SPACING, 0.5, "must hold real numbers"),
        (changed(scan()[None], np.nan), SPACING, 0.5, "voxels must be finite"),
        (changed(scan()[None], -np.inf), SPACING, 0.5, "voxels must be finite"),
        (scan()[None], (1.0, 1.0), 0.5, "spacing must be three numbers"),
        (scan()[None], (1.0, 0.0, 1.0), 0.5, "spacing must be finite and above 0"),
        (scan()[None], (1.0, float("nan"), 1.0), 0.5, "spacing must be finite and above 0"),
        (scan()[None], (1.0, 1.0, float("inf")), 0.5, "spacing must be finite and above 0"),
        (scan()[None], SPACING, 0.0, r"tile_step_size must be in \(0, 1\]"),
        (scan()[None], SPACING, 1.1, r"tile_step_size must be in \(0, 1\]"),
        (scan()[None], SPACING, float("nan"), r"tile_step_size must be in \(0, 1\]"),
        (scan()[None], (0.01, 1.0, 1.0), 0.5, "at least one voxel along each axis"),
        (scan()[None], (3000.0, 1.5, 1.5), 0.5, "must grow at most 1000 times"),
    ],
)
def test_what_is_no_scan_is_refused(model, array, spacing, step, message):
    with pytest.raises(torch.jit.Error, match=message):
        model[1](torch.from_numpy(array), list(spacing), step)


def test_colours_out_of_range_are_refused():
    plan = parse_plan(normalized_by("RGBTo01Normalization", False), dataset_json(), "3d_fullres")
    path = scan_path(plan, ())
    for value in (-1, 256):
        with pytest.raises(torch.jit.Error, match="from 0 to 255"):
            path.start(torch.full((1, 9, 9, 9), value), list(SPACING), 0.5, False)


def test_what_is_no_answer_of_the_network_is_refused(model):
    read = read_model(model[0])
    path = scan_path(read.plan, read.mirror_axes)
    image = torch.from_numpy(scan((20, 24, 26)))[None]
    state = path.start(image, list(SPACING), 0.5, False)
    seg_logits, class_logits = constant_network(path.views(state, 0))
    with pytest.raises(torch.jit.Error, match=r"seg_logits must be of shape \[1, 3, 8, 12, 16\]"):
        path.add(state, 0, seg_logits[:, :2], class_logits)
    for wrong, got in ((None, "none"), (class_logits[:, :2], r"\[1, 2\]")):
        with pytest.raises(torch.jit.Error, match=rf"class_logits must be of shape \[1, 3\].*{got}"):
            path.add(state, 0, seg_logits, wrong)
    with pytest.raises(torch.jit.Error, match="ascending order, expected 0, got 1"):
        path.add(state, 1, seg_logits, class_logits)
    for tile in (-1, state["tiles"].shape[0]):
        with pytest.raises(torch.jit.Error, match="tile must be from 0"):
            path.views(state, tile)
    state = path.add(state, 0, seg_logits, class_logits)
    with pytest.raises(torch.jit.Error, match="tiles must be added before the case is finished, got 1"):
        path.finish(state)
    with pytest.raises(torch.jit.Error, match="ascending order, expected 1, got 0"):
        path.add(state, 0, seg_logits, class_logits)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_refused(model, value):
    read = read_model(model[0])
    path = scan_path(read.plan, ())

    def broken(views, part):
        answers = constant_network(views)
        answers[part].view(-1)[0] = value
        return answers

    with pytest.raises(torch.jit.Error, match="the network's logits must be finite"):
        stepwise(path, lambda views: broken(views, 0), scan(), SPACING)
    with pytest.raises(torch.jit.Error, match="class logits must be finite"):
        stepwise(path, lambda views: broken(views, 1), scan(), SPACING)


def test_what_a_path_cannot_do_is_refused(model):
    cascade = parse_plan(plans_json(previous_stage="3d_lowres"), dataset_json(), "3d_fullres")
    with pytest.raises(ModelError, match="continues from the labels of 3d_lowres"):
        scan_path(cascade, ())
    turned = {**plans_json(), "image_reader_writer": "NibabelIOWithReorient"}
    with pytest.raises(ModelError, match="reoriented scans"):
        scan_path(parse_plan(turned, dataset_json(), "3d_fullres"), ())
    plan = parse_plan(plans_json(), dataset_json(), "3d_fullres")
    with pytest.raises(ValueError, match="aggregation must be one of foreground, mean, got 'most'"):
        scan_path(plan, (), "most")
    with pytest.raises(TypeError, match="ScriptModule, got Identity"):
        whole_path(torch.nn.Identity(), plan, ())
    with pytest.raises(ModelError, match=r"tuple \(seg_logits,\)"):
        whole_path(traced(read_model(model[0])), plan, ())


def script(function):
    """Compile one of the functions that the engine and the path share."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that torch.jit is deprecated
        return torch.jit.script(function)


LENGTHS = [(n_in, n_out) for n_in in (1, 2, 5, 24, 61) for n_out in (1, 2, 7, 24, 90)]


@pytest.mark.parametrize("kind", [0, 1, 2, 3, 4, 5, "linear", "nearest", "nearest-exact"])
def test_compiled_operators_are_the_engines(kind):
    is_spline = isinstance(kind, int)
    compiled_band, operator_of = (
        (script(spline_band), spline_operator) if is_spline else (script(torch_band), torch_operator)
    )
    for n_in, n_out in LENGTHS:
        first, weights = compiled_band(n_in, n_out, kind, *([PREFILTERS] if is_spline else []))
        operator = operator_of(n_in, n_out, kind)
        assert torch.equal(first, operator.first)
        assert torch.equal(weights, operator.weights)


@pytest.mark.parametrize("old", [(1, 1, 1), (5, 1, 1), (1, 5, 1), (1, 1, 5), (5, 5, 1)])
@pytest.mark.parametrize("separate", [None, True, False])
@pytest.mark.parametrize("order", [0, 1, 2, 3, 4, 5])
def test_resampled_planes_are_the_engines(old, separate, order):
    data = torch.randn(2, 11, 9, 8, generator=torch.Generator().manual_seed(0))
    resampling = Resampling(function="spline", order=order, order_coarse=1, separate=separate)
    for shape in ((11, 9, 8), (20, 7, 12), (5, 9, 70)):
        expected: GridMap = grid_map(resampling, (11, 9, 8), shape, old, (1, 1, 1))
        grid = ScriptResampling(resampling).grid_map([11, 9, 8], list(shape), list(old), [1, 1, 1], data.device)
        assert (grid.last_axis, grid.clip) == (expected.last_axis, expected.clip)
        low, high = script_value_range(data, grid)
        if grid.clip != "none":
            for limit, wanted in zip((low, high), value_range(data, expected), strict=True):
                assert torch.equal(limit, wanted)
        start, stop = 1, shape[0] - 1
        first, last = inputs_of(grid.operators[0], start, stop)
        rows = resample_rows(data[:, first:last], grid, start, stop, first, low, high)
        assert torch.allclose(rows, resample(data, expected)[:, start:stop], atol=1e-6)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(shape=st.tuples(*[st.integers(1, 9)] * 3), share=st.floats(0.3, 0.9), seed=st.integers(0, 999))
def test_masks_and_boxes_are_the_engines(shape, share, seed):
    image = (np.random.default_rng(seed).random((1, *shape)) < share).astype(np.int16)
    occupied = torch.from_numpy(image[0] != 0)
    assert np.array_equal(filled(occupied).numpy(), filled_mask(image))
    assert occupied_box(occupied) == [list(bounds) for bounds in nonzero_box(image)]


def test_a_winding_way_out_is_no_hole():
    """A corridor that turns at every wall: the outside comes in step by step, as far as it goes."""
    solid = torch.ones(3, 15, 9, dtype=torch.bool)
    for wall in range(1, 14):
        if wall % 2:
            solid[1, wall, 1:8] = False
        else:
            solid[1, wall, 1 if wall % 4 else 7] = False
    assert filled(solid).all()
    solid[1, 13, 8] = False  # the door
    assert torch.equal(filled(solid), solid)


@pytest.fixture(scope="module")
def shared_functions():
    """What rounds, or has loops that Python and TorchScript could run differently, compiled."""
    functions = (tile_positions, axis_weights, shape_at_spacing, argmax_labels, region_labels)
    return {function: script(function) for function in functions}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 200), st.integers(0, 300), st.floats(0.05, 1))
def test_compiled_tiles_are_the_engines(shared_functions, patch, more, step):
    positions = tile_positions(patch + more, patch, step)
    assert shared_functions[tile_positions](patch + more, patch, step) == positions
    weights = shared_functions[axis_weights](patch + more, patch, positions)
    expected = axis_weights(patch + more, patch, positions)
    assert all(torch.equal(*pair) for pair in zip(weights, expected, strict=True))


@pytest.mark.parametrize("voxels", [1, 3, 5, 25, 27, 30, 99])
def test_compiled_shapes_are_rounded_half_to_even(shared_functions, voxels):
    shape, spacing = [voxels] * 3, [1.5, 2.5, 0.7]
    expected = [round(voxels * each) for each in spacing]
    assert shape_at_spacing(shape, spacing, [1.0] * 3) == expected
    assert shared_functions[shape_at_spacing](shape, spacing, [1.0] * 3) == expected


@pytest.mark.parametrize("classes", [1, 2, 5, 256, 257])
def test_compiled_labels_are_the_engines(shared_functions, classes):
    logits = torch.randn(classes, 6, 7, generator=torch.Generator().manual_seed(0))
    logits[-1] = logits[0]  # equal logits: the first wins
    labels = shared_functions[argmax_labels](logits)
    assert labels.dtype == argmax_labels(logits).dtype
    assert torch.equal(labels.int(), logits.argmax(0).int())
    values = list(range(classes, 0, -1))
    assert torch.equal(shared_functions[region_labels](logits, values), region_labels(logits, values))


@pytest.mark.slow  # 150 tiles, twice: a minute on two cores
def test_a_real_scan_gives_the_engines_labels():
    image = SHARED / "data" / "abdomen_ct_0000.nii.gz"
    if not (TRAINED_MODEL.exists() and image.exists()):
        pytest.skip("the shared real scans and the model trained on them are not here")
    volume = read_volume(image)
    labels, _ = assert_same(TRAINED_MODEL, volume.array, volume.geometry.spacing)
    assert len(labels.unique()) > 3
