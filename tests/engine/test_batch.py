import gzip
import json
import os
import pickle
import shutil
import signal
import time

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnturbo.engine import Engine, Ensemble, OutputError, Volume, VolumeError, prediction
from nnturbo.engine.backends import NetworkOutput
from nnturbo.engine.batch import predict_cases
from nnturbo.engine.cases import CaseFiles, find_cases
from nnturbo.engine.files import write_json, written_atomically
from nnturbo.engine.jobs import Job

from tests.engine.factory import dataset_json, multi_task, plans_json, random_weights, smooth_scan, write_model


def write_scan(path, seed=0, shape=(8, 14, 16)):
    image = sitk.GetImageFromArray(smooth_scan(shape, seed))
    image.SetSpacing((1.5, 1.5, 2.0))
    sitk.WriteImage(image, str(path))
    return path


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    return Engine.load(write_model(tmp_path_factory.mktemp("model") / "m"), device="cpu", mirror=False)


@pytest.fixture
def scans(tmp_path):
    folder = tmp_path / "scans"
    folder.mkdir()
    for index, name in enumerate("abc"):
        write_scan(folder / f"{name}_0000.nii.gz", index)
    return folder


def read_records(folder):
    return {record["name"]: record for record in json.loads((folder / "predictions.json").read_text())["cases"]}


def test_every_case_is_predicted_written_and_recorded(engine, scans, tmp_path):
    out = tmp_path / "deep" / "out"
    outcome = predict_cases(engine, find_cases(scans, ".nii.gz"), Job(output=out))
    assert outcome.done == ["a", "b", "c"]
    names = {"a.nii.gz", "b.nii.gz", "c.nii.gz", "plans.json", "dataset.json", "predictions.json", "records"}
    assert {path.name for path in out.iterdir()} == names
    for name, record in read_records(out).items():
        labels = sitk.GetArrayFromImage(sitk.ReadImage(str(out / f"{name}.nii.gz")))
        assert np.array_equal(labels, engine.predict(scans / f"{name}_0000.nii.gz").segmentation)
        assert set(np.unique(labels)) == {0, 1, 2}
        assert record["status"] == "done"
        assert record["volumes_ml"]["pancreas"] == pytest.approx((labels == 1).sum() * 4.5e-3)
        assert record["provenance"]["folds"] == ["0"]


def test_one_bad_case_is_named_and_the_rest_is_done(engine, scans, tmp_path):
    (scans / "b_0000.nii.gz").write_bytes(gzip.compress(b"not an image"))
    outcome = predict_cases(engine, find_cases(scans, ".nii.gz"), Job(output=tmp_path / "out"))
    assert outcome.done == ["a", "c"]
    assert list(outcome.failed) == ["b"]
    assert not (tmp_path / "out" / "b.nii.gz").exists()
    record = read_records(tmp_path / "out")["b"]
    assert record["status"] == "failed"
    assert record["error"] == outcome.failed["b"]


def test_wrong_channels_fail_their_case_only(engine, scans, tmp_path):
    write_scan(scans / "b_0001.nii.gz")
    outcome = predict_cases(engine, find_cases(scans, ".nii.gz"), Job(output=tmp_path / "out"))
    assert outcome.done == ["a", "c"]
    assert "1 channel" in outcome.failed["b"]


def test_a_missing_channel_fails_its_case(engine, scans, tmp_path):
    (scans / "b_0000.nii.gz").rename(scans / "b_0001.nii.gz")
    outcome = predict_cases(engine, find_cases(scans, ".nii.gz"), Job(output=tmp_path / "out"))
    assert outcome.done == ["a", "c"]
    assert "b_0000.nii.gz" in outcome.failed["b"]


def test_a_scan_is_never_replaced_by_its_result(engine, tmp_path):
    scan = write_scan(tmp_path / "scan.nii.gz")
    before = scan.read_bytes()
    with pytest.raises(ValueError, match="would replace a file that is read"):
        predict_cases(engine, find_cases(scan, ".nii.gz"), Job(output=tmp_path))
    assert scan.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["scan.nii.gz"]


@pytest.mark.parametrize("failure", [RuntimeError("out of memory\nmore"), None])
def test_a_network_that_fails_or_gives_nonsense_fails_its_case(engine, scans, tmp_path, monkeypatch, failure):
    class Broken:
        calls = 0

        def __call__(self, tiles):
            Broken.calls += 1
            if Broken.calls == 1 and failure:
                raise failure
            logits = torch.zeros(len(tiles), 3, *tiles.shape[2:])
            return NetworkOutput(logits + (float("nan") if Broken.calls == 1 else 0))

    monkeypatch.setattr(engine, "_runner", Broken())
    outcome = predict_cases(engine, find_cases(scans, ".nii.gz"), Job(output=tmp_path / "out"))
    assert outcome.done == ["b", "c"]
    assert ("failed on a tile of (8, 12, 16) voxels: out of memory" if failure else "must be finite") in outcome.failed[
        "a"
    ]
    assert not (tmp_path / "out" / "a.nii.gz").exists()


def test_continuing_leaves_results_alone_and_keeps_their_records(engine, scans, tmp_path):
    out = tmp_path / "out"
    cases = find_cases(scans, ".nii.gz")
    predict_cases(engine, cases[:2], Job(output=out))
    before = (out / "a.nii.gz").stat().st_mtime_ns
    outcome = predict_cases(engine, cases, Job(output=out, skip_existing=True))
    assert (outcome.skipped, outcome.done) == (["a", "b"], ["c"])
    assert (out / "a.nii.gz").stat().st_mtime_ns == before
    assert set(read_records(out)) == {"a", "b", "c"}
    # With probabilities asked for, a case without them is not complete.
    again = predict_cases(engine, cases[:1], Job(output=out, skip_existing=True, save_probabilities=True))
    assert again.done == ["a"]


@pytest.mark.parametrize("change", ["model", "settings", "scan"])
def test_continuing_does_again_what_something_else_has_made(engine, scans, tmp_path, change):
    out, cases = tmp_path / "out", find_cases(scans, ".nii.gz")
    predict_cases(engine, cases, Job(output=out))
    other, expected = engine, ["a", "b", "c"]
    if change == "model":
        model = write_model(tmp_path / "other")
        checkpoint = torch.load(model / "fold_0" / "checkpoint_final.pth", weights_only=False)
        checkpoint["network_weights"] = {name: 2 * of for name, of in checkpoint["network_weights"].items()}
        torch.save(checkpoint, model / "fold_0" / "checkpoint_final.pth")
        other = Engine.load(model, device="cpu", mirror=False)
    elif change == "settings":
        other = Engine.load(engine.model.source, device="cpu", mirror=True)
    else:
        write_scan(scans / "b_0000.nii.gz", 9)
        expected = ["b"]
    outcome = predict_cases(other, cases, Job(output=out, skip_existing=True))
    assert outcome.done == expected
    for name in "abc":
        labels = sitk.GetArrayFromImage(sitk.ReadImage(str(out / f"{name}.nii.gz")))
        assert np.array_equal(labels, other.predict(scans / f"{name}_0000.nii.gz").segmentation)
    assert predict_cases(other, cases, Job(output=out, skip_existing=True)).done == []


def test_labels_of_before_are_gone_where_a_case_fails_now(engine, scans, tmp_path):
    out, cases = tmp_path / "out", find_cases(scans, ".nii.gz")
    predict_cases(engine, cases, Job(output=out, save_probabilities=True))
    (scans / "a_0000.nii.gz").write_bytes(b"")
    for continued in (True, False):
        assert list(predict_cases(engine, cases, Job(output=out, skip_existing=continued)).failed) == ["a"]
        assert not list(out.glob("a.*"))
        assert (out / "b.nii.gz").exists()


def test_what_a_library_raises_while_it_writes_fails_its_case_only(engine, scans, tmp_path, monkeypatch):
    save = prediction.Prediction.save

    def fails(self, path):
        if path.name == "b.nii.gz":
            raise IndexError("list index out of range")
        save(self, path)

    monkeypatch.setattr(prediction.Prediction, "save", fails)
    outcome = predict_cases(engine, find_cases(scans, ".nii.gz"), Job(output=tmp_path / "out"))
    assert outcome.done == ["a", "c"]
    assert outcome.failed == {"b": "its results cannot be written: IndexError: list index out of range"}


def test_an_interrupt_does_not_wait_for_the_case_in_the_network(engine, scans, tmp_path, monkeypatch):
    class Slow:
        tiles = 0

        def __call__(self, tiles):
            Slow.tiles += 1
            if Slow.tiles == 2:
                os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.3)
            return NetworkOutput(torch.zeros(len(tiles), 3, *tiles.shape[2:]))

    write_scan(scans / "a_0000.nii.gz", shape=(80, 28, 32))
    monkeypatch.setattr(engine, "_runner", Slow())
    # Where the tests run in the background, SIGINT is ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    began = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            predict_cases(engine, find_cases(scans, ".nii.gz"), Job(output=tmp_path / "out"))
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - began < 5
    assert Slow.tiles <= 4
    assert not (tmp_path / "out" / "a.nii.gz").exists()


@pytest.mark.parametrize("name", ["plans.json", "dataset.json", "subtype_results.csv"])
def test_files_of_others_in_the_output_folder_are_not_replaced(engine, scans, tmp_path, name):
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text('{"mine": 1}')
    with pytest.raises(OutputError, match=f"{name} is not what this job would write"):
        predict_cases(engine, find_cases(scans, ".nii.gz"), Job(output=out))
    assert (out / name).read_text() == '{"mine": 1}'
    assert [path.name for path in out.iterdir()] == [name]


def test_nothing_is_written_into_a_folder_of_slices(engine, tmp_path):
    (tmp_path / "ct").mkdir()
    for output in (tmp_path / "ct", tmp_path / "ct" / "deeper"):
        with pytest.raises(ValueError, match="lies in .*ct, which is read"):
            predict_cases(engine, [CaseFiles(name="ct", images=(tmp_path / "ct",))], Job(output=output))


def test_a_name_that_is_no_text_fails_its_case(engine, scans, tmp_path):
    source = write_scan(tmp_path / "scan.nii.gz")
    shutil.copy(source, os.fsencode(scans) + b"/x\xe9_0000.nii.gz")
    outcome = predict_cases(engine, find_cases(scans, ".nii.gz"), Job(output=tmp_path / "out"))
    assert outcome.done == ["a", "b", "c"]
    (reason,) = outcome.failed.values()
    assert "need names in UTF-8" in reason


def test_files_that_macos_leaves_are_no_scans(scans):
    (scans / "._a_0000.nii.gz").write_bytes(b"\0\5\x16\7")
    assert [case.name for case in find_cases(scans, ".nii.gz")] == ["a", "b", "c"]


def test_probabilities_are_written_as_nnunet_does(engine, scans, tmp_path):
    out = tmp_path / "out"
    predict_cases(engine, find_cases(scans, ".nii.gz")[:1], Job(output=out, save_probabilities=True))
    probabilities = np.load(out / "a.npz")["probabilities"]
    assert probabilities.shape == (3, 8, 14, 16)
    properties = pickle.loads((out / "a.pkl").read_bytes())
    assert properties["sitk_stuff"]["spacing"] == (1.5, 1.5, 2.0)
    assert properties["bbox_used_for_cropping"] == [[0, 8], [0, 14], [0, 16]]


def test_cases_are_found(tmp_path, scans):
    write_scan(scans / "b_0001.nii.gz")
    (scans / "notes.txt").write_text("x")
    cases = find_cases(scans, ".nii.gz")
    assert [case.name for case in cases] == ["a", "b", "c"]
    assert [path.name for path in cases[1].images] == ["b_0000.nii.gz", "b_0001.nii.gz"]
    (single,) = find_cases(scans / "a_0000.nii.gz", ".nii.gz")
    assert single.name == "a"
    (other,) = find_cases(write_scan(tmp_path / "x.y.mha"), ".nii.gz")
    assert other.name == "x.y"
    (tmp_path / "series").mkdir()
    (dicom,) = find_cases(tmp_path / "series", ".nii.gz")
    assert (dicom.name, dicom.images) == ("series", (tmp_path / "series",))


def test_files_without_a_channel_number_are_named(scans):
    write_scan(scans / "d.nii.gz")
    with pytest.raises(VolumeError, match=r"1 do not, such as d\.nii\.gz"):
        find_cases(scans, ".nii.gz")
    with pytest.raises(VolumeError, match="does not exist"):
        find_cases(scans / "nowhere", ".nii.gz")


def test_the_same_name_twice_is_refused(engine, tmp_path):
    case = CaseFiles(name="a", images=(tmp_path / "a_0000.nii.gz",))
    with pytest.raises(ValueError, match="a come more than once"):
        predict_cases(engine, [case, case], Job(output=tmp_path / "out"))


def test_an_output_folder_that_cannot_be_made_stops_at_once(engine, scans, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="cannot be made"):
        predict_cases(engine, find_cases(scans, ".nii.gz"), Job(output=tmp_path / "file" / "out"))


def fill_disk_at(monkeypatch, name):
    """Let the disk be full halfway through a segmentation."""
    write = prediction.write_segmentation

    def full(path, labels, geometry):
        if path.name == f"{name}.nii.gz":
            with written_atomically(path) as temporary:
                temporary.write_bytes(b"half")
                raise OSError(28, "No space left on device")
        write(path, labels, geometry)

    monkeypatch.setattr(prediction, "write_segmentation", full)


def test_a_disk_that_fills_up_stops_the_run_and_leaves_nothing_half_written(engine, scans, tmp_path, monkeypatch):
    out, cases = tmp_path / "out", find_cases(scans, ".nii.gz")
    with monkeypatch.context() as patch:
        fill_disk_at(patch, "b")
        outcome = predict_cases(engine, cases, Job(output=out))
    assert "No space left" in outcome.stopped
    # The one after it may be on its way to the disk at that moment.
    assert (outcome.done, outcome.left) in ((["a"], ["b", "c"]), (["a", "c"], ["b"]))
    assert outcome.failed == {}
    assert sorted(path.name for path in out.glob("*.nii.gz")) == [f"{name}.nii.gz" for name in outcome.done]
    assert not list(out.glob(".*"))
    assert {name: record["status"] for name, record in read_records(out).items()} == dict.fromkeys(outcome.done, "done")
    again = predict_cases(engine, cases, Job(output=out, skip_existing=True))
    assert (again.skipped, again.done, again.stopped) == (outcome.done, outcome.left, None)


def test_a_disk_that_fills_up_leaves_finished_cases_out_of_it(engine, scans, tmp_path, monkeypatch):
    cases = find_cases(scans, ".nii.gz")
    predict_cases(engine, cases[2:], Job(output=tmp_path / "out"))
    fill_disk_at(monkeypatch, "a")
    outcome = predict_cases(engine, cases, Job(output=tmp_path / "out", skip_existing=True))
    assert outcome.skipped == ["c"]
    assert outcome.left[0] == "a"
    assert read_records(tmp_path / "out")["c"]["status"] == "done"


def test_records_that_are_not_ours_are_not_overwritten(engine, scans, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "predictions.json").write_text("mine")
    with pytest.raises(OutputError, match="Move it away"):
        predict_cases(engine, find_cases(scans, ".nii.gz"), Job(output=out))
    assert (out / "predictions.json").read_text() == "mine"


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A model that does not say the same of all scans: its logits are centred on them."""
    folder = tmp_path_factory.mktemp("classifier") / "m"
    plans = multi_task(plans_json(), class_names=["benign", "low", "high"])
    weights = random_weights(plans, dataset_json())
    engine = Engine.load(
        write_model(folder, plans=plans, checkpoint={"network_weights": weights}), device="cpu", mirror=False
    )
    volumes = [Volume.from_array(smooth_scan((8, 14, 16), seed), (2.0, 1.5, 1.5)) for seed in range(3)]
    logits = torch.tensor([engine.predict(volume).classification.logits for volume in volumes])
    last_bias = [name for name in weights if name.startswith("head.") and name.endswith(".bias")][-1]
    weights[last_bias] -= logits.mean(0)
    write_model(folder, plans=plans, checkpoint={"network_weights": weights})
    return Engine.load(folder, device="cpu", mirror=False)


class TestSubtypes:
    def answers(self, engine, scans):
        """Rows as they must be, from predictions of their own; the cases do not all have the same class."""
        rows = {
            name: f"{name}.nii.gz,{engine.predict(scans / f'{name}_0000.nii.gz').classification.label}"
            for name in "abc"
        }
        assert len({row[-1] for row in rows.values()}) > 1
        return rows

    def rows(self, folder, name="subtype_results.csv"):
        header, *rows = (folder / name).read_text().splitlines()
        assert header == "Names,Subtype"
        return rows

    def test_every_case_has_a_row_and_a_record(self, classifier, scans, tmp_path):
        cases = find_cases(scans, ".nii.gz")[::-1]
        predict_cases(classifier, cases, Job(output=tmp_path / "out"))
        assert self.rows(tmp_path / "out") == list(self.answers(classifier, scans).values())
        for name, record in read_records(tmp_path / "out").items():
            answer = classifier.predict(scans / f"{name}_0000.nii.gz").classification
            assert record["classification"] == {
                "label": answer.label,
                "name": ("benign", "low", "high")[answer.label],
                "probabilities": dict(zip(("benign", "low", "high"), answer.probabilities, strict=True)),
                "logits": list(answer.logits),
            }

    def test_classes_that_are_numbers_are_written_as_they_are(self, scans, tmp_path):
        engine = Engine.load(
            write_model(tmp_path / "m", plans=multi_task(plans_json(), class_names=["1", "2", "7"])),
            device="cpu",
            mirror=False,
        )
        predict_cases(engine, find_cases(scans, ".nii.gz"), Job(output=tmp_path / "out"))
        names = [engine.predict(scans / f"{name}_0000.nii.gz").classification.name for name in "abc"]
        assert [row.split(",")[1] for row in self.rows(tmp_path / "out")] == names

    def test_a_model_without_classification_has_no_table(self, engine, scans, tmp_path):
        predict_cases(engine, find_cases(scans, ".nii.gz"), Job(output=tmp_path / "out"))
        assert not (tmp_path / "out" / "subtype_results.csv").exists()
        assert "classification" not in read_records(tmp_path / "out")["a"]

    def test_continuing_keeps_earlier_rows(self, classifier, scans, tmp_path):
        out, cases, rows = tmp_path / "out", find_cases(scans, ".nii.gz"), self.answers(classifier, scans)
        predict_cases(classifier, cases[:2], Job(output=out))
        assert self.rows(out) == [rows["a"], rows["b"]]
        outcome = predict_cases(classifier, cases[1:], Job(output=out, skip_existing=True))
        assert (outcome.skipped, outcome.done) == (["b"], ["c"])
        assert self.rows(out) == list(rows.values())
        (out / "subtype_results.csv").unlink()
        outcome = predict_cases(classifier, cases, Job(output=out, skip_existing=True))
        assert (outcome.skipped, outcome.done) == (["a", "b", "c"], [])
        assert self.rows(out) == list(rows.values())

    @pytest.mark.parametrize("loss", ["no records", "no record", "no class", "other classes", "no such class"])
    def test_a_result_without_its_class_is_predicted_again(self, classifier, scans, tmp_path, loss):
        out, cases = tmp_path / "out", find_cases(scans, ".nii.gz")
        predict_cases(classifier, cases, Job(output=out))
        path = out / "records" / "b.json"
        record = json.loads(path.read_text())
        if loss == "no class":
            del record["classification"]
        elif loss == "other classes":
            record["classification"]["probabilities"] = {"x": 1.0}
        elif loss == "no such class":
            record["classification"]["label"] = 3
        write_json(path, record)
        if loss == "no record":
            path.unlink()
        elif loss == "no records":
            shutil.rmtree(out / "records")
        outcome = predict_cases(classifier, cases, Job(output=out, skip_existing=True))
        assert outcome.done == (["a", "b", "c"] if loss == "no records" else ["b"])
        assert self.rows(out) == list(self.answers(classifier, scans).values())

    def test_failed_cases_have_no_row(self, classifier, scans, tmp_path):
        rows = self.answers(classifier, scans)
        (scans / "a_0000.nii.gz").write_bytes(b"")
        outcome = predict_cases(classifier, find_cases(scans, ".nii.gz"), Job(output=tmp_path / "out"))
        assert list(outcome.failed) == ["a"]
        assert self.rows(tmp_path / "out") == [rows["b"], rows["c"]]
        write_scan(scans / "a_0000.nii.gz", 0)
        again = predict_cases(
            classifier, find_cases(scans, ".nii.gz"), Job(output=tmp_path / "out", skip_existing=True)
        )
        assert again.done == ["a"]
        assert self.rows(tmp_path / "out") == list(rows.values())

    def test_a_case_whose_labels_cannot_be_written_has_no_row(self, classifier, scans, tmp_path, monkeypatch):
        rows = self.answers(classifier, scans)
        fill_disk_at(monkeypatch, "b")
        outcome = predict_cases(classifier, find_cases(scans, ".nii.gz"), Job(output=tmp_path / "out"))
        assert self.rows(tmp_path / "out") == [rows[name] for name in outcome.done]
        assert "b" not in outcome.done

    def test_the_table_is_there_from_the_start(self, classifier, scans, tmp_path):
        out, seen = tmp_path / "out", []
        predict_cases(
            classifier,
            find_cases(scans, ".nii.gz"),
            Job(output=out),
            tell=lambda event: seen.append((event["event"], len(self.rows(out)))) if seen or event["event"] == "tiles"
            else None,
        )  # fmt: skip
        assert seen[0] == ("tiles", 0)
        assert len(self.rows(out)) == 3

    def test_an_ensemble_writes_its_own_answer(self, engine, classifier, scans, tmp_path):
        ensemble = Ensemble([engine, classifier])
        predict_cases(ensemble, find_cases(scans, ".nii.gz"), Job(output=tmp_path / "out"))
        assert self.rows(tmp_path / "out") == list(self.answers(ensemble, scans).values())
        assert len(read_records(tmp_path / "out")["a"]["provenance"]["models"]) == 2


class TestWrittenAtomically:
    def test_nothing_appears_before_the_end_nor_after_a_failure(self, tmp_path):
        path = tmp_path / "result.json"
        path.write_text("old")

        def fail():
            with written_atomically(path) as temporary:
                temporary.write_text("new")
                assert path.read_text() == "old"
                raise KeyError

        with pytest.raises(KeyError):
            fail()
        assert [p.name for p in tmp_path.iterdir()] == ["result.json"]
        assert path.read_text() == "old"

    def test_a_full_disk_is_said(self, tmp_path, monkeypatch):
        def full(descriptor):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("os.fsync", full)
        with pytest.raises(OutputError, match=r"a\.json cannot be written: No space left on device"):
            write_json(tmp_path / "a.json", {})
        assert list(tmp_path.iterdir()) == []

    def test_a_missing_folder_is_said(self, tmp_path):
        with pytest.raises(OutputError, match="cannot be written: No such file"):
            write_json(tmp_path / "no" / "a.json", {})

    def test_permissions_are_those_of_any_new_file(self, tmp_path):
        write_json(tmp_path / "a.json", {})
        (tmp_path / "b.json").write_text("{}")
        assert (tmp_path / "a.json").stat().st_mode == (tmp_path / "b.json").stat().st_mode
