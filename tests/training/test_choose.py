"""Choosing by held-out cases: known winners, ties, and the commands from folds to a prediction."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from nnturbo.engine import Engine, EngineOptions
from nnturbo.engine.cli import main
from nnturbo.engine.model.choice import read_choice
from nnturbo.training import choose
from nnturbo.training.choose import propose
from nnturbo.training.data.cross_validation import splits
from nnturbo.training.evaluation.calibration import fit_temperature
from nnturbo.training.evidence import Evidence
from nnturbo.training.held_out import HeldOutNetwork, held_out_cases
from nnturbo.training.pooled_classifier import fit_pooled_classifier, training_scans
from scipy.special import softmax

from tests.training.test_held_out import train_on


def rows_of(path):
    return list(csv.DictReader(path.read_text().splitlines()))


WAYS = [(kind, how) for kind in ("head", "lda") for how in ("foreground", "mean")]


def evidence(cases, right, overlaps, seed=0):
    """Make evidence in which each way of each model is right as often as `right` says, by model and way."""
    random = np.random.default_rng(seed)
    truth = np.arange(cases) % 3
    logits = {}
    for (model, *way), share in right.items():
        is_right = random.permutation(cases) < share * cases
        answers = np.where(is_right, truth, (truth + 1) % 3)
        logits[(model, *way)] = 4 * np.eye(3)[answers]
    noise = random.normal(0, 0.05, (cases, 2))
    dsc = {models: np.clip(value + noise, 0, 1) for models, value in overlaps.items()}
    return Evidence(truth=truth, class_names=("0", "1", "2"), dsc=dsc, logits=logits)


def alike(share, models=(0,), **better):
    return {(model, *way): better.get(f"{way[0]}_{way[1]}", share) for model in models for way in WAYS}


class TestProposals:
    def test_a_clearly_better_classifier_is_taken(self):
        found = propose(evidence(300, alike(0.6, lda_foreground=0.9), {(0,): 0.8}), resamples=300)
        assert (found.chosen.classifier, found.chosen.aggregation) == ("lda", "foreground")
        assert found.chosen.macro_f1 == pytest.approx(0.9, abs=0.01)
        assert found.chosen == found.candidates[0]

    def test_one_that_is_hardly_better_is_not_and_this_is_said(self):
        weak = evidence(36, alike(0.6, lda_foreground=0.67), {(0,): 0.8})
        found = propose(weak, resamples=300)
        assert (found.chosen.classifier, found.chosen.aggregation) == ("head", "foreground")
        assert found.candidates[0].classifier == "lda"
        assert any("The best score (1, lda, foreground) differs" in remark for remark in found.remarks)
        assert any("36 cases are too few to tell them apart" in remark for remark in found.remarks)
        assert propose(weak, take="best", resamples=300).chosen.classifier == "lda"

    def test_an_ensemble_must_be_worth_its_time(self):
        right = alike(0.7, models=(0, 1))
        better = {(0,): 0.7, (1,): 0.71, (0, 1): 0.85}
        assert propose(evidence(100, right, better), resamples=300).chosen.models == (0, 1)
        equal = dict.fromkeys(better, 0.8)
        assert len(propose(evidence(100, right, equal), resamples=300).chosen.models) == 1

    def test_a_classifier_that_one_model_lacks_is_not_for_the_ensemble(self):
        right = alike(0.7, models=(0, 1))
        right = {key: share for key, share in right.items() if key[:2] != (1, "lda")}
        found = propose(evidence(30, right, {(0,): 0.8, (1,): 0.8, (0, 1): 0.8}), resamples=50)
        kinds = {candidate.models: set() for candidate in found.candidates}
        for candidate in found.candidates:
            kinds[candidate.models].add(candidate.classifier)
        assert kinds == {(0,): {"head", "lda"}, (1,): {"head"}, (0, 1): {"head"}}

    def test_measures_are_means_over_cases(self):
        given = evidence(60, alike(0.5), {(0,): 0.6})
        candidate = propose(given, resamples=400).chosen
        whole, focus = given.dsc[0,].mean(0)
        assert (candidate.whole_dsc, candidate.focus_dsc) == pytest.approx((whole, focus))
        assert candidate.score == pytest.approx((whole + focus + candidate.macro_f1) / 3)
        assert candidate.score_interval.low < candidate.score < candidate.score_interval.high
        spread = 1.96 * given.dsc[0,][:, 0].std() / np.sqrt(60)
        half = (candidate.whole_dsc_interval.high - candidate.whole_dsc_interval.low) / 2
        assert half == pytest.approx(spread, rel=0.25)

    def test_rare_classes_and_the_winner_of_many_are_named(self):
        found = propose(evidence(18, alike(0.6), {(0,): 0.8}), resamples=100)
        assert found.remarks[0] == (
            "Fewer than 10 held-out cases show class 0 (6), 1 (6), 2 (6): its F1 may be anything."
        )
        assert "The best of 4 ways was found on the cases that measure it" in found.remarks[-1]
        assert not any("Fewer than" in r for r in propose(evidence(60, alike(0.6), {(0,): 0.8}), resamples=9).remarks)

    def test_an_unknown_way_to_take_is_refused(self):
        with pytest.raises(ValueError, match="take must be one of simplest, best, got 'any'"):
            propose(evidence(9, alike(0.5), {(0,): 0.5}), take="any")


@pytest.fixture(scope="module")
def models(tiny, trained, tmp_path_factory):
    """Two models of one fold: one with a classifier fitted on its training cases, one with other last weights."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("fitted", "other"):
        shutil.copytree(trained, folder / name)
    scans = training_scans(tiny.raw / tiny.name, tiny.preprocessed / tiny.name, "all")
    fit_pooled_classifier(folder / "fitted", 0, scans, stages=(1, 2), device="cpu")
    path = folder / "other" / "fold_0" / "checkpoint_final.pth"
    content = torch.load(path, weights_only=False)
    content["network_weights"]["head.layers.2.weight"] *= -3
    torch.save(content, path)
    return folder / "fitted", folder / "other"


class TestHeldOut:
    @pytest.mark.parametrize("classifier", ["head", "lda"])
    @pytest.mark.parametrize("aggregation", ["foreground", pytest.param("mean", marks=pytest.mark.thorough)])
    def test_one_pass_answers_as_the_engine_does(self, models, tiny, classifier, aggregation):
        case = held_out_cases(tiny.raw / tiny.name, tiny.preprocessed / tiny.name, 0)[0]
        network = HeldOutNetwork(models[0], 0, checkpoint="checkpoint_final.pth", device="cpu", mirror=True)
        answer = network.predict(case)
        options = EngineOptions(classifier=classifier, aggregation=aggregation)
        expected = Engine.load(models[0], folds=[0], device="cpu", options=options).predict(case.images[0])
        assert answer.logits[classifier, aggregation] == pytest.approx(expected.classification.logits, abs=1e-4)
        np.testing.assert_array_equal(answer.prediction.segmentation, expected.segmentation)


class TestCommands:
    def line(self, command, tiny, *more):
        given = ["-d", "7", "--raw", tiny.raw, "--preprocessed", tiny.preprocessed, "--disable_tta", "-device", "cpu"]
        return list(map(str, [command, *given, *more]))

    def report(self, tmp_path):
        return json.loads((tmp_path / "out" / "cross_validation.json").read_text())

    def test_choose_and_predict(self, models, tiny, tmp_path, capsys):
        line = self.line("choose", tiny, "-m", *models, "-o", tmp_path / "choice", "--resamples", "50")
        assert main(line) == 0
        said = capsys.readouterr().out
        assert "Fewer than 10 held-out cases show class 0 (1), 1 (1), 2 (1)" in said
        path = tmp_path / "choice" / "choice.json"
        choice = read_choice(path)
        found = json.loads(path.read_text())["evidence"]
        # Of the ensemble, only the first model has a fitted classifier.
        assert (found["cases"], len(found["candidates"])) == (3, 4 + 2 + 2)
        assert choice.folds == ("0",)
        assert main(["predict", "-i", str(tiny.source / "test"), "-o", str(tmp_path / "out"), "-m", str(path),
                     "--disable_tta", "-device", "cpu"]) == 0  # fmt: skip
        assert len(list((tmp_path / "out").glob("*.nii.gz"))) == 2

    def test_too_many_models_are_refused(self, models, tiny, tmp_path, capsys):
        assert main(self.line("choose", tiny, "-m", *[models[0]] * 6, "-o", tmp_path / "choice")) == 2
        assert "models must be 1 to 5 to choose among, got 6" in capsys.readouterr().err
        assert not (tmp_path / "choice").exists()

    def test_a_fold_that_is_not_there(self, models, tiny, tmp_path, capsys):
        assert main(self.line("crossvalidate", tiny, "-f", "3", "-m", models[0], "-o", tmp_path / "out")) == 2
        assert "fold" in capsys.readouterr().err

    def test_crossvalidate_calibrates_and_evaluate_takes_its_answers(self, models, tiny, tmp_path, capsys):
        folder = tmp_path / "model"
        shutil.copytree(models[0], folder)
        before = [HeldOutNetwork(folder, 0, checkpoint="checkpoint_final.pth", device="cpu", mirror=False).predict(case)
                  for case in held_out_cases(tiny.raw / tiny.name, tiny.preprocessed / tiny.name, 0)]  # fmt: skip
        line = self.line("crossvalidate", tiny, "-m", folder, "-o", tmp_path / "out")
        assert main(line) == 0
        assert "--split validation" in capsys.readouterr().out
        stored = torch.load(folder / "fold_0" / "checkpoint_final.pth", weights_only=False)
        truth = np.array([int(name[5]) for name in sorted(tiny.validation_cases)])
        for kind, temperature in (
            ("head", stored["class_temperature"]),
            ("lda", stored["pooled_classifier"]["temperature"]),
        ):
            logits = np.array([answer.logits[kind, "foreground"] for answer in before])
            assert temperature == pytest.approx(fit_temperature(logits, truth), rel=1e-3)
        f1 = {kind: found["macro_f1"] for kind, found in self.report(tmp_path)["by_classifier"].items()}
        assert (
            stored["pooled_classifier"]["preferred"]
            == (f1["lda"] > f1["head"])
            == (self.report(tmp_path)["classifier"] == "lda")
        )
        engine = Engine.load(folder, device="cpu", mirror=False, options=EngineOptions(classifier="head"))
        case = held_out_cases(tiny.raw / tiny.name, tiny.preprocessed / tiny.name, 0)[0]
        expected = before[0].logits["head", "foreground"] / stored["class_temperature"]
        assert engine.predict(case.images[0]).classification.logits == pytest.approx(expected, rel=1e-2, abs=1e-5)

        assert main(["evaluate", "-p", str(tmp_path / "out"), "-r", str(tiny.raw / tiny.name)]) == 0
        assert "| class probabilities, over 3 cases | measured | 95 % interval |" in capsys.readouterr().out

    def test_folds_answer_for_the_whole_training_set(self, trained, tiny, tmp_path, capsys):
        """Two folds, of the same weights but other temperatures, as prepare writes them."""
        preprocessed, raw = tmp_path / "preprocessed" / tiny.name, tiny.raw / tiny.name
        preprocessed.mkdir(parents=True)
        shutil.copyfile(raw / "dataset.json", preprocessed / "dataset.json")
        folds = {name: place % 2 for place, name in enumerate(tiny.training_cases)}
        parts = splits(folds, tiny.training_cases, tiny.validation_cases)
        (preprocessed / "splits_final.json").write_text(json.dumps(parts))
        rows = [f"{name},{name[5]},train,{fold}" for name, fold in folds.items()]
        rows += [f"{name},{name[5]},validation," for name in tiny.validation_cases]
        table = "\n".join(["case,subtype,split,fold", *rows])
        (preprocessed / "classification_labels.csv").write_text(table)
        folder = tmp_path / "model"
        shutil.copytree(trained, folder)
        shutil.copytree(folder / "fold_0", folder / "fold_1")
        for fold in (0, 1):
            train_on(folder / f"fold_{fold}" / "checkpoint_final.pth", parts[fold]["train"])
        line = self.line("crossvalidate", tiny, "-m", folder, "-o", tmp_path / "out")
        line[line.index(str(tiny.preprocessed))] = str(preprocessed.parent)
        assert main(line) == 0
        out = capsys.readouterr().out
        assert "--split train" in out
        assert "as missing" not in out
        assert sorted(path.name for path in (tmp_path / "out").glob("*.nii.gz")) == sorted(
            f"{name}.nii.gz" for name in tiny.training_cases
        )
        stored = [torch.load(folder / f"fold_{fold}" / "checkpoint_final.pth", weights_only=False) for fold in (0, 1)]
        assert stored[0]["class_temperature"] == stored[1]["class_temperature"] != 1
        # The table's probabilities of a fold have the temperature that the other fold gives.
        answers = {
            name: json.loads((tmp_path / "out" / "answers" / f"{name}.json").read_text())["logits"] for name in folds
        }
        of = {fold: [name for name in folds if folds[name] == fold] for fold in (0, 1)}
        logits = {fold: np.array([answers[name]["head foreground"] for name in of[fold]]) for fold in (0, 1)}
        temperature = fit_temperature(logits[1], np.array([int(name[5]) for name in of[1]]))
        found = {row["Names"]: row for row in rows_of(tmp_path / "out" / "subtype_results.csv")}
        for name, row in zip(of[0], softmax(logits[0] / temperature, axis=1), strict=True):
            written = [float(found[f"{name}.nii.gz"][f"Probability_{label}"]) for label in range(3)]
            assert written == pytest.approx(row.tolist(), abs=1e-5)

    def test_two_folds_that_hold_out_the_same_case_are_refused(self, models, tiny, tmp_path, capsys):
        assert main(self.line("choose", tiny, "-f", "0", "0", "-m", models[0], "-o", tmp_path / "choice")) == 2
        assert "each fold must be given once, got 0, 0" in capsys.readouterr().err

    def test_crossvalidate_goes_on_where_it_was(self, models, tiny, tmp_path, monkeypatch):
        folder = tmp_path / "model"
        shutil.copytree(models[0], folder)
        line = self.line("crossvalidate", tiny, "-m", folder, "-o", tmp_path / "out")
        assert main(line) == 0
        first = (tmp_path / "out" / "cross_validation.json").read_text()
        case = sorted(tiny.validation_cases)[1]
        (tmp_path / "out" / "answers" / f"{case}.json").write_text("{")
        other = sorted(tiny.validation_cases)[2]
        (tmp_path / "out" / f"{other}.nii.gz").unlink()
        predicted = []
        predict = HeldOutNetwork.predict
        monkeypatch.setattr(HeldOutNetwork, "predict", lambda self, c: predicted.append(c.name) or predict(self, c))
        assert main(line) == 0
        assert predicted == [case, other]
        again = json.loads((tmp_path / "out" / "cross_validation.json").read_text())
        # The checkpoint's temperatures have changed meanwhile, and what is fitted has not.
        for kind, found in json.loads(first)["by_classifier"].items():
            assert again["by_classifier"][kind]["temperature"] == pytest.approx(found["temperature"], rel=1e-3)

    def test_another_folder_is_not_written_to(self, models, tiny, tmp_path, capsys):
        (tmp_path / "mine").write_text("")
        assert main(self.line("crossvalidate", tiny, "-m", models[0], "-o", tmp_path)) == 2
        assert "holds other files: choose another folder" in capsys.readouterr().err


def test_constants_are_those_of_the_library():
    from nnturbo.training.cli import choices

    assert choices.TAKE == choose.TAKE
