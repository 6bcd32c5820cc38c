"""The path as TorchScript gives the labels and the class that `Engine.predict` gives."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nnturbo.engine import read_volume
from nnturbo.engine.export.scripted.whole_path import whole_path
from nnturbo.engine.model.folder import read_model
from nnturbo.engine.options import AGGREGATIONS

from tests.engine.export.scripted.models import MODELS
from tests.engine.export.scripted.paths import (
    SPACING,
    assert_same,
    bordered,
    compiled,
    loaded,
    scan,
    traced,
    with_class,
)
from tests.engine.factory import dataset_json, plans_2d, plans_json, write_model
from tests.paths import SHARED, TRAINED_MODEL


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


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    shape=st.tuples(*[st.integers(1, 15)] * 3),
    spacing=st.tuples(*[st.sampled_from([1.1, 1.5, 2.0, 2.3, 5.0])] * 3),
    step=st.sampled_from([0.45, 0.5, 1.0]),
    seed=st.integers(0, 99),
)
def test_any_size_and_spacing(multi_task_path, shape, spacing, step, seed):
    folder, path = multi_task_path
    assert_same(folder, scan(shape, seed), spacing, step=step, path=path)


def test_a_saved_path_gives_the_same(multi_task_path, tmp_path):
    folder, path = multi_task_path
    path.save(str(tmp_path / "path.pt"))
    assert_same(folder, scan(), SPACING, mirror=True, path=loaded(tmp_path / "path.pt"))


@pytest.mark.slow  # 150 tiles, twice: a minute on two cores
def test_a_real_scan_gives_the_engines_labels():
    image = SHARED / "data" / "abdomen_ct_0000.nii.gz"
    if not (TRAINED_MODEL.exists() and image.exists()):
        pytest.skip("the shared real scans and the model trained on them are not here")
    volume = read_volume(image)
    labels, _ = assert_same(TRAINED_MODEL, volume.array, volume.geometry.spacing)
    assert len(labels.unique()) > 3
