import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnturbo.engine import BackendUnavailable, Engine, EngineOptions, Volume, VolumeError, write_segmentation
from nnturbo.engine.model.resampling_function import Resampling
from nnturbo.engine.model.runner import NetworkOutput
from nnturbo.engine.pipeline.labels import resampled_planes
from nnturbo.engine.pipeline.resampling import grid_map, resample
from nnturbo.engine.pipeline.timing import Timings

from tests.engine.factory import dataset_json, plans_json, smooth_scan, write_model

SPACING = (3.0, 1.2, 1.2)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "m", folds=("0", "1"))


@pytest.fixture(scope="module")
def scan():
    return Volume.from_array(smooth_scan((9, 24, 26)), SPACING, name="scan")


def test_predict_gives_labels_on_the_scans_grid_and_says_how(model, scan):
    prediction = Engine.load(model, device="cpu").predict(scan, save_probabilities=True)
    assert prediction.segmentation.shape == (9, 24, 26)
    assert prediction.segmentation.dtype == np.uint8
    assert len(np.unique(prediction.segmentation)) > 1
    assert prediction.probabilities.shape == (3, 9, 24, 26)
    assert np.allclose(prediction.probabilities.sum(0), 1, atol=1e-5)
    assert np.array_equal(prediction.probabilities.argmax(0), prediction.segmentation)
    assert set(prediction.timings) == {"read", "preprocess", "stitch", "network", "labels"}
    assert prediction.provenance[0].backend == "torch"
    assert prediction.provenance[0].precision == "fp32"
    assert prediction.provenance[0].mirror_views == 8
    voxels = (prediction.segmentation == 2).sum()
    assert prediction.volumes_ml["lesion"] == pytest.approx(voxels * 3.0 * 1.2 * 1.2 / 1000)


def test_labels_are_the_same_however_they_are_computed(model, scan):
    expected = Engine.load(model, device="cpu").predict(scan).segmentation
    batched = Engine.load(model, device="cpu", options=EngineOptions(views_per_call=8)).predict(scan)
    with_probabilities = Engine.load(model, device="cpu").predict(scan, save_probabilities=True)
    # Other batch sizes add up in another order inside the convolutions.
    assert (batched.segmentation != expected).sum() <= 1
    assert np.array_equal(with_probabilities.segmentation, expected)


def test_folds_are_averaged_as_logits(model, scan):
    both = Engine.load(model, device="cpu", mirror=False).predict(scan, save_probabilities=True).probabilities
    single = [
        np.log(
            Engine.load(model, folds=[fold], device="cpu", mirror=False)
            .predict(scan, save_probabilities=True)
            .probabilities
        )
        for fold in (0, 1)
    ]
    mean = np.exp((single[0] + single[1]) / 2)
    assert np.abs(both - mean / mean.sum(0)).max() < 1e-5


def test_a_network_that_knows_the_answer(model, scan, tmp_path):
    """A network that answers with its input, on a grid that is the scan's: labels are thresholds of the scan."""
    plans = plans_json(spacing=list(SPACING))
    folder = write_model(tmp_path / "m", plans=plans)
    engine = Engine.load(folder, device="cpu")

    class Threshold:
        def __call__(self, tiles):
            return NetworkOutput(torch.cat([torch.zeros_like(tiles), tiles, 2 * tiles - 0.5], dim=1))

    engine.segmenter.runner = Threshold()
    normalized = (np.clip(scan.array[0].astype(np.float32), -150, 250) - 50) / 60
    expected = np.where(normalized > 0.5, 2, np.where(normalized > 0, 1, 0))
    result = engine.predict(scan).segmentation
    near = np.minimum(np.abs(normalized), np.abs(normalized - 0.5)) < 1e-4
    assert np.array_equal(result[~near], expected[~near])


def test_bf16_is_close_to_fp32_and_recorded(model, scan):
    exact = Engine.load(model, device="cpu").predict(scan)
    rounded = Engine.load(model, device="cpu", precision="bf16").predict(scan)
    assert rounded.provenance[0].precision == "bf16"
    assert (exact.segmentation != rounded.segmentation).mean() < 0.05


def test_regions_are_painted_in_their_order(tmp_path, scan):
    dataset = dataset_json(labels={"background": 0, "whole": [1, 2], "core": 2}, regions_class_order=[1, 2])
    prediction = Engine.load(write_model(tmp_path / "m", dataset=dataset), device="cpu").predict(
        scan, save_probabilities=True
    )
    whole, core = prediction.probabilities > 0.5
    assert np.array_equal(prediction.segmentation, np.where(core, 2, np.where(whole, 1, 0)))
    both = np.isin(prediction.segmentation, (1, 2)).sum()
    assert prediction.volumes_ml["whole"] == pytest.approx(both * np.prod(SPACING) / 1000)


@pytest.mark.parametrize(
    ("labels", "order", "values"),
    [
        ({"background": 0, "whole": 3, "core": 7}, None, {"whole": [1], "core": [2]}),
        ({"background": 0, "whole": [1, 2], "core": 2}, [3, 5], {"whole": [3, 5], "core": [5]}),
    ],
)
def test_volumes_are_those_of_the_values_that_are_written(tmp_path, scan, labels, order, values):
    dataset = dataset_json(labels=labels, **({} if order is None else {"regions_class_order": order}))
    prediction = Engine.load(write_model(tmp_path / "m", dataset=dataset), device="cpu").predict(scan)
    counts = {name: np.isin(prediction.segmentation, value).sum() for name, value in values.items()}
    assert min(counts.values()) > 0
    assert prediction.volumes_ml == pytest.approx({n: c * np.prod(SPACING) / 1000 for n, c in counts.items()})


@pytest.mark.parametrize("old", [(1, 1, 1), (5, 1, 1), (1, 1, 5)])
@pytest.mark.parametrize("order", [0, 1, 3])
def test_planes_resampled_as_they_come_are_those_of_the_whole(old, order):
    logits = torch.randn(4, 13, 9, 8, generator=torch.Generator().manual_seed(0))
    for shape in ((13, 9, 8), (20, 7, 12), (5, 9, 15), (1, 1, 1)):
        grid = grid_map(Resampling(function="spline", order=order, separate=None), (13, 9, 8), shape, old, (1, 1, 1))
        slabs = (logits[:, a:b] for a, b in ((0, 4), (4, 5), (5, 13)))
        planes = torch.stack(list(resampled_planes(slabs, grid, Timings())), dim=1)
        assert torch.allclose(planes, resample(logits, grid), atol=1e-5)


def test_files_lists_and_volumes_give_the_same(model, scan, tmp_path):
    image = sitk.GetImageFromArray(scan.array[0])
    image.SetSpacing(SPACING[::-1])
    path = tmp_path / "a_0000.nii.gz"
    sitk.WriteImage(image, str(path))
    engine = Engine.load(model, device="cpu", mirror=False)
    results = [engine.predict(source).segmentation for source in (scan, path, str(path), [path])]
    assert all(np.array_equal(result, results[0]) for result in results)


def test_wrong_channel_count_is_refused(model):
    two = Volume.from_array(np.zeros((2, 8, 8, 8), np.int16), SPACING, name="two")
    with pytest.raises(VolumeError, match=r"two.*1 channel"):
        Engine.load(model, device="cpu").predict(two)


def test_an_array_without_spacing_is_refused(model):
    with pytest.raises(TypeError, match="needs its spacing"):
        Engine.load(model, device="cpu").predict(np.zeros((8, 8, 8)))


def cascade(tmp_path):
    plans = plans_json(previous_stage="3d_lowres")
    dataset = dataset_json()
    return write_model(tmp_path / "cascade", plans=plans, dataset=dataset)


def test_a_cascade_needs_and_uses_the_previous_stage(tmp_path, scan):
    engine = Engine.load(cascade(tmp_path), device="cpu", mirror=False)
    with pytest.raises(VolumeError, match="continues from the labels of 3d_lowres"):
        engine.predict(scan)
    elsewhere = Volume.from_array(np.zeros((9, 24, 26), np.uint8), (9, 9, 9))
    write_segmentation(tmp_path / "labels.nii.gz", elsewhere.array[0], elsewhere.geometry)
    with pytest.raises(VolumeError, match="must lie where the scan lies"):
        engine.predict(scan, previous_stage=tmp_path / "labels.nii.gz")
    with pytest.raises(VolumeError, match="must lie on the scan's grid"):
        engine.predict(scan, previous_stage=np.zeros((3, 3, 3), np.uint8))
    empty = engine.predict(scan, previous_stage=np.zeros((9, 24, 26), np.uint8))
    full = engine.predict(scan, previous_stage=np.ones((9, 24, 26), np.uint8))
    assert (empty.segmentation != full.segmentation).any()


def test_a_model_without_a_previous_stage_takes_none(model, scan):
    with pytest.raises(ValueError, match="no previous stage"):
        Engine.load(model, device="cpu").predict(scan, previous_stage=np.zeros((9, 24, 26), np.uint8))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"precision": "fp8"}, ValueError, "precision must be auto or one of"),
        ({"precision": "fp16", "device": "cpu"}, BackendUnavailable, "fp16 needs a GPU"),
        ({"backend": "magic"}, ValueError, "backend must be auto or one of native, openvino, torch, inductor"),
        ({"device": "toaster"}, ValueError, "device must be"),
        ({"device": "meta"}, ValueError, "device must be"),
        ({"device": "cuda:99"}, BackendUnavailable, "is not there"),
        ({"tile_step_size": 0}, ValueError, "tile_step_size"),
    ],
)
def test_arguments_out_of_range_are_refused(model, arguments, error, message):
    with pytest.raises(error, match=message):
        Engine.load(model, **{"device": "cpu", **arguments})


def test_options_are_checked():
    with pytest.raises(ValueError, match="at least 1"):
        EngineOptions(views_per_call=0)
