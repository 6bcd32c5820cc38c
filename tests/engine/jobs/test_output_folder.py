"""Output folders: files of others in them, scans that would be replaced, disks that are full."""

import errno
from dataclasses import replace

import numpy as np
import pytest
from nnturbo.engine import OutputError, files
from nnturbo.engine.jobs.cases import CaseFiles, find_cases
from nnturbo.engine.jobs.job import Job
from nnturbo.engine.jobs.run import predict_cases

from tests.engine.factory import write_scan
from tests.engine.jobs.outputs import fill_disk_at, read_records


def test_a_scan_is_never_replaced_by_its_result(engine, tmp_path):
    scan = write_scan(tmp_path / "scan.nii.gz")
    before = scan.read_bytes()
    with pytest.raises(ValueError, match="would replace a file that is read"):
        predict_cases(engine, find_cases(scan, ".nii.gz"), Job(output=tmp_path))
    assert scan.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["scan.nii.gz"]


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


@pytest.mark.parametrize("opened", ["b.nii.gz", "b.npz"])
def test_a_result_that_another_program_has_open_is_written_at_the_second_try(
    engine, scans, tmp_path, monkeypatch, opened
):
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    put, once = files.Path.replace, []

    def replace_file(self, target):
        if target.name == opened and len(once) < 7:  # every attempt of the first try
            once.append(target)
            raise OSError(errno.EBUSY, "Device or resource busy")
        return put(self, target)

    monkeypatch.setattr(files.Path, "replace", replace_file)
    outcome = predict_cases(engine, find_cases(scans, ".nii.gz"), Job(output=tmp_path / "out", save_probabilities=True))
    assert (sorted(outcome.done), outcome.failed, len(once)) == (["a", "b", "c"], {}, 7)
    assert (tmp_path / "out" / opened).exists()


def test_an_output_folder_that_cannot_be_made_stops_at_once(engine, scans, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="cannot be made"):
        predict_cases(engine, find_cases(scans, ".nii.gz"), Job(output=tmp_path / "file" / "out"))


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
