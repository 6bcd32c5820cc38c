"""The path of libnnturbo around networks that Python runs: labels, volumes and classes are the engine's."""

import numpy as np
import pytest
import torch
from nnturbo.engine import Engine, Volume
from nnturbo.engine.model.folder import read_model
from nnturbo.engine.model.folds import inference_network
from nnturbo.engine.model.plans import parse_plan

from tests.engine.export.scripted.models import MODELS
from tests.engine.export.scripted.paths import SPACING, bordered, scan, transposed, with_class
from tests.engine.factory import dataset_json, plans_2d, plans_json, write_model
from tests.kernels.libnnturbo.stages import CANCELLED, StageError, plan_text

pytestmark = pytest.mark.thorough  # the library is built for half a minute


def assert_same(stages, folder, array, spacing, *, mirror=False, step=0.5):
    """Compare the answers of C++ and of the engine, and return the labels."""
    array = array if array.ndim == 4 else array[None]
    engine = Engine.load(folder, device="cpu", backend="torch", mirror=mirror, tile_step_size=step)
    expected = engine.predict(Volume.from_array(array, spacing))
    model = read_model(folder)
    network = inference_network(model)

    def run(tile):
        with torch.no_grad():
            seg_logits, *class_logits = network(torch.from_numpy(tile.reshape(1, len(tile), *model.plan.patch_size)))
        logits = seg_logits[0].reshape(-1, *model.plan.patch_size_3d).numpy()
        return logits, class_logits[0][0].numpy() if class_logits else None

    text = plan_text(model.plan, model.mirror_axes)
    labels, volumes, probabilities = stages.predict(text, array, spacing, run, step=step, mirror=mirror)
    assert labels.dtype == expected.segmentation.dtype
    assert np.array_equal(labels, expected.segmentation)
    assert volumes == pytest.approx(list(expected.volumes_ml.values()), rel=1e-12)
    of_case = expected.classification
    assert probabilities == pytest.approx(of_case.probabilities if of_case else [], abs=1e-6)
    return labels


@pytest.mark.parametrize("name", MODELS)
def test_labels_are_the_engines(name, stages, tmp_path):
    plans, array, spacing = MODELS[name]
    labels = assert_same(stages, write_model(tmp_path / "m", plans=plans), array, spacing)
    assert array.size == 1 or len(np.unique(labels)) > 1


@pytest.mark.parametrize("plans", [plans_json(), plans_2d(), transposed(plans_json(), [2, 0, 1])])
@pytest.mark.parametrize("step", [0.5, 0.8])
def test_mirroring_is_the_engines(plans, step, stages, tmp_path):
    folder = write_model(tmp_path / "m", plans=plans, checkpoint={"inference_allowed_mirroring_axes": (1, 0)})
    mirrored = assert_same(stages, folder, bordered(), SPACING, mirror=True, step=step)
    assert not np.array_equal(mirrored, assert_same(stages, folder, bordered(), SPACING, step=step))


@pytest.mark.parametrize("regions", [False, True], ids=["labels", "regions"])
def test_labels_and_class_of_a_case_are_the_engines(regions, stages, tmp_path):
    plans, dataset = with_class(regions)
    folder = write_model(tmp_path / "m", plans=plans, dataset=dataset, folds=("0", "1"))
    assert len(np.unique(assert_same(stages, folder, scan((7, 16, 21)), SPACING, mirror=True))) > 1


@pytest.mark.parametrize("dtype", [np.uint8, np.float64, np.int32])
def test_several_channels_are_the_engines(dtype, stages, tmp_path):
    plans = plans_json(
        normalization_schemes=["CTNormalization", "ZScoreNormalization"], use_mask_for_norm=[False, True]
    )
    folder = write_model(tmp_path / "m", plans=plans, dataset=dataset_json(channel_names={"0": "CT", "1": "PET"}))
    array = np.stack([bordered(), np.roll(bordered(), 1, axis=2)]).clip(0, 250).astype(dtype)
    assert_same(stages, folder, array, SPACING)


def test_many_labels(stages, tmp_path):
    labels = {"background": 0, **{f"label {value}": value for value in range(1, 320)}}
    folder = write_model(tmp_path / "m", dataset=dataset_json(labels=labels))
    assert assert_same(stages, folder, scan((5, 14, 17)), SPACING).max() > 255


def knows(value):
    """A network of three outputs that gives one number everywhere."""
    return lambda tile: (np.full((3, *tile.shape[1:]), value, np.float32), None)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_no_numbers(value, stages):
    plan = plan_text(parse_plan(plans_json(), dataset_json(), "3d_fullres"))
    with pytest.raises(StageError, match="logits must be finite"):
        stages.predict(plan, scan()[None], SPACING, knows(value))


def test_predictions_are_cancelled(stages):
    plan = plan_text(parse_plan(plans_json(), dataset_json(), "3d_fullres"), (0, 1))
    calls = []

    def network(tile):
        calls.append(tile)
        return knows(1)(tile)

    with pytest.raises(StageError) as raised:
        stages.predict(plan, scan()[None], SPACING, network, cancel_after=3)
    assert raised.value.status == CANCELLED
    assert len(calls) == 3


@pytest.mark.parametrize("step", [0.0, -1.0, 1.01, np.nan])
def test_steps_out_of_range(step, stages):
    plan = plan_text(parse_plan(plans_json(), dataset_json(), "3d_fullres"))
    with pytest.raises(StageError, match=r"tile_step_size must be in \(0, 1\]"):
        stages.predict(plan, scan()[None], SPACING, knows(1), step=step)


def test_identity_network_gives_the_labels_of_the_scan(stages):
    """The logits are the scan and its negative: the label says where it is negative, whatever the tiles and views."""
    plans = plans_json(normalization_schemes=["NoNormalization"], spacing=list(SPACING))
    plan = plan_text(parse_plan(plans, dataset_json(labels={"background": 0, "negative": 1}), "3d_fullres"), (0, 1, 2))
    array = np.random.default_rng(0).normal(size=(1, 19, 17, 33)).astype(np.float32)
    labels, _, _ = stages.predict(plan, array, SPACING, lambda tile: (np.concatenate([tile, -tile]), None))
    assert np.array_equal(labels, array[0] < 0)
