import gzip
import json
import os
import pickle
import shutil
import signal
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnturbo.engine import Engine, OutputError
from nnturbo.engine.files import written_atomically
from nnturbo.engine.jobs.case_record import Record
from nnturbo.engine.jobs.cases import CaseFiles, find_cases
from nnturbo.engine.jobs.job import Job, ModelInfo
from nnturbo.engine.jobs.run import predict_cases, run_job
from nnturbo.engine.model.runner import NetworkOutput
from nnturbo.engine.pipeline import prediction

from tests.engine.factory import dataset_json, smooth_scan, write_model


def write_scan(path, seed=0, shape=(8, 14, 16)):
    image = sitk.GetImageFromArray(smooth_scan(shape, seed))
    image.SetSpacing((1.5, 1.5, 2.0))
    sitk.WriteImage(image, str(path))
    return path


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

    monkeypatch.setattr(engine._segmenter, "runner", Broken())
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


def other_engine(tmp_path):
    """A model of the same kind with other weights."""
    model = write_model(tmp_path / "other")
    checkpoint = torch.load(model / "fold_0" / "checkpoint_final.pth", weights_only=False)
    checkpoint["network_weights"] = {name: 2 * of for name, of in checkpoint["network_weights"].items()}
    torch.save(checkpoint, model / "fold_0" / "checkpoint_final.pth")
    return Engine.load(model, device="cpu", mirror=False)


@pytest.mark.parametrize("change", ["model", "settings", "scan"])
def test_continuing_makes_again_what_something_else_has_made_only_where_asked(engine, scans, tmp_path, change):
    out, cases = tmp_path / "out", find_cases(scans, ".nii.gz")
    predict_cases(engine, cases, Job(output=out))
    other, expected = engine, ["a", "b", "c"]
    if change == "model":
        other = other_engine(tmp_path)
    elif change == "settings":
        other = Engine.load(engine.model.source, device="cpu", mirror=True)
    else:
        write_scan(scans / "b_0000.nii.gz", 9)
        expected = ["b"]
    before = {path.name: path.read_bytes() for path in out.glob("*.nii.gz")}
    outcome = predict_cases(other, cases, Job(output=out, skip_existing=True))
    assert (outcome.done, list(outcome.kept)) == ([], expected)
    assert {path.name: path.read_bytes() for path in out.glob("*.nii.gz")} == before
    outcome = predict_cases(other, cases, Job(output=out, skip_existing=True, redo_outdated=True))
    assert (outcome.done, outcome.kept) == (expected, {})
    for name in "abc":
        labels = sitk.GetArrayFromImage(sitk.ReadImage(str(out / f"{name}.nii.gz")))
        assert np.array_equal(labels, other.predict(scans / f"{name}_0000.nii.gz").segmentation)
    outcome = predict_cases(other, cases, Job(output=out, skip_existing=True))
    assert (outcome.done, outcome.kept) == ([], {})


def correct(path):
    """Write labels as a person who corrects them does."""
    image = sitk.ReadImage(str(path))
    image[1:4, 1:4, 1:4] = 2
    sitk.WriteImage(image, str(path))
    return path.read_bytes()


@pytest.mark.parametrize("redo_outdated", [False, True])
def test_continuing_touches_no_labels_that_nnturbo_did_not_write(engine, scans, tmp_path, redo_outdated):
    out, cases = tmp_path / "out", find_cases(scans, ".nii.gz")
    out.mkdir()
    write_scan(out / "c.nii.gz")  # as nnU-Net leaves it, without a record
    predict_cases(engine, cases[:2], Job(output=out))
    before = {"a.nii.gz": correct(out / "a.nii.gz"), "c.nii.gz": (out / "c.nii.gz").read_bytes()}
    (out / "b.nii.gz").write_bytes((out / "b.nii.gz").read_bytes()[:-20])
    other = other_engine(tmp_path)
    outcome = predict_cases(other, cases, Job(output=out, skip_existing=True, redo_outdated=redo_outdated))
    assert outcome.done == ["b"]
    assert outcome.kept == {"a": "changed since nnturbo wrote it", "c": "not written by nnturbo"}
    assert {name: (out / name).read_bytes() for name in before} == before
    table = json.loads((out / "predictions.json").read_text())
    assert table["kept"] == {"count": 2, "names": ["a", "c"]}
    # Without that flag, everything is made again.
    assert predict_cases(other, cases, Job(output=out)).done == ["a", "b", "c"]
    assert json.loads((out / "predictions.json").read_text())["kept"] == {"count": 0, "names": []}


@pytest.mark.parametrize("damage", ["stopped at once", "stopped in the second", "failed"])
def test_results_are_replaced_only_by_their_successors(engine, scans, tmp_path, monkeypatch, damage):
    out, cases = tmp_path / "out", find_cases(scans, ".nii.gz")
    predict_cases(engine, cases, Job(output=out, save_probabilities=True))
    before = {path.name: path.read_bytes() for path in out.glob("[abc].*")}
    assert len(before) == 9
    other = other_engine(tmp_path)
    if damage == "failed":
        (scans / "a_0000.nii.gz").write_bytes(b"")
        assert list(predict_cases(other, cases[:1], Job(output=out, save_probabilities=True)).failed) == ["a"]
        replaced = ""
    else:

        def stop(event):
            if event.kind == ("tiles" if damage == "stopped at once" else "done"):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            predict_cases(other, cases, Job(output=out, save_probabilities=True, readers=0, writers=0), on_event=stop)
        replaced = "" if damage == "stopped at once" else "a"
    after = {path.name: path.read_bytes() for path in out.glob("[abc].*")}
    assert after.keys() == before.keys()
    assert {name[0] for name in after if after[name] != before[name]} == set(replaced)


def test_a_case_that_failed_is_tried_again_and_keeps_what_it_had(engine, scans, tmp_path):
    out, cases = tmp_path / "out", find_cases(scans, ".nii.gz")
    predict_cases(engine, cases, Job(output=out, save_probabilities=True))
    scan, before = (scans / "a_0000.nii.gz").read_bytes(), (out / "a.nii.gz").read_bytes()
    (scans / "a_0000.nii.gz").write_bytes(b"")
    assert list(predict_cases(engine, cases, Job(output=out, save_probabilities=True)).failed) == ["a"]
    assert (out / "a.nii.gz").read_bytes() == before
    record = read_records(out)["a"]
    assert (record["status"], sorted(record["results"])) == ("failed", ["a.nii.gz", "a.npz", "a.pkl"])
    (scans / "a_0000.nii.gz").write_bytes(scan)
    outcome = predict_cases(engine, cases, Job(output=out, skip_existing=True, save_probabilities=True))
    assert outcome.done == ["a"]
    assert read_records(out)["a"]["status"] == "done"


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
    monkeypatch.setattr(engine._segmenter, "runner", Slow())
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
        with pytest.raises(ValueError, match="lies in .*ct, which is an input"):
            predict_cases(engine, [CaseFiles(name="ct", images=(tmp_path / "ct",))], Job(output=output))


def test_a_name_that_is_no_text_fails_its_case(engine, scans, tmp_path):
    source = write_scan(tmp_path / "scan.nii.gz")
    shutil.copy(source, os.fsencode(scans) + b"/x\xe9_0000.nii.gz")
    outcome = predict_cases(engine, find_cases(scans, ".nii.gz"), Job(output=tmp_path / "out"))
    assert outcome.done == ["a", "b", "c"]
    (reason,) = outcome.failed.values()
    assert "need names in UTF-8" in reason


def test_probabilities_are_written_as_nnunet_does(engine, scans, tmp_path):
    out = tmp_path / "out"
    predict_cases(engine, find_cases(scans, ".nii.gz")[:1], Job(output=out, save_probabilities=True))
    probabilities = np.load(out / "a.npz")["probabilities"]
    assert probabilities.shape == (3, 8, 14, 16)
    properties = pickle.loads((out / "a.pkl").read_bytes())
    assert properties["sitk_stuff"]["spacing"] == (1.5, 1.5, 2.0)
    assert properties["bbox_used_for_cropping"] == [[0, 8], [0, 14], [0, 16]]


def test_the_same_name_twice_is_refused(engine, tmp_path):
    case = CaseFiles(name="a", images=(tmp_path / "a_0000.nii.gz",))
    with pytest.raises(ValueError, match="a come more than once"):
        predict_cases(engine, [case, case], Job(output=tmp_path / "out"))


@pytest.mark.parametrize("link", [True, False])
def test_a_scan_under_another_name_is_not_replaced_either(engine, tmp_path, link):
    (tmp_path / "out").mkdir()
    scan = write_scan(tmp_path / "out" / "a.nii.gz")
    source = tmp_path / "a_0000.nii.gz"
    if link:
        source.symlink_to(scan)
    else:
        source.hardlink_to(scan)
    with pytest.raises(ValueError, match="would replace a file that is read"):
        predict_cases(engine, find_cases(source, ".nii.gz"), Job(output=tmp_path / "out"))


def test_the_output_must_be_a_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="must be a folder for the segmentations, .*file is a file"):
        Job(output=tmp_path / "file")


@pytest.fixture(scope="module")
def of_detached(tmp_path_factory):
    """A model whose scans and labels have their voxels in a second file."""
    folder = tmp_path_factory.mktemp("detached") / "m"
    return Engine.load(write_model(folder, dataset=dataset_json(file_ending=".nhdr")), device="cpu", mirror=False)


def test_the_voxels_of_a_scan_are_not_replaced_by_those_of_its_labels(of_detached, tmp_path):
    write_scan(tmp_path / "scan.nrrd")
    sitk.WriteImage(sitk.ReadImage(str(tmp_path / "scan.nrrd")), str(tmp_path / "a.nhdr"), useCompression=True)
    (tmp_path / "scan.nrrd").unlink()
    (tmp_path / "a.nhdr").rename(tmp_path / "a_0000.nhdr")
    before = (tmp_path / "a.raw.gz").read_bytes()
    with pytest.raises(ValueError, match=r"a\.raw\.gz would replace a file that is read"):
        predict_cases(of_detached, find_cases(tmp_path, ".nhdr", tmp_path), Job(output=tmp_path))
    assert (tmp_path / "a.raw.gz").read_bytes() == before


def test_a_scan_whose_voxels_change_in_their_own_file_is_another_one(of_detached, tmp_path):
    (tmp_path / "in").mkdir()
    write_scan(tmp_path / "in" / "a_0000.nhdr")
    cases = find_cases(tmp_path / "in", ".nhdr")
    assert predict_cases(of_detached, cases, Job(output=tmp_path / "out")).done == ["a"]
    header = (tmp_path / "in" / "a_0000.nhdr").stat()
    write_scan(tmp_path / "in" / "a_0000.nhdr", 5)
    os.utime(tmp_path / "in" / "a_0000.nhdr", ns=(header.st_atime_ns, header.st_mtime_ns))
    outcome = predict_cases(of_detached, cases, Job(output=tmp_path / "out", skip_existing=True))
    assert list(outcome.kept) == ["a"]


@pytest.mark.parametrize("obstacle", ["a folder", "a long name"])
def test_one_name_that_cannot_be_written_fails_its_case_only(engine, scans, tmp_path, obstacle):
    out = tmp_path / "out"
    name = "b" if obstacle == "a folder" else "b" * 252
    if obstacle == "a folder":
        (out / "b.nii.gz").mkdir(parents=True)
    cases = [replace(case, name=name) if case.name == "b" else case for case in find_cases(scans, ".nii.gz")]
    outcome = predict_cases(engine, cases, Job(output=out))
    assert outcome.stopped is None
    assert sorted(outcome.done) == ["a", "c"]
    assert "cannot be written" in outcome.failed[name]


def test_labels_that_appear_while_a_job_goes_on_are_kept(engine, scans, tmp_path):
    out, cases = tmp_path / "out", find_cases(scans, ".nii.gz")

    def meanwhile(event):
        if event.kind == "started":
            write_scan(out / "b.nii.gz", 5)

    outcome = predict_cases(engine, cases, Job(output=out, skip_existing=True), on_event=meanwhile)
    assert (sorted(outcome.done), outcome.kept) == (["a", "c"], {"b": "not written by nnturbo"})
    assert read_records(out)["b"]["status"] == "kept"


@pytest.mark.parametrize(("failure", "reason"), [(MemoryError(), "MemoryError"), (ValueError("odd"), "ValueError odd")])
def test_labels_are_there_where_the_rest_cannot_be_written(engine, scans, tmp_path, monkeypatch, failure, reason):
    def full(*arguments, **named):
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez_compressed", full)
        outcome = predict_cases(engine, find_cases(scans, ".nii.gz")[:1], Job(output=tmp_path, save_probabilities=True))
    assert outcome.failed == {"a": "its labels are written, but no .npz file: " + reason}
    assert (tmp_path / "a.nii.gz").exists()
    again = predict_cases(
        engine, find_cases(scans, ".nii.gz")[:1], Job(output=tmp_path, save_probabilities=True, skip_existing=True)
    )
    assert again.done == ["a"]


def test_a_stop_looks_at_the_record_of_each_case_alone(tmp_path):
    class Full:
        info = ModelInfo(models=(), file_ending=".nii.gz", class_names=None, previous_stage=None, plans={}, dataset={})

        def __call__(self, cases, *, on_event, alone):
            raise OutputError("the disk is full")
            yield

    cases = [CaseFiles(name=f"c{index}", images=(tmp_path / "x",)) for index in range(2000)]
    record_folder = Full.info.record_folder(Job(output=tmp_path / "out"))
    record_folder.begin()
    for case in cases:
        record_folder.write(Record(name=case.name, status="failed", error="why"))
    steps = 0

    def count(frame, event, argument):
        nonlocal steps
        steps += 1

    sys.setprofile(count)
    try:
        outcome = run_job(Full(), cases, Job(output=tmp_path / "out"))
    finally:
        sys.setprofile(None)
    assert len(outcome.left) == 2000
    assert steps < 2500 * len(cases)


def test_a_job_of_many_cases_begins_at_once(tmp_path):
    class Stopped(Exception):
        pass

    class Nobody:
        info = ModelInfo(models=(), file_ending=".nii.gz", class_names=None, previous_stage=None, plans={}, dataset={})

        def __call__(self, cases, *, on_event, alone):
            raise Stopped

    cases = [CaseFiles(name=f"c{index}", images=(tmp_path / f"c{index}_0000.nii.gz",)) for index in range(20_000)]
    steps = 0

    def count(frame, event, argument):
        nonlocal steps
        steps += 1

    sys.setprofile(count)
    try:
        with pytest.raises(Stopped):
            run_job(Nobody(), cases, Job(output=tmp_path / "out"))
    finally:
        sys.setprofile(None)
    assert steps < 100 * len(cases)


def test_an_output_folder_that_cannot_be_made_stops_at_once(engine, scans, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="cannot be made"):
        predict_cases(engine, find_cases(scans, ".nii.gz"), Job(output=tmp_path / "file" / "out"))


def fill_disk_at(monkeypatch, name):
    """Let the disk be full halfway through a segmentation."""
    write = prediction.write_segmentation

    def full(path, labels, geometry, **options):
        if path.name == f"{name}.nii.gz":
            with written_atomically(path) as temporary:
                temporary.write_bytes(b"half")
                raise OSError(28, "No space left on device")
        write(path, labels, geometry, **options)

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
