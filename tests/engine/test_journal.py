"""Records of cases: which results are trusted, and the tables made of the records."""

import json
import os
import threading
import time

import pytest
from nnturbo.engine import OutputError
from nnturbo.engine.journal import Journal

MADE_OF = {"models": [{"source": {"fold_0": "hash"}}], "inputs": {"a": [["a", 1, 2]]}}


@pytest.fixture
def journal(tmp_path):
    made = Journal(output=tmp_path, file_ending=".nii.gz", class_names=None)
    made.begin(["a", "b"], keep=True)
    return made


def finish(journal, name, content=b"labels", **more):
    path = journal.output / f"{name}.nii.gz"
    path.write_bytes(content)
    journal.write({"name": name, "status": "done", "results": journal.describe([path]), "made_of": MADE_OF, **more})
    return path


def cases(journal):
    return json.loads((journal.output / "predictions.json").read_text())["cases"]


def test_a_case_is_complete_when_its_record_and_its_results_say_so(journal):
    path = journal.output / "a.nii.gz"
    assert not journal.is_complete("a", [path], MADE_OF)
    path.write_bytes(b"labels")
    assert not journal.is_complete("a", [path], MADE_OF)
    finish(journal, "a")
    assert journal.is_complete("a", [path], MADE_OF)
    assert not journal.is_complete("b", [path], MADE_OF)


@pytest.mark.parametrize("damage", ["cut off", "other bytes", "gone", "a folder", "failed", "another result"])
def test_what_does_not_fit_its_record_is_not_trusted(journal, damage):
    path = finish(journal, "a", b"labels")
    results = [path]
    if damage == "cut off":
        path.write_bytes(b"label")
    elif damage == "other bytes":
        path.write_bytes(b"Labels")
    elif damage == "gone":
        path.unlink()
    elif damage == "a folder":
        path.unlink()
        path.mkdir()
    elif damage == "failed":
        journal.write({"name": "a", "status": "failed"})
    else:
        results.append(journal.output / "a.npz")
        results[1].write_bytes(b"probabilities")
    assert not journal.is_complete("a", results, MADE_OF)


@pytest.mark.parametrize(
    "content", ["", '{"name": "a", "sta', "[]", "3", '{"name": "b"}', '{"status": "done"}', "null"]
)
def test_a_torn_record_counts_as_none_and_says_so(journal, caplog, content):
    path = finish(journal, "a")
    (journal.output / "records" / "a.json").write_text(content)
    assert not journal.is_complete("a", [path], MADE_OF)
    journal.collect()
    assert cases(journal) == []
    assert "a.json is damaged" in caplog.text


def test_what_is_begun_anew_is_not_trusted_any_more(journal):
    paths = {name: finish(journal, name) for name in "abc"}
    journal.begin(["a", "b"], keep=False)
    assert [journal.is_complete(name, [paths[name]], MADE_OF) for name in "abc"] == [False, False, True]
    journal.begin(["a", "b", "c"], keep=True)
    assert journal.is_complete("c", [paths["c"]], MADE_OF)


def test_files_that_were_left_half_written_go_when_nobody_writes_them(journal):
    old, new = journal.output / ".writing-file-old", journal.output / "records" / ".writing-file-new"
    for path in (old, new):
        path.mkdir()
        (path / "new.nii.gz").write_bytes(b"half")
        os.utime(path, (time.time() - 3600,) * 2)
    os.utime(old / "new.nii.gz", (time.time() - 3600,) * 2)
    journal.begin([], keep=True)
    assert not old.exists()
    assert new.exists()


def test_tables_hold_all_records_by_name(tmp_path):
    journal = Journal(output=tmp_path, file_ending=".nii.gz", class_names=("low", "high"))
    journal.begin([], keep=True)
    for name, label in (("b", 1), ("a", 0)):
        finish(journal, name, classification={"label": label, "probabilities": {"low": 0.5, "high": 0.5}})
    journal.write({"name": "c", "status": "failed", "error": "why"})
    journal.collect()
    assert [case["name"] for case in cases(journal)] == ["a", "b", "c"]
    assert (tmp_path / "subtype_results.csv").read_text() == "Names,Subtype\na.nii.gz,0\nb.nii.gz,1\n"


def test_jobs_that_end_together_leave_the_records_of_all(tmp_path):
    def part(index):
        journal = Journal(output=tmp_path, file_ending=".nii.gz", class_names=None)
        journal.begin([], keep=True)
        for case in range(10):
            finish(journal, f"{index}-{case}")
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
        Journal(output=tmp_path, file_ending=".nii.gz", class_names=None).begin([], keep=True)
    assert (tmp_path / "predictions.json").read_text() == content


def test_results_of_something_else_are_not_trusted(journal, caplog):
    path = finish(journal, "a")
    other = {**MADE_OF, "inputs": {"a": [["a", 1, 3]]}}
    assert journal.is_complete("a", [path], MADE_OF)
    assert not journal.is_complete("a", [path], other)
    assert "a was made by another model or of another scan" in caplog.text


def test_what_is_forgotten_leaves_nothing_and_takes_nothing_else_along(journal):
    path = finish(journal, "a")
    beside = journal.output / "plans.json"
    beside.write_text("{}")
    outside = journal.output.parent / "outside.nii.gz"
    outside.write_text("of others")
    record = json.loads((journal.output / "records" / "a.json").read_text())
    record["results"]["../outside.nii.gz"] = {}
    journal.write(record)
    journal.forget("a")
    journal.forget("never there")
    assert not path.exists()
    assert not (journal.output / "records" / "a.json").exists()
    assert beside.exists()
    assert outside.exists()
    outside.unlink()
