"""The average of the weights against the weights, by evaluations of the same cases."""

import json
import sys

import pytest
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
