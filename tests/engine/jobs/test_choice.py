"""What `nnturbo choose` writes is what `nnturbo predict` takes; and probabilities in the table of classes."""

import csv
import json

import pytest
from nnturbo.engine import Engine, EngineOptions, Ensemble, ModelError
from nnturbo.engine.cli import main
from nnturbo.engine.jobs.choice import Choice, read_choice, write_choice

from tests.engine.factory import multi_task, plans_json, pooled_classifier, write_model

CHOICE = Choice(models=("a", "b"), folds=("0",), classifier="lda", aggregation="mean")


@pytest.fixture
def models(tmp_path):
    """Two models, each of two folds, with fitted classifiers."""
    plans = multi_task(plans_json())
    fitted = [{"pooled_classifier": pooled_classifier(seed=seed)} for seed in (0, 1)]
    return [
        write_model(tmp_path / name, plans=plans, folds=("0", "1"), checkpoint=checkpoint)
        for name, checkpoint in zip("ab", fitted, strict=True)
    ]


def rows_of(folder):
    return list(csv.DictReader((folder / "subtype_results.csv").read_text().splitlines()))


class TestChoice:
    def test_predict_does_what_it_says(self, models, scans, tmp_path):
        path = tmp_path / "choice" / "choice.json"
        path.parent.mkdir()
        choice = Choice(models=tuple(map(str, models)), folds=("1",), classifier="lda", aggregation="mean")
        write_choice(choice, {"cases": 3}, path)
        assert json.loads(path.read_text())["models"] == ["../a", "../b"]
        line = ["predict", "-i", scans, "-o", tmp_path / "out", "-m", path, "--disable_tta", "-device", "cpu"]
        assert main([*map(str, line), "--class_probabilities"]) == 0
        options = EngineOptions(classifier="lda", aggregation="mean")
        ensemble = Ensemble([Engine.load(m, folds=[1], device="cpu", mirror=False, options=options) for m in models])
        for row in rows_of(tmp_path / "out"):
            expected = ensemble.predict(scans / row["Names"].replace(".nii.gz", "_0000.nii.gz")).classification
            assert row["Subtype"] == expected.name
            shares = [float(row[f"Probability_{name}"]) for name in expected.class_names]
            assert shares == pytest.approx(expected.probabilities, abs=1e-4)

    @pytest.mark.parametrize(
        "flags", [["-f", "0"], ["-chk", "x.pth"], ["--classifier", "head"], ["--aggregation", "mean"]]
    )
    def test_what_it_says_already_is_refused(self, scans, tmp_path, capsys, flags):
        write_choice(CHOICE, {}, tmp_path / "choice.json")
        line = ["predict", "-i", scans, "-o", tmp_path / "out", "-m", tmp_path / "choice.json", *flags]
        assert main(list(map(str, line))) == 2
        assert f"says it already: leave out {flags[0]}, or give the models as -m" in capsys.readouterr().err

    def test_it_stands_alone(self, scans, tmp_path, capsys):
        write_choice(CHOICE, {}, tmp_path / "choice.json")
        assert main(["predict", "-i", str(scans), "-o", str(tmp_path), "-m", str(tmp_path / "choice.json"), "b"]) == 2
        assert "-m must be one choice alone, or models" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            ("[]", "must be a choice of schema 1 with models, folds"),
            ("{", "must be a choice that nnturbo choose wrote; it cannot be read"),
            ({"schema": 2}, "must be a choice of schema 1"),
            ({"models": "a"}, "models and folds must be lists"),
            ({"models": []}, "models must be one or more texts"),
            ({"folds": [0]}, "folds must be one or more texts"),
            ({"classifier": "best"}, "classifier must be one of auto, head, lda, got 'best'"),
            ({"aggregation": 3}, "aggregation must be one of foreground, mean, got 3"),
            ({"checkpoint": None}, "checkpoint must be a file name, got None"),
        ],
    )
    def test_anything_else_is_refused(self, tmp_path, content, said):
        path = tmp_path / "choice.json"
        write_choice(CHOICE, {}, path)
        text = content if isinstance(content, str) else json.dumps({**json.loads(path.read_text()), **content})
        path.write_text(text)
        with pytest.raises(ModelError, match=said):
            read_choice(path)


class TestProbabilities:
    def test_without_the_flag_the_table_is_that_of_the_task(self, models, scans, tmp_path):
        line = ["predict", "-i", scans, "-o", tmp_path / "out", "-m", models[0], "--disable_tta", "-device", "cpu"]
        assert main(list(map(str, line))) == 0
        assert set(rows_of(tmp_path / "out")[0]) == {"Names", "Subtype"}
        # The probabilities are recorded, so nothing is predicted again for them.
        assert main([*map(str, line), "--continue_prediction", "--class_probabilities"]) == 0
        assert list(rows_of(tmp_path / "out")[0])[2:] == ["Probability_0", "Probability_1", "Probability_2"]

    def test_names_of_both_kinds_are_written_by_their_place(self, scans, tmp_path):
        folder = write_model(tmp_path / "m", plans=multi_task(plans_json(), class_names=["1", "b", "7"]))
        line = ["predict", "-i", scans, "-o", tmp_path / "out", "-m", folder, "--disable_tta", "-device", "cpu"]
        assert main(list(map(str, line))) == 0
        engine = Engine.load(folder, device="cpu", mirror=False)
        labels = [engine.predict(scans / f"{name}_0000.nii.gz").classification.label for name in "abc"]
        assert [row["Subtype"] for row in rows_of(tmp_path / "out")] == list(map(str, labels))
