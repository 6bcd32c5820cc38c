"""Folds of a cross-validation: stratified, the same each time, and without the validation cases."""

import csv
import json
import shutil
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nnturbo.training.data.cross_validation import read_folds, splits, stratified_folds
from nnturbo.training.data.planning import _training_cases
from nnturbo.training.data.prepare import prepare_dataset
from nnturbo.training.data.tables import DatasetError

from tests.training.second_task import CLASSES, write_task


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("folds")
    classes = write_task(folder / "source", train=5)
    return prepare_dataset(folder / "source", folder / "raw", dataset_id=9, dataset_name="L", folds=5).folder, classes


@given(st.lists(st.integers(5, 40), min_size=2, max_size=5), st.integers(2, 5))
def test_folds_are_alike(counts, folds):
    classes = {f"{label}_{number}": str(label) for label, count in enumerate(counts) for number in range(count)}
    dealt = stratified_folds(classes, folds)
    assert dealt.keys() == classes.keys()
    assert dealt == stratified_folds(dict(reversed(classes.items())), folds)
    sizes = Counter(dealt.values())
    assert len(sizes) == folds
    assert max(sizes.values()) - min(sizes.values()) <= 1
    for label in set(classes.values()):
        of_class = Counter(fold for name, fold in dealt.items() if classes[name] == label)
        assert len(of_class) == folds
        assert max(of_class.values()) - min(of_class.values()) <= 1


def test_cases_of_a_class_are_not_dealt_by_their_names():
    dealt = stratified_folds({f"{number:03d}": "a" for number in range(50)}, 5)
    assert [dealt[name] for name in sorted(dealt)] != [place % 5 for place in range(50)]


def test_too_few_cases_of_a_class():
    with pytest.raises(ValueError, match=r"3 folds need at least 3 .*; b has 2"):
        stratified_folds({"1": "a", "2": "a", "3": "a", "4": "b", "5": "b"}, 3)
    with pytest.raises(ValueError, match="folds must be at least 2, got 1"):
        stratified_folds({"1": "a"}, 1)


class TestPrepared:
    def test_every_training_case_is_held_out_once_and_validation_cases_never(self, prepared):
        folder, classes = prepared
        *folds, own = json.loads((folder / "splits_final.json").read_text())
        training = {name for name in classes if name.startswith("t_")}
        assert len(folds) == 5
        assert sorted(name for fold in folds for name in fold["val"]) == sorted(training)
        for fold in folds:
            assert set(fold["train"]) == training - set(fold["val"])
            assert sorted(classes[name] for name in fold["val"]) == list(CLASSES)
        assert set(own["train"]) == training
        assert set(own["val"]) == set(classes) - training

    def test_the_table_says_which_fold_holds_a_case_out(self, prepared):
        folder, _ = prepared
        table = folder / "classification_labels.csv"
        rows = list(csv.DictReader(table.read_text().splitlines()))
        folds = json.loads((folder / "splits_final.json").read_text())[:-1]
        expected = {name: number for number, fold in enumerate(folds) for name in fold["val"]}
        assert read_folds(table) == expected
        assert {row["case"] for row in rows if row["fold"] == ""} == {f"v_{name}_0" for name in CLASSES}

    def test_plans_are_made_from_all_training_cases(self, prepared, tmp_path):
        folder, classes = prepared
        assert _training_cases(folder, tmp_path / "nowhere") == {name for name in classes if name.startswith("t_")}

    def test_too_many_folds_write_nothing(self, tmp_path):
        write_task(tmp_path / "source", train=2)
        with pytest.raises(ValueError, match="5 folds need at least 5"):
            prepare_dataset(tmp_path / "source", tmp_path / "raw", dataset_id=9, dataset_name="L", folds=5)
        assert not (tmp_path / "raw").exists()

    def test_folds_need_no_validation_cases(self, tmp_path):
        classes = write_task(tmp_path / "source", train=2)
        shutil.rmtree(tmp_path / "source" / "validation")
        done = prepare_dataset(tmp_path / "source", tmp_path / "raw", dataset_id=9, dataset_name="L", folds=2)
        training = {name for name in classes if name.startswith("t_")}
        folds = json.loads((done.folder / "splits_final.json").read_text())
        assert [len(fold["train"]) + len(fold["val"]) for fold in folds] == [len(training)] * 2
        assert _training_cases(done.folder, tmp_path / "nowhere") == training
        with pytest.raises(DatasetError, match="validation: this folder must exist"):
            prepare_dataset(tmp_path / "source", tmp_path / "raw", dataset_id=8, dataset_name="L")


def test_without_folds_the_own_split_is_alone():
    assert splits({}, ["a", "b"], ["c"]) == [{"train": ["a", "b"], "val": ["c"]}]


def test_a_table_that_a_spreadsheet_saved(tmp_path):
    (tmp_path / "t.csv").write_text("\ufeffCase;Subtype;Split;Fold\na;0;train;1\nb;0;validation;\n", encoding="utf-8")
    assert read_folds(tmp_path / "t.csv") == {"a": 1}


def test_a_fold_that_is_no_number(tmp_path):
    (tmp_path / "t.csv").write_text("case,subtype,split,fold\na,0,train,x\n")
    with pytest.raises(DatasetError, match=r"t\.csv line 2: fold must be a number, got 'x'"):
        read_folds(tmp_path / "t.csv")
