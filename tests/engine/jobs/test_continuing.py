"""Jobs that are started again: what stays, what is made again, and what another has written."""

import json
import os

import numpy as np
import pytest
import SimpleITK as sitk
from nnturbo.engine import Engine
from nnturbo.engine.jobs.cases import find_cases
from nnturbo.engine.jobs.job import Job
from nnturbo.engine.jobs.run import predict_cases

from tests.engine.factory import dataset_json, write_model, write_scan
from tests.engine.jobs.outputs import other_engine, read_records


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


def test_labels_that_appear_while_a_job_goes_on_are_kept(engine, scans, tmp_path):
    out, cases = tmp_path / "out", find_cases(scans, ".nii.gz")

    def meanwhile(event):
        if event.kind == "started":
            write_scan(out / "b.nii.gz", 5)

    outcome = predict_cases(engine, cases, Job(output=out, skip_existing=True), on_event=meanwhile)
    assert (sorted(outcome.done), outcome.kept) == (["a", "c"], {"b": "not written by nnturbo"})
    assert read_records(out)["b"]["status"] == "kept"
