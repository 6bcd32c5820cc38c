"""Jobs of many cases: each is predicted, written and recorded, and one that fails leaves the others alone."""

import gzip
import os
import pickle
import shutil
import signal
import sys
import time

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnturbo.engine import OutputError
from nnturbo.engine.jobs.case_record import Record
from nnturbo.engine.jobs.cases import CaseFiles, find_cases
from nnturbo.engine.jobs.job import Job, ModelInfo
from nnturbo.engine.jobs.run import predict_cases, run_job
from nnturbo.engine.jobs.worker_pool import QueuedEngine
from nnturbo.engine.model.runner import NetworkOutput
from nnturbo.engine.pipeline import loading, prediction

from tests.engine.factory import write_scan
from tests.engine.jobs.outputs import read_records

INFO = ModelInfo(
    models=(), file_ending=".nii.gz", reader="SimpleITKIO", class_names=None, previous_stage=None, plans={}, dataset={}
)


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

    monkeypatch.setattr(engine.segmenter, "runner", Broken())
    outcome = predict_cases(engine, find_cases(scans, ".nii.gz"), Job(output=tmp_path / "out"))
    assert outcome.done == ["b", "c"]
    assert ("failed on a tile of (8, 12, 16) voxels: out of memory" if failure else "must be finite") in outcome.failed[
        "a"
    ]
    assert not (tmp_path / "out" / "a.nii.gz").exists()


@pytest.mark.parametrize("readers", [0, 3])
@pytest.mark.parametrize("where", ["read", "network"])
def test_an_error_in_the_code_fails_its_case_only_and_is_not_tried_again(
    engine, scans, tmp_path, monkeypatch, where, readers
):
    """A process that takes cases one by one has no next case to read when the last one fails."""
    read_volume, calls = loading.read_volume, []

    def read(image, **how):
        calls.append(str(image))
        if where == "read" and "b_0000" in str(image):
            raise TypeError("a bug")
        return read_volume(image, **how)

    def compute(prepared, *arguments):
        if where == "network" and prepared.properties["shape_before_cropping"][0] == 9:
            raise TypeError("a bug")
        return segmenter(prepared, *arguments)

    segmenter = engine.segmenter
    write_scan(scans / "b_0000.nii.gz", shape=(9, 14, 16))
    monkeypatch.setattr(loading, "read_volume", read)
    monkeypatch.setattr(engine, "segmenter", compute)
    job = Job(output=tmp_path / "out", readers=readers, writers=readers)
    queued = QueuedEngine(engine, job, lambda event: None)
    queued.info.record_folder(job).begin()
    futures = [queued.submit(case) for case in find_cases(scans, ".nii.gz")]
    a, b, c = (future.result(timeout=60) for future in futures)
    queued.close()
    assert (a.status, b.status, c.status) == ("done", "failed", "done")
    assert (b.error, b.transient) == ("unexpected error: TypeError: a bug", False)
    assert len(calls) == 3


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


@pytest.mark.posix("signals")
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
    monkeypatch.setattr(engine.segmenter, "runner", Slow())
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


NO_MODEL = ModelInfo(
    models=(), file_ending=".nii.gz", reader="SimpleITKIO", class_names=None, previous_stage=None, plans={}, dataset={}
)


def test_a_stop_looks_at_the_record_of_each_case_alone(tmp_path):
    class Full:
        info = NO_MODEL

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
        info = NO_MODEL

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
