"""Models that held-out cases do not measure are refused before any case is predicted, each with one line."""

import json
import shutil

import pytest
import torch
from nnturbo.engine.cli import main
from nnturbo.engine.errors import ModelError
from nnturbo.training.data.tables import DatasetError
from nnturbo.training.held_out import HeldOutNetwork, check_model, held_out_cases
from nnturbo.training.publish import publish_model

FINAL = "checkpoint_final.pth"


def train_on(path, cases):
    """Let a checkpoint say that it was trained on other cases."""
    content = torch.load(path, weights_only=False)
    content["multi_task"]["training_cases"] = sorted(cases)
    torch.save(content, path)


@pytest.fixture
def model(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "the model")


@pytest.fixture
def preprocessed(tiny, tmp_path):
    """What the commands read of the preprocessed data set, to be spoilt."""
    folder = tmp_path / "preprocessed" / tiny.name
    folder.mkdir(parents=True)
    for name in ("dataset.json", "splits_final.json", "classification_labels.csv"):
        shutil.copyfile(tiny.preprocessed / tiny.name / name, folder / name)
    return folder


@pytest.fixture
def command(tiny, preprocessed, monkeypatch):
    """Run a command that must end before it predicts."""

    def predict(*_, **__):
        raise AssertionError("a case was predicted")

    monkeypatch.setattr(HeldOutNetwork, "predict", predict)
    given = ["-d", "7", "--raw", tiny.raw, "--preprocessed", preprocessed.parent, "-device", "cpu"]
    return lambda name, *more: main(list(map(str, [name, *given, *more])))


@pytest.mark.parametrize("name", ["choose", "crossvalidate"])
def test_a_model_that_was_trained_on_a_held_out_case(tiny, model, command, tmp_path, capsys, name):
    case = tiny.validation_cases[1]
    train_on(model / "fold_0" / FINAL, [*tiny.training_cases, case])
    assert command(name, "-m", model, "-o", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert f"must not have been trained on cases that fold 0 holds out, it was on 1, such as {case}: train" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_model_of_other_classes(tiny, model, preprocessed, command, tmp_path, capsys):
    table = preprocessed / "classification_labels.csv"
    lines = [line.replace(",2,", ",benign,") for line in table.read_text().splitlines()]
    table.write_text("\n".join(lines))
    assert command("crossvalidate", "-m", model, "-o", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert f"must have the classes of {tiny.name}, ('0', '1', 'benign'), it has ('0', '1', '2')" in said


def test_a_model_of_other_labels(tiny, model, preprocessed, command, tmp_path, capsys):
    dataset = json.loads((preprocessed / "dataset.json").read_text())
    dataset["labels"] = {"background": 0, "liver": 1, "lesion": 2}
    (preprocessed / "dataset.json").write_text(json.dumps(dataset))
    assert command("choose", "-m", model, "-o", tmp_path / "out") == 2
    assert f"must have the labels of {tiny.name}, " in capsys.readouterr().err


def test_a_published_model_does_not_say_what_it_was_trained_on(tiny, model, preprocessed, tmp_path, caplog):
    cases = {0: held_out_cases(tiny.raw / tiny.name, preprocessed, 0)}
    check_model(model, FINAL, preprocessed, cases)
    assert not caplog.records
    check_model(publish_model(model, tmp_path / "published"), FINAL, preprocessed, cases)
    assert "does not say on which cases it was trained" in caplog.text


def test_a_fold_that_one_model_lacks(tiny, model, preprocessed):
    cases = held_out_cases(tiny.raw / tiny.name, preprocessed, 0)
    with pytest.raises(ModelError, match="fold"):
        check_model(model, FINAL, preprocessed, {0: cases, 3: []})


def test_a_case_without_a_class(tiny, preprocessed):
    table, case = preprocessed / "classification_labels.csv", tiny.validation_cases[0]
    table.write_text("\n".join(line for line in table.read_text().splitlines() if not line.startswith(case)))
    with pytest.raises(DatasetError, match=f"the class of every case must be known, 1 are missing: {case}"):
        held_out_cases(tiny.raw / tiny.name, preprocessed, 0)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["-m", "{model}", "{model}/../the model"], "each model must be given once, got "),
        (["-m", "{model}", "--seed", "-1"], "--seed must be 0 or more, got -1"),
        (["-m", "{model}", "-o", "{model}/plans.json"], "plans.json/choice.json cannot be written: Not a directory"),
    ],
)
def test_choose_refuses_before_it_predicts(model, command, tmp_path, capsys, flags, said):
    flags = [flag.format(model=model) for flag in flags]
    assert command("choose", "-o", tmp_path / "out", *flags) == 2
    assert said in capsys.readouterr().err


def test_crossvalidate_needs_checkpoints_that_it_can_replace(model, command, tmp_path, monkeypatch, capsys):
    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    assert command("crossvalidate", "-m", model, "-o", tmp_path / "out") == 2
    assert f"fold_0/{FINAL} cannot be written: Permission denied" in capsys.readouterr().err
