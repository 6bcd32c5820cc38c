"""The classifier fitted after training: scikit-learn's own answers, and the same features the engine sees."""

import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from nnturbo.engine import Engine, EngineOptions, ModelError
from nnturbo.engine.errors import CheckpointError
from nnturbo.engine.model.folder import read_model
from nnturbo.training.data.tables import DatasetError
from nnturbo.training.pooled_classifier import fit_discriminant, fit_pooled_classifier, training_scans
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.metrics import f1_score

STAGES = (0, 2)


def clouds(classes, per_class=30, features=12, distance=3.0, seed=0):
    """Cases of each class around a centre of its own."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), per_class)
    centres = distance * rng.normal(size=(classes, features))
    return centres[labels] + rng.normal(size=(len(labels), features)), labels


class TestDiscriminant:
    @pytest.mark.parametrize("classes", [2, 3, 5])
    def test_answers_as_scikit_learn_does(self, classes):
        features, labels = clouds(classes, distance=0.6)
        weight, bias = fit_discriminant(features, labels, classes)
        assert weight.shape == (classes, 12)
        reference = LinearDiscriminantAnalysis(
            solver="lsqr", shrinkage="auto", priors=np.full(classes, 1 / classes)
        ).fit(features, labels)
        ours = torch.softmax(torch.from_numpy(features).float() @ weight.T + bias, 1).numpy()
        np.testing.assert_allclose(ours, reference.predict_proba(features), atol=1e-4)

    def test_classes_that_lie_apart_are_told_apart(self):
        features, labels = clouds(3)
        weight, bias = fit_discriminant(features, labels, 3)
        assert ((features @ weight.numpy().T + bias.numpy()).argmax(1) == labels).all()

    def test_a_class_of_one_case_is_refused(self):
        features, labels = clouds(3)
        with pytest.raises(ValueError, match=r"at least two cases to fit a classifier, got \[30, 1, 0\]"):
            fit_discriminant(features[:31], labels[:31], 3)

    def test_scikit_learn_missing(self, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "sklearn.discriminant_analysis", None)
        features, labels = clouds(3)
        with pytest.raises(Exception, match=r"needs scikit-learn .* pip install 'nnturbo\[training\]'"):
            fit_discriminant(features, labels, 3)


@pytest.fixture(scope="module")
def fitted(tiny, trained, tmp_path_factory):
    """A copy of the trained model with a classifier fitted on all labelled cases, and what was reported."""
    folder = tmp_path_factory.mktemp("fitted") / trained.name
    shutil.copytree(trained, folder)
    scans = training_scans(tiny.raw / tiny.name, tiny.preprocessed / tiny.name, "all")
    seen = []
    fit = fit_pooled_classifier(
        folder, 0, scans, stages=STAGES, device="cpu", progress=lambda done, total, _: seen.append((done, total))
    )
    return folder, scans, fit, seen


class TestFitting:
    def test_reports_what_it_did(self, fitted):
        _, scans, fit, seen = fitted
        assert fit.cases == len(scans) == 10
        assert fit.validated is None
        assert seen == [(done, 10) for done in range(1, 11)]
        assert np.isnan(fit.macro_f1) or 0 <= fit.macro_f1 <= 1

    def test_the_engine_answers_with_it(self, fitted):
        """More features than cases: the classifier tells all of those apart that it was fitted on."""
        folder, scans, _, _ = fitted
        engine = Engine.load(folder, mirror=False, device="cpu", options=EngineOptions(classifier="lda"))
        assert engine.provenance[0].classifier == "lda"
        answers = [engine.predict(scan.images[0]).classification.label for scan in scans]
        assert answers == [scan.subtype for scan in scans]

    def test_the_head_and_the_segmentation_stay_as_they_were(self, fitted, trained):
        folder, scans, _, _ = fitted
        by_head = Engine.load(folder, mirror=False, device="cpu", options=EngineOptions(classifier="head"))
        before = Engine.load(trained, mirror=False, device="cpu")
        ours, theirs = (engine.predict(scans[0].images[0]) for engine in (by_head, before))
        assert ours.classification == theirs.classification
        np.testing.assert_array_equal(ours.segmentation, theirs.segmentation)

    def test_the_checkpoint_can_still_be_resumed(self, fitted, trained):
        folder, _, _, _ = fitted
        after, before = (
            torch.load(path / "fold_0" / "checkpoint_final.pth", weights_only=False) for path in (folder, trained)
        )
        assert set(after) == {*before, "pooled_classifier"}
        assert after["pooled_classifier"]["weight"].shape == (3, 3 * (4 + 8))
        assert not list((folder / "fold_0").glob(".writing-*"))

    @pytest.mark.parametrize("stages", [[1, 4], [1, 1], [-1], []])
    def test_stages_that_the_encoder_does_not_have_or_twice(self, trained, stages):
        with pytest.raises(ModelError, match=re.escape(f"different ones among the encoder's 0 to 3, got {stages}")):
            fit_pooled_classifier(trained, 0, [], stages=stages, device="cpu")
        assert read_model(trained, folds=[0]).pooled_classifiers == (None,)


class TestWhichAnswers:
    """The fitted classifier only where cases that nobody saw show that it is better than the head."""

    def test_without_validation_cases_the_head(self, fitted):
        assert Engine.load(fitted[0], device="cpu").provenance[0].classifier == "head"

    @pytest.mark.parametrize("turn", [0, 1])
    def test_with_them_the_better_one(self, tiny, trained, tmp_path, turn):
        """With the head's own answers as the truth, and with others: no chance decides."""
        folder = tmp_path / trained.name
        shutil.copytree(trained, folder)
        places = tiny.raw / tiny.name, tiny.preprocessed / tiny.name, 0
        by_head = Engine.load(folder, mirror=False, device="cpu")
        held_out = [
            replace(scan, subtype=(by_head.predict(scan.images[0]).classification.label + turn) % 3)
            for scan in training_scans(*places, part="val")
        ]
        assert [scan.images for scan in held_out] == [(tiny.image(case),) for case in sorted(tiny.validation_cases)]
        scans = training_scans(*places)
        fit = fit_pooled_classifier(folder, 0, scans, stages=STAGES, validation=held_out, device="cpu")
        by_fit = Engine.load(folder, mirror=False, device="cpu", options=EngineOptions(classifier="lda"))
        truth = [scan.subtype for scan in held_out]
        for engine, score in ((by_head, fit.validated.head), (by_fit, fit.validated.fitted)):
            answers = [engine.predict(scan.images[0]).classification.label for scan in held_out]
            assert score == pytest.approx(f1_score(truth, answers, average="macro"))
        assert fit.validated.head == 1 - turn
        assert fit.validated.cases == 3
        assert fit.validated.better == (fit.validated.fitted > fit.validated.head)
        assert fit.validated.head_interval.low <= fit.validated.head <= fit.validated.head_interval.high
        wanted = "lda" if fit.validated.better else "head"
        assert Engine.load(folder, device="cpu").provenance[0].classifier == wanted

    @pytest.mark.parametrize(("preferred", "answers"), [(True, "lda"), (False, "head"), (None, "lda")])
    def test_what_the_checkpoint_says(self, fitted, tmp_path, preferred, answers):
        """One without the entry was fitted before there was one, and answers as it did."""
        folder = tmp_path / "model"
        shutil.copytree(fitted[0], folder)
        path = folder / "fold_0" / "checkpoint_final.pth"
        content = torch.load(path, weights_only=False)
        content["pooled_classifier"].pop("preferred")
        content["pooled_classifier"] |= {} if preferred is None else {"preferred": preferred}
        torch.save(content, path)
        assert Engine.load(folder, device="cpu").provenance[0].classifier == answers
        content["pooled_classifier"]["preferred"] = "yes"
        torch.save(content, path)
        with pytest.raises(CheckpointError, match="pooled_classifier: preferred must be true or false, got 'yes'"):
            read_model(folder)


class TestScans:
    def test_a_fold_has_its_training_cases(self, tiny):
        scans = training_scans(tiny.raw / tiny.name, tiny.preprocessed / tiny.name, 0)
        assert [scan.images for scan in scans] == [(tiny.image(case),) for case in sorted(tiny.training_cases)]
        assert [scan.subtype for scan in scans] == [int(case.split("_")[1]) for case in sorted(tiny.training_cases)]

    def test_all_is_every_labelled_case(self, tiny):
        scans = training_scans(tiny.raw / tiny.name, tiny.preprocessed / tiny.name, "all")
        assert len(scans) == len(tiny.training_cases) + len(tiny.validation_cases)

    def test_a_fold_that_is_not_there(self, tiny):
        with pytest.raises(DatasetError, match="has 1 splits, fold 3 is not one of them"):
            training_scans(tiny.raw / tiny.name, tiny.preprocessed / tiny.name, 3)

    def test_a_missing_scan_is_named(self, tiny, tmp_path):
        with pytest.raises(DatasetError, match=r"_0000\.nii\.gz is missing"):
            training_scans(tmp_path, tiny.preprocessed / tiny.name, 0)
