"""What `nnturbo choose` writes may be given as a model; and probabilities in the table of classes."""

import csv
import json
from dataclasses import replace

import pytest
import torch
from nnturbo.engine import Engine, EngineOptions, Ensemble, ModelError
from nnturbo.engine.cli import main
from nnturbo.engine.export.build import build, build_whole_path
from nnturbo.engine.model.choice import Choice, read_choice, write_choice

from tests.engine.export.scripted.paths import loaded
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
        assert "a choice must be given alone, without other models" in capsys.readouterr().err

    @pytest.mark.parametrize("flags", [["--classifier", "auto"], ["--aggregation", "foreground"], ["-f", "0"]])
    def test_build_refuses_what_it_says_already(self, tmp_path, capsys, flags):
        write_choice(CHOICE, {}, tmp_path / "choice.json")
        assert main(["build", "-m", str(tmp_path / "choice.json"), "-o", str(tmp_path / "bundle"), *flags]) == 2
        assert f"says it already: leave out {flags[0]}" in capsys.readouterr().err

    def test_a_model_that_has_moved_is_named(self, models, scans, tmp_path, capsys):
        path = tmp_path / "choice.json"
        write_choice(replace(CHOICE, models=tuple(map(str, models))), {}, path)
        models[1].rename(tmp_path / "elsewhere")
        assert main(["predict", "-i", str(scans), "-o", str(tmp_path / "out"), "-m", str(path)]) == 2
        said = capsys.readouterr().err
        assert f"{path} names the model {models[1]}, which is not there: move both together, or run" in said
        assert said.count("\n") == 1

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


@pytest.fixture
def one_of(models, tmp_path):
    """Write a choice of one model that takes nothing by default."""
    choice = Choice(models=(str(models[0]),), folds=("1",), classifier="lda", aggregation="mean")
    write_choice(choice, {}, tmp_path / "choice.json")
    return tmp_path / "choice.json"


OPTIONS = EngineOptions(classifier="lda", aggregation="mean")


class TestEngines:
    def test_engine_takes_all_that_it_says(self, models, one_of, scans):
        scan = scans / "a_0000.nii.gz"
        chosen = Engine.load(one_of, device="cpu", mirror=False)
        meant = Engine.load(models[0], folds=["1"], device="cpu", mirror=False, options=OPTIONS)
        other = Engine.load(models[0], device="cpu", mirror=False)
        logits = [engine.predict(scan).classification.logits for engine in (chosen, meant, other)]
        assert logits[0] == logits[1] != logits[2]
        assert chosen.provenance[0].settings == meant.provenance[0].settings

    def test_ensemble_takes_all_that_it_says(self, models, scans, tmp_path):
        choice = Choice(models=tuple(map(str, models)), folds=("1",), classifier="lda", aggregation="mean")
        write_choice(choice, {}, tmp_path / "choice.json")
        chosen = Ensemble.load([tmp_path / "choice.json"], device="cpu", mirror=False)
        meant = Ensemble.load(models, folds=["1"], device="cpu", mirror=False, options=OPTIONS)
        answers = [engine.predict(scans / "a_0000.nii.gz").classification for engine in (chosen, meant)]
        assert answers[0] == answers[1]
        for make in (Engine.load, lambda path: build(path, tmp_path / "bundle")):
            with pytest.raises(ModelError, match=r"choice\.json must name one model here, it names 2"):
                make(tmp_path / "choice.json")
        assert not (tmp_path / "bundle").exists()

    @pytest.mark.parametrize(
        "arguments", [{"folds": [0]}, {"checkpoint": "x.pth"}, {"options": EngineOptions(classifier="head")}]
    )
    def test_arguments_for_what_it_says_are_refused(self, one_of, arguments):
        with pytest.raises(ValueError, match="says it already: leave out"):
            Engine.load(one_of, **arguments)

    def test_bundle_is_of_all_that_it_says_but_the_aggregation(self, models, one_of, scans, tmp_path, caplog):
        bundle = build(one_of, tmp_path / "bundle", backend="torchscript", device="cpu")
        assert "a bundle takes its aggregation when it predicts: give mean there too" in caplog.text
        engine = Engine.load(bundle, device="cpu", mirror=False, options=EngineOptions(aggregation="mean"))
        meant = Engine.load(models[0], folds=["1"], device="cpu", mirror=False, options=OPTIONS)
        answers = [each.predict(scans / "a_0000.nii.gz").classification for each in (engine, meant)]
        assert answers[0].logits == pytest.approx(answers[1].logits, abs=1e-4)
        assert engine.provenance[0].folds == ("1",)

    def test_whole_path_has_its_aggregation(self, models, one_of, tmp_path):
        chosen = build_whole_path(one_of, tmp_path / "chosen.ts", device="cpu")
        meant = build_whole_path(
            models[0], tmp_path / "meant.ts", device="cpu", folds=["1"], classifier="lda", aggregation="mean"
        )
        scan = torch.randn(1, 20, 24, 28)
        found = [loaded(path)(scan, [1.0, 1.0, 1.0], 0.5, False)[1] for path in (chosen, meant)]
        assert torch.equal(*found)


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
