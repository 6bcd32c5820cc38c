"""Records of cases: which results are trusted, which are kept, and the tables made of the records."""

import json
import os
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nnturbo.engine import OutputError
from nnturbo.engine.jobs.records import DONE, FAILED, KEPT, WRITING, Fingerprint, Journal, Record, Standing
from nnturbo.engine.scans.volume import Geometry, write_segmentation

MADE_OF = {"models": [{"source": {"fold_0": "hash"}}], "inputs": {"a": [["a", 1, 2]]}}
OTHER = {**MADE_OF, "inputs": {"a": [["a", 1, 3]]}}
GEOMETRY = Geometry(spacing=(1, 1, 1), origin=(0, 0, 0), direction=(1, 0, 0, 0, 1, 0, 0, 0, 1))


@pytest.fixture
def journal(tmp_path):
    made = Journal(output=tmp_path, file_ending=".nii.gz", class_names=None)
    made.begin()
    return made


def labels(path, value=1):
    write_segmentation(path, np.full((2, 3, 4), value, np.uint8), GEOMETRY)
    return path


def finish(journal, name="a", extra=(), **more):
    """Do what a job does when a case is done; `extra` are endings of further files."""
    folder = journal.output / "staged"
    folder.mkdir()
    labels(folder / f"{name}.nii.gz")
    for ending in extra:
        (folder / f"{name}{ending}").write_bytes(b"extra")
    files = [*(f"{name}{ending}" for ending in extra), f"{name}.nii.gz"]
    journal.publish(Record(name=name, status=DONE, made_of=MADE_OF, **more), folder, files)
    folder.rmdir()
    return [journal.output / file for file in files]


def cases(journal):
    return json.loads((journal.output / "predictions.json").read_text())["cases"]


def test_a_case_is_done_when_its_record_and_its_results_say_so(journal):
    path = journal.output / "a.nii.gz"
    assert journal.standing("a", [path], MADE_OF) == Standing()
    assert finish(journal) == [path]
    assert journal.standing("a", [path], MADE_OF) == Standing(is_done=True)
    assert journal.standing("b", [journal.output / "b.nii.gz"], MADE_OF) == Standing()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda path: path.unlink(), Standing()),
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), Standing()),
        (lambda path: path.write_bytes(b""), Standing()),
        (lambda path: labels(path, 2), Standing(kept="changed since nnturbo wrote it")),
        (lambda path: path.write_bytes(b"no image at all" * 99), Standing(kept="changed since nnturbo wrote it")),
        (lambda path: (path.unlink(), path.mkdir()), None),
    ],
    ids=["gone", "cut off", "empty", "corrected", "something else", "a folder"],
)
def test_labels_that_are_not_those_of_the_record_are_kept_if_they_are_whole(journal, change, expected):
    (path,) = finish(journal)
    change(path)
    found = journal.standing("a", [path], MADE_OF, redo_outdated=True)
    if expected is None:
        assert "cannot be read" in found.kept
    else:
        assert found == expected


@pytest.mark.parametrize("is_whole", [True, False])
@pytest.mark.parametrize("record", ["none", "failed", "damaged", "kept"])
def test_labels_without_a_record_are_kept_if_they_are_whole(journal, record, is_whole):
    path = labels(journal.output / "a.nii.gz")
    if record == "failed":
        journal.write(Record(name="a", status=FAILED, error="why"))
    elif record == "kept":
        journal.write(Record(name="a", status=KEPT, kept="not written by nnturbo"))
    elif record == "damaged":
        (journal.output / "records" / "a.json").write_text("{")
    if not is_whole:
        path.write_bytes(path.read_bytes()[:-5])
    expected = Standing(kept="not written by nnturbo") if is_whole else Standing()
    assert journal.standing("a", [path], MADE_OF) == expected


def test_results_of_something_else_are_kept_unless_they_are_to_be_made_again(journal):
    (path,) = finish(journal)
    found = journal.standing("a", [path], OTHER)
    assert "another model, other settings or another version" in found.kept
    assert journal.standing("a", [path], OTHER, redo_outdated=True) == Standing()
    labels(path, 2)
    assert journal.standing("a", [path], OTHER, redo_outdated=True).kept == "changed since nnturbo wrote it"


def test_results_asked_for_and_not_there_are_made_and_changed_ones_kept(journal):
    (path,) = finish(journal)
    extra = journal.output / "a.npz"
    assert journal.standing("a", [extra, path], MADE_OF) == Standing()
    assert "another model" in journal.standing("a", [extra, path], OTHER).kept
    extra.write_bytes(b"of somebody else")
    assert journal.standing("a", [extra, path], MADE_OF).kept == "its .npz file is not what nnturbo wrote"


def test_a_case_that_failed_is_tried_again_and_what_it_had_before_stays_known(journal):
    (path,) = finish(journal)
    journal.fail(Record(name="a", status=FAILED, error="out of memory"))
    assert path.exists()
    assert journal.read("a").results == {"a.nii.gz": Fingerprint.of(path)}
    assert journal.standing("a", [path], MADE_OF) == Standing()
    labels(path, 2)
    assert journal.standing("a", [path], MADE_OF).kept == "changed since nnturbo wrote it"


def test_a_correction_that_leaves_one_of_two_files_as_it_was_is_kept(journal):
    """A header is the same byte for byte when its voxels are corrected."""
    results = finish(journal, extra=[".zraw"])
    results[0].write_bytes(b"corrected")
    for status in (DONE, FAILED):
        journal.write(replace(journal.read("a"), status=status, error="why"))
        assert journal.standing("a", results, MADE_OF).kept == "its .zraw file is not what nnturbo wrote"


def test_a_result_that_is_a_link_to_nothing_is_kept(journal):
    path = journal.output / "a.nii.gz"
    path.symlink_to(journal.output / "unmounted" / "a.nii.gz")
    assert journal.standing("a", [path], MADE_OF).kept == "a link to what is not there"


def test_what_nnturbo_wrote_beside_replaced_labels_goes_with_them(journal):
    extra, path = finish(journal, extra=[".npz"])
    foreign = journal.output / "a.pkl"
    foreign.write_bytes(b"of somebody else")
    finish(journal)
    assert path.exists()
    assert not extra.exists()
    assert foreign.exists()


def test_results_are_known_to_be_ones_own(tmp_path):
    journal = Journal(output=tmp_path, file_ending=".nii.gz", class_names=None)
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "c0.json").write_text('{"patient": "data"}')
    assert not journal.has_own()
    journal.begin()
    finish(journal)
    assert journal.has_own()


class TestInterrupted:
    """A job is killed after each step of putting two results in place of earlier ones."""

    @pytest.fixture
    def interrupted(self, journal, monkeypatch):
        def interrupt(steps):
            results = finish(journal, extra=[".npz"])
            folder = journal.output / "staged"
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
                    journal.publish(Record(name="a", status=DONE, made_of=MADE_OF), folder, ["a.npz", "a.nii.gz"])
            return results

        return interrupt

    @pytest.mark.parametrize("steps", [0, 1])
    def test_what_is_half_replaced_is_made_again(self, journal, interrupted, steps):
        results = interrupted(steps)
        assert journal.read("a").status == WRITING
        assert journal.standing("a", results, MADE_OF) == Standing()
        journal.collect()
        assert cases(journal) == []
        journal.fail(Record(name="a", status=FAILED, error="why"))
        assert journal.standing("a", results, MADE_OF) == Standing()

    def test_what_somebody_changes_then_is_kept(self, journal, interrupted):
        results = interrupted(1)
        labels(results[-1], 3)
        assert journal.standing("a", results, MADE_OF).kept == "changed since nnturbo wrote it"

    def test_labels_of_others_that_were_about_to_be_replaced_are_kept(self, journal, monkeypatch):
        path = labels(journal.output / "a.nii.gz", 2)  # as nnU-Net leaves them
        with monkeypatch.context() as patch:
            patch.setattr(type(path), "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                finish(journal)
        assert journal.standing("a", [path], MADE_OF).kept
        journal.fail(Record(name="a", status=FAILED, error="why"))
        assert journal.standing("a", [path], MADE_OF).kept == "not written by nnturbo"

    def test_what_is_all_in_place_is_done(self, journal, monkeypatch):
        write = Journal.write

        def killed(self, record):
            if record.status == DONE:
                raise KeyboardInterrupt
            write(self, record)

        with monkeypatch.context() as patch:
            patch.setattr(Journal, "write", killed)
            with pytest.raises(KeyboardInterrupt):
                finish(journal, warnings=("odd",))
        found = journal.standing("a", [journal.output / "a.nii.gz"], MADE_OF)
        assert found == Standing(is_done=True)
        journal.settle("a", [], found)
        record = journal.read("a")
        assert (record.status, record.replaces, record.warnings) == (DONE, {}, ("odd",))


def test_what_is_kept_is_recorded_and_counted(journal):
    (path,) = finish(journal)
    labels(journal.output / "b.nii.gz")
    labels(path, 2)
    for name in "ab":
        found = journal.standing(name, [journal.output / f"{name}.nii.gz"], MADE_OF)
        journal.settle(name, [journal.output / f"{name}_0000.nii.gz"], found)
    journal.collect()
    table = json.loads((journal.output / "predictions.json").read_text())
    assert table["kept"] == {"count": 2, "names": ["a", "b"]}
    changed, foreign = table["cases"]
    assert (changed["status"], changed["kept"]) == ("done", "changed since nnturbo wrote it")
    assert (foreign["status"], foreign["kept"]) == ("kept", "not written by nnturbo")
    journal.settle("a", [], Standing(is_done=True))
    assert journal.read("a").kept is None


@pytest.mark.parametrize(
    "content", ["", '{"name": "a", "sta', "[]", "3", '{"name": "b"}', '{"status": "done"}', "null", '{"name": "a"}']
)
def test_a_torn_record_counts_as_none_and_says_so(journal, caplog, content):
    finish(journal)
    (journal.output / "records" / "a.json").write_text(content)
    assert journal.read("a") is None
    journal.collect()
    assert cases(journal) == []
    assert "a.json is damaged" in caplog.text


text = st.text(max_size=8)
records = st.builds(
    Record,
    name=text,
    status=st.sampled_from([WRITING, DONE, FAILED, KEPT]),
    images=st.lists(text, max_size=3).map(tuple),
    results=st.dictionaries(text, st.builds(Fingerprint, bytes=st.integers(0), sha256=text), max_size=3),
    replaces=st.dictionaries(text, st.builds(Fingerprint, bytes=st.integers(0), sha256=text), max_size=3),
    made_of=st.none() | st.just(MADE_OF),
    error=st.none() | text.filter(bool),
    transient=st.just(False),
    kept=st.none() | text.filter(bool),
    classification=st.none() | st.just({"label": 0}),
    volumes_ml=st.none() | st.just({"lesion": 0.0}),
    timings_ms=st.dictionaries(text, st.floats(0, 1e6), max_size=2),
    warnings=st.lists(text, max_size=2).map(tuple),
    provenance=st.none() | st.just({"torch": "2"}),
)


@given(record=records)
def test_a_record_comes_back_from_its_json(record):
    assert Record.from_json(json.loads(json.dumps(record.to_json()))) == record


def test_a_record_keeps_no_note_of_what_matters_only_while_the_job_runs():
    record = Record(name="a", status=FAILED, error="busy", transient=True)
    assert Record.from_json(record.to_json()) == replace(record, transient=False)


def test_files_that_were_left_half_written_go_when_nobody_writes_them(journal):
    old, new = journal.output / ".writing-file-old", journal.output / "records" / ".writing-file-new"
    for path in (old, new):
        path.mkdir()
        (path / "new.nii.gz").write_bytes(b"half")
        os.utime(path, (time.time() - 3600,) * 2)
    os.utime(old / "new.nii.gz", (time.time() - 3600,) * 2)
    journal.begin()
    assert not old.exists()
    assert new.exists()


def test_what_another_process_writes_slowly_stays(journal):
    folder = journal.output / ".writing-file-slow"
    (folder / ".writing-file-inner").mkdir(parents=True)
    (folder / ".writing-file-inner" / "new.npz").write_bytes(b"half")
    for path in (folder, folder / ".writing-file-inner"):
        os.utime(path, (time.time() - 3600,) * 2)
    journal.begin()
    assert folder.exists()


@pytest.mark.skipif(os.getuid() == 0, reason="root may read everything")
def test_what_another_user_writes_is_no_obstacle(journal):
    folder = journal.output / ".writing-file-theirs"
    folder.mkdir(mode=0)
    journal.begin()


def test_tables_hold_all_records_by_name(tmp_path):
    journal = Journal(output=tmp_path, file_ending=".nii.gz", class_names=("low", "high"))
    journal.begin()
    for name, label in (("b", 1), ("a", 0)):
        finish(journal, name, classification={"label": label, "probabilities": {"low": 0.5, "high": 0.5}})
    journal.write(Record(name="c", status=FAILED, error="why"))
    journal.write(Record(name="d", status=WRITING))
    journal.collect()
    assert [case["name"] for case in cases(journal)] == ["a", "b", "c"]
    assert (tmp_path / "subtype_results.csv").read_text() == "Names,Subtype\na.nii.gz,0\nb.nii.gz,1\n"


def test_names_that_are_no_text_cost_no_table(tmp_path):
    journal = Journal(output=tmp_path, file_ending=".nii.gz", class_names=("low", "high"))
    journal.begin()
    name = "m\udcfcller"
    finish(journal, name, classification={"label": 1, "probabilities": {"low": 0.5, "high": 0.5}})
    journal.collect()
    assert cases(journal)[0]["name"] == name
    assert (tmp_path / "subtype_results.csv").read_text() == "Names,Subtype\nm\\udcfcller.nii.gz,1\n"


def test_jobs_that_end_together_leave_the_records_of_all(tmp_path):
    def part(index):
        journal = Journal(output=tmp_path, file_ending=".nii.gz", class_names=None)
        journal.begin()
        for case in range(10):
            journal.write(Record(name=f"{index}-{case}", status=DONE))
        journal.collect()

    for _ in range(5):
        threads = [threading.Thread(target=part, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        journal = Journal(output=tmp_path, file_ending=".nii.gz", class_names=None)
        assert len(cases(journal)) == 40
        for path in (tmp_path / "records").iterdir():
            path.unlink()


@pytest.mark.parametrize("content", ["mine", '{"schema": 2, "cases": []}', '{"cases": []}', "[]", '{"schema": 1}'])
def test_a_table_of_somebody_else_is_not_replaced(tmp_path, content):
    (tmp_path / "predictions.json").write_text(content)
    with pytest.raises(OutputError, match="Move it away"):
        Journal(output=tmp_path, file_ending=".nii.gz", class_names=None).begin()
    assert (tmp_path / "predictions.json").read_text() == content
