"""Records of cases: which results are trusted, which are kept, and the tables made of the records."""

import json
import os
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from nnturbo.engine import Classification, OutputError
from nnturbo.engine.jobs.case_record import DONE, FAILED, KEPT, WRITING, Fingerprint, Record
from nnturbo.engine.jobs.made_of import FileStamp, MadeOf
from nnturbo.engine.jobs.records import CaseState, RecordFolder
from nnturbo.engine.scans.geometry import Geometry
from nnturbo.engine.scans.volume import write_segmentation

from tests.engine.factory import provenance

MADE_OF = MadeOf(models=(provenance().settings,), inputs={"a": (FileStamp("a", 1, 2),), "b": None})
OTHER = replace(MADE_OF, inputs={"a": (FileStamp("a", 1, 3),)})
ANSWER = Classification.from_logits([-1.0, 2.0], ["low", "high"])
GEOMETRY = Geometry(spacing=(1, 1, 1), origin=(0, 0, 0), direction=(1, 0, 0, 0, 1, 0, 0, 0, 1))


@pytest.fixture
def record_folder(tmp_path):
    made = RecordFolder(output=tmp_path, file_ending=".nii.gz", class_names=None)
    made.begin()
    return made


def labels(path, value=1):
    write_segmentation(path, np.full((2, 3, 4), value, np.uint8), GEOMETRY)
    return path


def finish(record_folder, name="a", extra=(), **more):
    """Do what a job does when a case is done; `extra` are endings of further files."""
    folder = record_folder.output / "staged"
    folder.mkdir()
    labels(folder / f"{name}.nii.gz")
    for ending in extra:
        (folder / f"{name}{ending}").write_bytes(b"extra")
    files = [*(f"{name}{ending}" for ending in extra), f"{name}.nii.gz"]
    record_folder.publish(Record(name=name, status=DONE, made_of=MADE_OF, **more), folder, files)
    folder.rmdir()
    return [record_folder.output / file for file in files]


def cases(record_folder):
    return json.loads((record_folder.output / "predictions.json").read_text())["cases"]


def test_a_case_is_done_when_its_record_and_its_results_say_so(record_folder):
    path = record_folder.output / "a.nii.gz"
    assert record_folder.state("a", [path], MADE_OF) == CaseState()
    assert finish(record_folder) == [path]
    assert record_folder.state("a", [path], MADE_OF) == CaseState(is_done=True)
    assert record_folder.state("b", [record_folder.output / "b.nii.gz"], MADE_OF) == CaseState()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda path: path.unlink(), CaseState()),
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), CaseState()),
        (lambda path: path.write_bytes(b""), CaseState()),
        (lambda path: labels(path, 2), CaseState(kept="changed since nnturbo wrote it")),
        (lambda path: path.write_bytes(b"no image at all" * 99), CaseState(kept="changed since nnturbo wrote it")),
        (lambda path: (path.unlink(), path.mkdir()), None),
    ],
    ids=["gone", "cut off", "empty", "corrected", "something else", "a folder"],
)
def test_labels_that_are_not_those_of_the_record_are_kept_if_they_are_whole(record_folder, change, expected):
    (path,) = finish(record_folder)
    change(path)
    found = record_folder.state("a", [path], MADE_OF, redo_outdated=True)
    if expected is None:
        assert "cannot be read" in found.kept
    else:
        assert found == expected


@pytest.mark.parametrize("is_whole", [True, False])
@pytest.mark.parametrize("record", ["none", "failed", "damaged", "kept"])
def test_labels_without_a_record_are_kept_if_they_are_whole(record_folder, record, is_whole):
    path = labels(record_folder.output / "a.nii.gz")
    if record == "failed":
        record_folder.write(Record(name="a", status=FAILED, error="why"))
    elif record == "kept":
        record_folder.write(Record(name="a", status=KEPT, kept="not written by nnturbo"))
    elif record == "damaged":
        (record_folder.output / "records" / "a.json").write_text("{")
    if not is_whole:
        path.write_bytes(path.read_bytes()[:-5])
    expected = CaseState(kept="not written by nnturbo") if is_whole else CaseState()
    assert record_folder.state("a", [path], MADE_OF) == expected


def test_results_of_something_else_are_kept_unless_they_are_to_be_made_again(record_folder):
    (path,) = finish(record_folder)
    found = record_folder.state("a", [path], OTHER)
    assert "another model, other settings or another version" in found.kept
    assert record_folder.state("a", [path], OTHER, redo_outdated=True) == CaseState()
    labels(path, 2)
    assert record_folder.state("a", [path], OTHER, redo_outdated=True).kept == "changed since nnturbo wrote it"


def test_results_asked_for_and_not_there_are_made_and_changed_ones_kept(record_folder):
    (path,) = finish(record_folder)
    extra = record_folder.output / "a.npz"
    assert record_folder.state("a", [extra, path], MADE_OF) == CaseState()
    assert "another model" in record_folder.state("a", [extra, path], OTHER).kept
    extra.write_bytes(b"of somebody else")
    assert record_folder.state("a", [extra, path], MADE_OF).kept == "its .npz file is not what nnturbo wrote"


def test_a_case_that_failed_is_tried_again_and_what_it_had_before_stays_known(record_folder):
    (path,) = finish(record_folder)
    record_folder.fail(Record(name="a", status=FAILED, error="out of memory"))
    assert path.exists()
    assert record_folder.read("a").results == {"a.nii.gz": Fingerprint.of(path)}
    assert record_folder.state("a", [path], MADE_OF) == CaseState()
    labels(path, 2)
    assert record_folder.state("a", [path], MADE_OF).kept == "changed since nnturbo wrote it"


def test_a_correction_that_leaves_one_of_two_files_as_it_was_is_kept(record_folder):
    """A header is the same byte for byte when its voxels are corrected."""
    results = finish(record_folder, extra=[".zraw"])
    results[0].write_bytes(b"corrected")
    for status in (DONE, FAILED):
        record_folder.write(replace(record_folder.read("a"), status=status, error="why"))
        assert record_folder.state("a", results, MADE_OF).kept == "its .zraw file is not what nnturbo wrote"


def test_a_result_that_is_a_link_to_nothing_is_kept(record_folder):
    path = record_folder.output / "a.nii.gz"
    path.symlink_to(record_folder.output / "unmounted" / "a.nii.gz")
    assert record_folder.state("a", [path], MADE_OF).kept == "a link to a file that does not exist"


def test_what_nnturbo_wrote_beside_replaced_labels_goes_with_them(record_folder):
    extra, path = finish(record_folder, extra=[".npz"])
    foreign = record_folder.output / "a.pkl"
    foreign.write_bytes(b"of somebody else")
    finish(record_folder)
    assert path.exists()
    assert not extra.exists()
    assert foreign.exists()


def test_results_are_known_to_be_ones_own(tmp_path):
    record_folder = RecordFolder(output=tmp_path, file_ending=".nii.gz", class_names=None)
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "c0.json").write_text('{"patient": "data"}')
    assert not record_folder.has_own()
    record_folder.begin()
    finish(record_folder)
    assert record_folder.has_own()


class TestInterrupted:
    """A job is killed after each step of putting two results in place of earlier ones."""

    @pytest.fixture
    def interrupted(self, record_folder, monkeypatch):
        def interrupt(steps):
            results = finish(record_folder, extra=[".npz"])
            folder = record_folder.output / "staged"
            folder.mkdir()
            labels(folder / "a.nii.gz", 2)
            (folder / "a.npz").write_bytes(b"new extra")
            left = iter(range(steps))
            replace_file = type(folder).replace

            def maybe(path, target):
                if folder in path.parents and next(left, None) is None:
                    raise KeyboardInterrupt
                return replace_file(path, target)

            with monkeypatch.context() as patch:
                patch.setattr(type(folder), "replace", maybe)
                with pytest.raises(KeyboardInterrupt):
                    record_folder.publish(Record(name="a", status=DONE, made_of=MADE_OF), folder, ["a.npz", "a.nii.gz"])
            return results

        return interrupt

    @pytest.mark.parametrize("steps", [0, 1])
    def test_what_is_half_replaced_is_made_again(self, record_folder, interrupted, steps):
        results = interrupted(steps)
        assert record_folder.read("a").status == WRITING
        assert record_folder.state("a", results, MADE_OF) == CaseState()
        record_folder.collect()
        assert cases(record_folder) == []
        record_folder.fail(Record(name="a", status=FAILED, error="why"))
        assert record_folder.state("a", results, MADE_OF) == CaseState()

    def test_what_somebody_changes_then_is_kept(self, record_folder, interrupted):
        results = interrupted(1)
        labels(results[-1], 3)
        assert record_folder.state("a", results, MADE_OF).kept == "changed since nnturbo wrote it"

    def test_labels_of_others_that_were_about_to_be_replaced_are_kept(self, record_folder, monkeypatch):
        path = labels(record_folder.output / "a.nii.gz", 2)  # as nnU-Net leaves them
        with monkeypatch.context() as patch:
            patch.setattr(type(path), "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                finish(record_folder)
        assert record_folder.state("a", [path], MADE_OF).kept
        record_folder.fail(Record(name="a", status=FAILED, error="why"))
        assert record_folder.state("a", [path], MADE_OF).kept == "not written by nnturbo"

    def test_what_is_all_in_place_is_done(self, record_folder, monkeypatch):
        write = RecordFolder.write

        def killed(self, record):
            if record.status == DONE:
                raise KeyboardInterrupt
            write(self, record)

        with monkeypatch.context() as patch:
            patch.setattr(RecordFolder, "write", killed)
            with pytest.raises(KeyboardInterrupt):
                finish(record_folder, warnings=("odd",))
        found = record_folder.state("a", [record_folder.output / "a.nii.gz"], MADE_OF)
        assert found == CaseState(is_done=True)
        record_folder.settle("a", [], found)
        record = record_folder.read("a")
        assert (record.status, record.replaces, record.warnings) == (DONE, {}, ("odd",))


def test_what_is_kept_is_recorded_and_counted(record_folder):
    (path,) = finish(record_folder)
    labels(record_folder.output / "b.nii.gz")
    labels(path, 2)
    for name in "ab":
        found = record_folder.state(name, [record_folder.output / f"{name}.nii.gz"], MADE_OF)
        record_folder.settle(name, [record_folder.output / f"{name}_0000.nii.gz"], found)
    record_folder.collect()
    table = json.loads((record_folder.output / "predictions.json").read_text())
    assert table["kept"] == {"count": 2, "names": ["a", "b"]}
    changed, foreign = table["cases"]
    assert (changed["status"], changed["kept"]) == ("done", "changed since nnturbo wrote it")
    assert (foreign["status"], foreign["kept"]) == ("kept", "not written by nnturbo")
    record_folder.settle("a", [], CaseState(is_done=True))
    assert record_folder.read("a").kept is None


@pytest.mark.parametrize(
    "content", ["", '{"name": "a", "sta', "[]", "3", '{"name": "b"}', '{"status": "done"}', "null", '{"name": "a"}']
)
def test_a_torn_record_counts_as_none_and_says_so(record_folder, caplog, content):
    finish(record_folder)
    (record_folder.output / "records" / "a.json").write_text(content)
    assert record_folder.read("a") is None
    record_folder.collect()
    assert cases(record_folder) == []
    assert "a.json is damaged" in caplog.text


@pytest.mark.parametrize(
    "made_of",
    [
        {"models": [{"weights": "hash"}], "inputs": {}},
        {"models": [{**provenance().settings.to_json(), "added_later": 1}], "inputs": {}},
        {"models": [], "inputs": {"a": [["a", 1]]}},
        {"models": []},
        [],
        3,
    ],
)
def test_what_another_version_was_made_of_is_never_the_same(record_folder, made_of):
    path = record_folder.output / "a.nii.gz"
    finish(record_folder, "a")
    content = record_folder.read("a").to_json() | {"made_of": made_of}
    (record_folder.output / "records" / "a.json").write_text(json.dumps(content))
    assert record_folder.read("a").made_of is None
    assert record_folder.state("a", [path], MADE_OF).kept.startswith("made with another model, other settings")
    assert record_folder.state("a", [path], MADE_OF, redo_outdated=True) == CaseState()


def test_files_that_were_left_half_written_go_when_nobody_writes_them(record_folder):
    old, new = record_folder.output / ".writing-file-old", record_folder.output / "records" / ".writing-file-new"
    for path in (old, new):
        path.mkdir()
        (path / "new.nii.gz").write_bytes(b"half")
        os.utime(path, (time.time() - 3600,) * 2)
    os.utime(old / "new.nii.gz", (time.time() - 3600,) * 2)
    record_folder.begin()
    assert not old.exists()
    assert new.exists()


def test_what_another_process_writes_slowly_stays(record_folder):
    folder = record_folder.output / ".writing-file-slow"
    (folder / ".writing-file-inner").mkdir(parents=True)
    (folder / ".writing-file-inner" / "new.npz").write_bytes(b"half")
    for path in (folder, folder / ".writing-file-inner"):
        os.utime(path, (time.time() - 3600,) * 2)
    record_folder.begin()
    assert folder.exists()


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() == 0, reason="root and Windows read everything")
def test_what_another_user_writes_is_no_obstacle(record_folder):
    folder = record_folder.output / ".writing-file-theirs"
    folder.mkdir(mode=0)
    record_folder.begin()


def test_tables_hold_all_records_by_name(tmp_path):
    record_folder = RecordFolder(output=tmp_path, file_ending=".nii.gz", class_names=("low", "high"))
    record_folder.begin()
    for name, label in (("b", 1), ("a", 0)):
        finish(record_folder, name, classification=replace(ANSWER, label=label, name=ANSWER.class_names[label]))
    record_folder.write(Record(name="c", status=FAILED, error="why"))
    record_folder.write(Record(name="d", status=WRITING))
    record_folder.collect()
    assert [case["name"] for case in cases(record_folder)] == ["a", "b", "c"]
    assert (tmp_path / "subtype_results.csv").read_text() == "Names,Subtype\na.nii.gz,0\nb.nii.gz,1\n"


def test_names_that_are_no_text_cost_no_table(tmp_path):
    record_folder = RecordFolder(output=tmp_path, file_ending=".nii.gz", class_names=("low", "high"))
    record_folder.begin()
    name = "m\udcfcller"
    finish(record_folder, name, classification=ANSWER)
    record_folder.collect()
    assert cases(record_folder)[0]["name"] == name
    assert (tmp_path / "subtype_results.csv").read_text() == "Names,Subtype\nm\\udcfcller.nii.gz,1\n"


def test_jobs_that_end_together_leave_the_records_of_all(tmp_path):
    def part(index):
        record_folder = RecordFolder(output=tmp_path, file_ending=".nii.gz", class_names=None)
        record_folder.begin()
        for case in range(10):
            record_folder.write(Record(name=f"{index}-{case}", status=DONE))
        record_folder.collect()

    for _ in range(5):
        threads = [threading.Thread(target=part, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        record_folder = RecordFolder(output=tmp_path, file_ending=".nii.gz", class_names=None)
        assert len(cases(record_folder)) == 40
        for path in (tmp_path / "records").iterdir():
            path.unlink()


@pytest.mark.parametrize("content", ["mine", '{"schema": 2, "cases": []}', '{"cases": []}', "[]", '{"schema": 1}'])
def test_a_table_of_somebody_else_is_not_replaced(tmp_path, content):
    (tmp_path / "predictions.json").write_text(content)
    with pytest.raises(OutputError, match="Move it away"):
        RecordFolder(output=tmp_path, file_ending=".nii.gz", class_names=None).begin()
    assert (tmp_path / "predictions.json").read_text() == content
