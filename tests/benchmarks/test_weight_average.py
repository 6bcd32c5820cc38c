"""The average of the weights against the weights, by evaluations of the same cases."""

import json
import sys

import pytest
import torch
from nnturbo.benchmarks import weight_average


def evaluation(path, overlap, answers, names=None):
    cases = [
        {
            "name": f"case_{place}" if names is None else names[place],
            "structures": {"whole": {"dsc": 0.9}, "lesion": {"dsc": overlap + 0.01 * place}},
            "subtype": str(place % 3),
            "probabilities": [float(answer == label) for label in range(3)],
        }
        for place, answer in enumerate(answers)
    ]
    path.write_text(json.dumps({"cases": cases}))
    return path


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["weight_average", *map(str, arguments)])
    weight_average.main()


def test_differences_are_paired(tmp_path, monkeypatch):
    right = [place % 3 for place in range(30)]
    average = evaluation(tmp_path / "average.json", 0.6, right)
    weights = evaluation(tmp_path / "weights.json", 0.5, [0, *right[1:]][:15] + [0] * 15)
    run(monkeypatch, "--pair", "the end", average, weights, "--json", tmp_path / "found.json")
    (row,) = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert (row["when"], row["cases"]) == ("the end", 30)
    lesion, f1 = row["average"]["lesion DSC"], row["average"]["macro-F1, head"]
    assert lesion["value"] == pytest.approx(0.745)
    assert [lesion["difference"][key] for key in ("value", "low", "high")] == pytest.approx([0.1] * 3)
    assert f1["value"] == 1
    assert f1["difference"]["value"] == pytest.approx(1 - row["weights"]["macro-F1, head"]["value"])
    assert f1["difference"]["low"] > 0


def test_other_cases_are_refused(tmp_path, monkeypatch):
    files = [evaluation(tmp_path / f"{n}.json", 0.5, [0, 1, 2], names=[*"ab", n]) for n in ("c", "d")]
    with pytest.raises(SystemExit, match="must be of the same cases"):
        run(monkeypatch, "--pair", "the end", *files)


def test_it_asks_for_one_of_two_things(monkeypatch, capsys):
    for arguments in ([], ["--out", "weights"], ["--weights_of", "a", "--out", "b", "--pair", "x", "y", "z"]):
        with pytest.raises(SystemExit):
            run(monkeypatch, *arguments)
        assert "give --weights_of and --out, or --pair once or more" in capsys.readouterr().err


def test_the_model_of_the_weights_has_them_and_nothing_that_was_fitted_to_the_average(tmp_path, monkeypatch):
    model, weights = tmp_path / "model", tmp_path / "weights"
    (model / "fold_0").mkdir(parents=True)
    for name in ("plans.json", "dataset.json"):
        (model / name).write_text(name)
    average, trained = {"a": torch.zeros(2)}, {"a": torch.ones(2)}
    content = {"network_weights": average, "multi_task": {"trained_weights": trained}, "class_temperature": 2.0}
    torch.save(content, model / "fold_0" / "checkpoint_latest.pth")
    run(monkeypatch, "--weights_of", model / "fold_0" / "checkpoint_latest.pth", "--out", weights)
    made = torch.load(weights / "fold_0" / "checkpoint_final.pth")
    assert torch.equal(made["network_weights"]["a"], trained["a"])
    assert "class_temperature" not in made
    assert (weights / "plans.json").read_text() == "plans.json"
