"""A path of TorchScript step by step, as a program with a network of its own runs it, and what it refuses."""

import numpy as np
import pytest
import torch
from nnturbo.engine import Engine, ModelError, Volume
from nnturbo.engine.export.scripted.path import scan_path
from nnturbo.engine.export.scripted.whole_path import whole_path
from nnturbo.engine.model.folder import read_model
from nnturbo.engine.model.plans import parse_plan
from nnturbo.engine.model.runner import NetworkOutput
from nnturbo.engine.options import AGGREGATIONS
from nnturbo.engine.pipeline.voting import Votes

from tests.engine.export.scripted.paths import SPACING, loaded, normalized_by, scan, stepwise, traced, with_class
from tests.engine.factory import dataset_json, plans_json


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


def test_a_program_may_run_the_network_itself(multi_task_path, tmp_path):
    folder, _ = multi_task_path
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


def test_logits_do_not_wait_for_the_end_of_the_scan(multi_task_path):
    """What is held is what one step of tiles finishes, in a scan of 60 planes as in one of 20."""
    read = read_model(multi_task_path[0])
    path = scan_path(read.plan, ())
    for planes in (20, 60):
        labels, _, most_held = stepwise(path, constant_network, scan((planes, 12, 16)), (2.2, 1.5, 1.5))
        assert (labels == 1).all()
        assert most_held <= 2


def test_views_are_mirror_images_whatever_was_asked_before(multi_task_path):
    read = read_model(multi_task_path[0])
    path = scan_path(read.plan, (0, 2))
    state = path.start(torch.from_numpy(scan((20, 24, 26)))[None], list(SPACING), 0.5, True)
    ahead = [path.views(state, tile) for tile in range(state.tiles.shape[0])]
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
def test_what_is_no_scan_is_refused(multi_task_path, array, spacing, step, message):
    with pytest.raises(torch.jit.Error, match=message):
        multi_task_path[1](torch.from_numpy(array), list(spacing), step)


def test_colours_out_of_range_are_refused():
    plan = parse_plan(normalized_by("RGBTo01Normalization", False), dataset_json(), "3d_fullres")
    path = scan_path(plan, ())
    for value in (-1, 256):
        with pytest.raises(torch.jit.Error, match="from 0 to 255"):
            path.start(torch.full((1, 9, 9, 9), value), list(SPACING), 0.5, False)


def test_what_is_no_answer_of_the_network_is_refused(multi_task_path):
    read = read_model(multi_task_path[0])
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
    for tile in (-1, state.tiles.shape[0]):
        with pytest.raises(torch.jit.Error, match="tile must be from 0"):
            path.views(state, tile)
    state = path.add(state, 0, seg_logits, class_logits)
    with pytest.raises(torch.jit.Error, match="tiles must be added before the case is finished, got 1"):
        path.finish(state)
    with pytest.raises(torch.jit.Error, match="ascending order, expected 1, got 0"):
        path.add(state, 0, seg_logits, class_logits)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_refused(multi_task_path, value):
    read = read_model(multi_task_path[0])
    path = scan_path(read.plan, ())

    def broken(views, part):
        answers = constant_network(views)
        answers[part].view(-1)[0] = value
        return answers

    with pytest.raises(torch.jit.Error, match="the network's logits must be finite"):
        stepwise(path, lambda views: broken(views, 0), scan(), SPACING)
    with pytest.raises(torch.jit.Error, match="class logits must be finite"):
        stepwise(path, lambda views: broken(views, 1), scan(), SPACING)


def test_what_a_path_cannot_do_is_refused(multi_task_path):
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
        whole_path(traced(read_model(multi_task_path[0])), plan, ())
