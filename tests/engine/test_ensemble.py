"""Several models together, against averages by hand."""

import gc
import weakref

import nibabel
import numpy as np
import pytest
from nnturbo.engine import Engine, EngineOptions, Ensemble, ModelError, Volume, VolumeError
from nnturbo.engine import ensemble as module
from nnturbo.engine.model.labels import parse_labels
from nnturbo.engine.pipeline.labels import segment_probabilities

from tests.engine.factory import dataset_json, multi_task, plans_2d, plans_json, smooth_scan, write_model

REGIONS = {"labels": {"background": 0, "whole": [1, 2], "core": 2}, "regions_class_order": [1, 2]}


@pytest.fixture(scope="module")
def scan():
    return Volume.from_array(smooth_scan((9, 20, 24)), (3.0, 1.2, 1.2), name="scan")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two models of other weights, one of them for slices."""
    folder = tmp_path_factory.mktemp("models")
    return write_model(folder / "3d"), write_model(folder / "2d", plans=plans_2d())


def load(folder):
    return Engine.load(folder, device="cpu", mirror=False)


def together(*folders):
    return Ensemble.load(folders, device="cpu", mirror=False)


def test_two_equal_models_give_what_one_gives(models, scan):
    one = load(models[0]).predict(scan, save_probabilities=True)
    two = together(models[0], models[0]).predict(scan, save_probabilities=True)
    assert np.array_equal(two.segmentation, one.segmentation)
    assert two.segmentation.dtype == one.segmentation.dtype
    assert np.array_equal(two.probabilities, one.probabilities)
    assert two.geometry == one.geometry
    assert two.classification is None


def test_probabilities_are_averaged_on_the_scans_grid(models, scan):
    single = [load(folder).predict(scan, save_probabilities=True) for folder in models]
    both = together(*models).predict(scan, save_probabilities=True)
    mean = sum(prediction.probabilities.astype(np.float64) for prediction in single) / 2
    assert np.allclose(both.probabilities, mean, atol=1e-6)
    best = np.sort(mean, axis=0)
    clear = best[-1] - best[-2] > 1e-5
    assert clear.mean() > 0.99
    assert np.array_equal(both.segmentation[clear], mean.argmax(0)[clear])
    for prediction in single:
        assert (both.segmentation != prediction.segmentation).any()


def test_each_model_sees_the_scan_as_its_own_reader_does(tmp_path):
    """The sform mirrors the patient; ITK goes by the qform, nibabel by the sform."""
    folders = [
        write_model(tmp_path / reader, plans=plans_json() | {"image_reader_writer": reader})
        for reader in ("SimpleITKIOWithReorient", "NibabelIOWithReorient")
    ]
    qform, sform = np.diag([1.2, 1.2, 3, 1]), np.diag([-1.2, 1.2, 3, 1])
    qform[:3, 3], sform[:3, 3] = (-30, 20, 5), (30, 20, 5)
    image = nibabel.Nifti1Image(smooth_scan((9, 20, 24)).transpose(2, 1, 0), sform)
    image.set_qform(qform, 1)
    image.set_sform(sform, 2)
    nibabel.save(image, tmp_path / "scan.nii.gz")
    single = [load(folder).predict(tmp_path / "scan.nii.gz", save_probabilities=True) for folder in folders]
    used = ["qform is used", "sform is used"]
    assert all(word in answer.warnings[0] for word, answer in zip(used, single, strict=True))
    for first in (0, 1):
        ensemble = together(folders[first], folders[1 - first])
        both = ensemble.predict(tmp_path / "scan.nii.gz", save_probabilities=True)
        (many,) = ensemble.predict_many([tmp_path / "scan.nii.gz"], save_probabilities=True)
        np.testing.assert_allclose(both.probabilities, sum(each.probabilities for each in single) / 2, atol=1e-6)
        np.testing.assert_array_equal(both.probabilities, many.probabilities)
        assert both.geometry == many.geometry == single[first].geometry
        as_read = both.probabilities[..., ::-1] if first == 1 else both.probabilities
        np.testing.assert_array_equal(both.reader_probabilities, as_read)
        assert set(both.warnings) == {warning for each in single for warning in each.warnings}


def test_a_scan_that_one_reader_refuses_is_refused(tmp_path):
    folders = [
        write_model(tmp_path / reader, plans=plans_json() | {"image_reader_writer": reader})
        for reader in ("NibabelIO", "SimpleITKIO")
    ]
    affine = np.diag([1.2, 1.2, 3, 1])
    affine[0, 1] = 0.3
    nibabel.save(nibabel.Nifti1Image(smooth_scan((9, 20, 24)).transpose(2, 1, 0), affine), tmp_path / "scan.nii.gz")
    assert load(folders[0]).predict(tmp_path / "scan.nii.gz").segmentation.shape == (9, 20, 24)
    with pytest.raises(VolumeError, match=r"scan\.nii\.gz: .*axes are sheared"):
        together(*folders).predict(tmp_path / "scan.nii.gz")


def test_regions_are_painted_where_their_mean_exceeds_one_half(tmp_path, scan):
    dataset = dataset_json(**REGIONS)
    folders = [
        write_model(tmp_path / name, dataset=dataset, plans=plans)
        for name, plans in (("a", plans_json()), ("b", plans_2d()))
    ]
    single = [load(folder).predict(scan, save_probabilities=True).probabilities for folder in folders]
    both = together(*folders).predict(scan, save_probabilities=True)
    whole, core = mean = (single[0] + single[1]) / 2
    assert np.allclose(both.probabilities, mean, atol=1e-6)
    assert np.array_equal(both.segmentation, np.where(core > 0.5, 2, np.where(whole > 0.5, 1, 0)))
    assert set(np.unique(both.segmentation)) == {0, 1, 2}


def test_one_half_is_not_more_than_one_half():
    labels = parse_labels(REGIONS)
    edge = np.nextafter(np.float32(0.5), np.float32(1))
    probabilities = np.array([[0.5, edge, 1, 0], [0, 0.5, edge, edge]], np.float32).reshape(2, 1, 1, 4)
    assert segment_probabilities(probabilities, labels).ravel().tolist() == [0, 1, 2, 2]


def test_probabilities_are_kept_only_if_asked_for_and_never_all_at_once(models, scan, monkeypatch):
    alive, most = [], []
    add = module._add

    def watched(engine, *arguments):
        answer, total = add(engine, *arguments)
        alive.append(weakref.ref(total))
        return answer, total

    predict = Engine.predict

    def counted(engine, *arguments, **named):
        prediction = predict(engine, *arguments, **named)
        alive.append(weakref.ref(prediction.probabilities))
        gc.collect()
        most.append(len({id(array()) for array in alive if array() is not None}))
        return prediction

    monkeypatch.setattr(module, "_add", watched)
    monkeypatch.setattr(Engine, "predict", counted)
    prediction = together(*models, models[0], models[1]).predict(scan)
    assert prediction.probabilities is None
    assert most == [1, 2, 2, 2]


def test_a_prediction_lists_its_models_and_adds_their_times(models, scan):
    ensemble = together(*models)
    prediction = ensemble.predict(scan)
    assert [each.model for each in prediction.provenance] == [str(folder) for folder in models]
    assert {"read", "preprocess", "network", "stitch", "labels", "ensemble"} == set(prediction.timings)
    assert prediction.timings["network"] > 0
    assert ensemble.model.source == models[0]


def test_progress_reaches_the_end_once_and_never_goes_back(models, scan):
    seen = []
    together(*models).predict(scan, progress=lambda done, total: seen.append((done, total)))
    done = [count for count, _ in seen]
    assert {total for _, total in seen} == {1000}
    assert done == sorted(done)
    assert done.count(1000) == 1
    assert done[-1] == 1000
    assert 500 in done  # where the first model ends


class TestClassification:
    def test_probabilities_of_the_models_with_a_head_are_averaged(self, models, scan, tmp_path):
        heads = [
            write_model(tmp_path / kind, plans=multi_task(plans, kind=kind))
            for kind, plans in (("gap_linear", plans_json()), ("attention", plans_2d()))
        ]
        single = [load(folder).predict(scan).classification for folder in heads]
        ensemble = together(models[0], *heads)
        assert ensemble.class_names == ("0", "1", "2")
        answer = ensemble.predict(scan).classification
        mean = np.mean([one.probabilities for one in single], axis=0)
        assert answer.probabilities == pytest.approx(tuple(mean), abs=1e-9)
        assert answer.label == mean.argmax()
        assert np.abs(mean - single[0].probabilities).max() > 1e-3

    def test_other_classes_are_refused(self, tmp_path):
        folders = [
            write_model(tmp_path / name, plans=multi_task(plans_json(), class_names=["x", "y", name])) for name in "ab"
        ]
        with pytest.raises(ModelError, match=r"must agree on classes: .*a has .*'a'\), .*b has .*'b'\)"):
            together(*folders)


class TestAgreement:
    @pytest.mark.parametrize(
        ("dataset", "plans", "what"),
        [
            ({"labels": {"background": 0, "pancreas": 2, "lesion": 1}}, {}, "labels"),
            ({"labels": {"background": 0, "pancreas": 1, "cyst": 2}}, {}, "labels"),
            (REGIONS, {}, "labels"),
            ({"channel_names": {"0": "MR"}}, {}, "channels"),
            ({"file_ending": ".nrrd"}, {}, "the file ending"),
            ({}, {"previous_stage": "3d_lowres"}, "the previous stage"),
        ],
    )
    def test_what_differs_is_named_with_both_models(self, tmp_path, dataset, plans, what):
        one = write_model(tmp_path / "one")
        other = write_model(tmp_path / "other", dataset=dataset_json(**dataset), plans=plans_json(**plans))
        with pytest.raises(ModelError, match=f"must agree on {what}: {one} has .*, {other} has"):
            together(one, other)

    def test_the_order_of_regions_matters_and_that_of_labels_does_not(self, tmp_path):
        swapped = {"background": 0, "core": 2, "whole": [1, 2]}
        one = write_model(tmp_path / "one", dataset=dataset_json(**REGIONS))
        other = write_model(tmp_path / "other", dataset=dataset_json(**{**REGIONS, "labels": swapped}))
        with pytest.raises(ModelError, match="must agree on labels"):
            together(one, other)
        turned = {"background": 0, "lesion": 2, "pancreas": 1}
        plain = write_model(tmp_path / "plain"), write_model(tmp_path / "turned", dataset=dataset_json(labels=turned))
        assert len(together(*plain).engines) == 2

    def test_no_model_is_refused(self):
        with pytest.raises(ValueError, match="one or more models"):
            Ensemble([])

    def test_another_loader_is_refused_since_it_reads_for_one_model(self, models):
        with pytest.raises(ValueError, match="reads with the exact loader, got 'dali'"):
            Ensemble.load(models, device="cpu", options=EngineOptions(loader="dali"))


def test_a_cascade_is_handed_the_previous_stage(tmp_path, scan):
    plans = plans_json(previous_stage="3d_lowres")
    folders = [write_model(tmp_path / name, plans=plans) for name in "ab"]
    ensemble = together(*folders)
    with pytest.raises(VolumeError, match="continues from the labels of 3d_lowres"):
        ensemble.predict(scan)
    empty, full = (
        ensemble.predict(scan, previous_stage=np.full((9, 20, 24), value, np.uint8)).segmentation for value in (0, 1)
    )
    assert (empty != full).any()
    assert np.array_equal(
        full, load(folders[0]).predict(scan, previous_stage=np.ones((9, 20, 24), np.uint8)).segmentation
    )


def test_a_wrong_scan_is_refused(models):
    two = Volume.from_array(np.zeros((2, 8, 8, 8), np.int16), (1, 1, 1), name="two")
    with pytest.raises(VolumeError, match=r"two.*1 channel"):
        together(*models).predict(two)
