"""Measures of probabilities against scikit-learn and by hand; the temperature against scipy on another scale."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nnturbo.training.evaluation.calibration import (
    calibration_error,
    fit_temperature,
    one_against_rest,
    probability_metrics,
    reliability,
)
from nnturbo.training.evaluation.evaluate import comparison_table, evaluate
from nnturbo.training.evaluation.metrics import draw_resamples
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax
from sklearn import metrics as sklearn_metrics

from tests.training.evaluation.masks import labels, write_mask, write_results


def answers(cases=200, classes=3, scale=1.0, seed=0):
    """Draw truths from the probabilities of some logits, and give the logits times a scale."""
    random = np.random.default_rng(seed)
    logits = random.normal(0, 1.5, (cases, classes))
    truth = (softmax(logits, 1).cumsum(1) > random.random((cases, 1))).argmax(1)
    return scale * logits, truth


class TestMeasures:
    @settings(deadline=None, max_examples=30)
    @given(st.integers(0, 1000), st.integers(2, 5), st.booleans())
    def test_auc_and_brier_are_scikit_learns(self, seed, classes, rounded):
        logits, truth = answers(60, classes, seed=seed)
        shares = softmax(np.round(logits) if rounded else logits, 1)  # rounding makes ties
        found = probability_metrics(truth.tolist(), shares.tolist(), resamples=10, seed=0)
        for label, auc in enumerate(found.auc):
            if 0 < (truth == label).sum() < len(truth):
                assert auc == pytest.approx(sklearn_metrics.roc_auc_score(truth == label, shares[:, label]))
            else:
                assert auc is None
        one_hot = np.eye(classes)[truth]
        expected = sum(
            sklearn_metrics.brier_score_loss(one_hot[:, label], shares[:, label]) for label in range(classes)
        )
        assert found.brier == pytest.approx(expected)

    def test_resamples_count_cases_as_often_as_they_were_drawn(self):
        logits, truth = answers(40)
        shares = softmax(logits, 1)
        draws = draw_resamples(40, 5, 0)
        for row, weights in enumerate(draws):
            drawn = np.repeat(np.arange(40), weights.astype(int))
            once = np.ones((1, 40))
            for measure in (one_against_rest, calibration_error):
                expected = measure(truth[drawn], shares[drawn], once)[0]
                np.testing.assert_allclose(measure(truth, shares, draws)[row], expected)

    def test_calibration_error_by_hand(self):
        # Four cases of confidence 0.9, three of them right; six of 0.6, three right.
        shares = np.array([[0.9, 0.1]] * 4 + [[0.6, 0.4]] * 6)
        truth = np.array([0, 0, 0, 1, 0, 0, 0, 1, 1, 1])
        error = calibration_error(truth, shares, np.ones((1, 10)))[0]
        assert error == pytest.approx(0.4 * 0.15 + 0.6 * 0.1)
        bins = {(part.low, part.high): part for part in reliability(truth, shares)}
        assert (bins[0.8, 0.9].cases, bins[0.8, 0.9].accuracy) == (4, 0.75)
        assert (bins[0.5, 0.6].cases, bins[0.5, 0.6].confidence) == (6, pytest.approx(0.6))
        assert bins[0.0, 0.1].accuracy is None

    def test_probabilities_that_are_right_as_often_as_they_say(self):
        logits, truth = answers(20000)
        found = probability_metrics(truth.tolist()[:4000], softmax(logits, 1).tolist()[:4000], resamples=50, seed=0)
        assert found.calibration_error < 0.03
        overconfident = softmax(4 * logits, 1)
        assert calibration_error(truth, overconfident, np.ones((1, 20000)))[0] > 0.15

    def test_one_class_alone_has_no_auc(self):
        found = probability_metrics([1, 1], [[0.2, 0.8], [0.4, 0.6]], resamples=5, seed=0)
        assert (found.auc, found.macro_auc, found.macro_auc_interval) == ((None, None), None, None)


class TestTemperature:
    @pytest.mark.parametrize("scale", [0.2, 1.0, 3.0, 20.0])
    def test_undoes_a_scale(self, scale):
        logits, truth = answers(20000, scale=scale)
        assert fit_temperature(logits, truth) == pytest.approx(scale, rel=0.03)

    def test_is_where_the_cross_entropy_is_least(self):
        logits, truth = answers(60, scale=2.0, seed=3)

        def cross_entropy(parameters):
            return -log_softmax(logits / parameters[0], 1)[np.arange(60), truth].mean()

        found = minimize(cross_entropy, [1.0], method="Nelder-Mead", options={"xatol": 1e-7, "fatol": 1e-12})
        assert fit_temperature(logits, truth) == pytest.approx(found.x[0], rel=1e-3)

    def test_stays_in_its_range(self):
        logits, truth = answers(60)
        assert fit_temperature(1e-4 * logits, truth) == pytest.approx(0.01, rel=0.01)
        assert fit_temperature(-0.1 * np.eye(3), np.array([0, 1, 2])) == pytest.approx(100, rel=0.01)

    def test_a_few_cases_that_are_all_right_make_no_answer_certain(self, caplog):
        assert fit_temperature(0.1 * np.eye(3), np.array([0, 1, 2])) == 1
        assert "all 3 cases are answered right, so that no temperature follows" in caplog.text

    def test_refuses_what_it_cannot_fit(self):
        with pytest.raises(ValueError, match="finite logits of at least one case, got 0 cases"):
            fit_temperature(np.zeros((0, 3)), np.zeros(0, int))
        with pytest.raises(ValueError, match="finite logits"):
            fit_temperature(np.array([[np.nan, 0]]), np.array([0]))


class TestEvaluating:
    NAMES = ("quiz_0_001", "quiz_1_002", "quiz_2_003")

    @pytest.fixture
    def folder(self, tmp_path):
        for part in ("reference", "predictions"):
            for name in self.NAMES:
                write_mask(tmp_path / part / f"{name}.nii.gz", labels())
        return tmp_path

    HEADER = "Names,Subtype,Probability_0,Probability_1,Probability_2"
    ROWS = ("quiz_0_001.nii.gz,0,0.8,0.1,0.1", "quiz_1_002.nii.gz,1,0.2,0.7,0.1", "quiz_2_003.nii.gz,0,0.5,0.1,0.4")

    def test_columns_of_the_table(self, folder):
        write_results(folder / "predictions", self.ROWS, self.HEADER)
        found = evaluate(folder / "predictions", folder / "reference", out=folder / "out", resamples=20)
        probabilities = found.subtypes.probabilities
        assert probabilities.brier == pytest.approx((0.06 + 0.14 + 0.62) / 3)
        assert probabilities.auc == (1.0, 1.0, 1.0)
        assert f"| Brier score | {probabilities.brier:.3f} |" in comparison_table(found)
        content = json.loads((folder / "out" / "evaluation.json").read_text())
        assert len(content["subtypes"]["probabilities"]["reliability"]) == 10
        assert "probability_2" in (folder / "out" / "evaluation_cases.csv").read_text()

    def test_what_predict_recorded(self, folder):
        write_results(folder / "predictions", [row[: row.index(",") + 2] for row in self.ROWS])
        cases = [
            {
                "name": name,
                "classification": {"probabilities": dict(zip("012", map(float, row.split(",")[2:]), strict=True))},
            }
            for name, row in zip(self.NAMES, self.ROWS, strict=True)
        ]
        (folder / "predictions" / "predictions.json").write_text(json.dumps({"schema": 1, "cases": cases}))
        found = evaluate(folder / "predictions", folder / "reference", resamples=20)
        assert found.subtypes.probabilities.brier == pytest.approx((0.06 + 0.14 + 0.62) / 3)
        (folder / "predictions" / "predictions.json").write_text("[]")
        assert evaluate(folder / "predictions", folder / "reference", resamples=20).subtypes.probabilities is None

    @pytest.mark.parametrize("row", ["quiz_0_001.nii.gz,0,0.8,0.1,0.2", "quiz_0_001.nii.gz,0,1.2,-0.1,-0.1",
                                     "quiz_0_001.nii.gz,0,a,0.1,0.1", "quiz_0_001.nii.gz,0,,,"])  # fmt: skip
    def test_columns_that_are_no_probabilities(self, folder, row):
        write_results(folder / "predictions", [row], self.HEADER)
        with pytest.raises(
            Exception, match="line 2: the probabilities of quiz_0_001.nii.gz must be numbers that add up"
        ):
            evaluate(folder / "predictions", folder / "reference")

    def test_folds_are_evaluated_one_by_one(self, folder):
        (folder / "reference").rename(folder / "labelsTr")
        table = "case,subtype,split,fold\n" + "".join(f"{name},{name[5]},train,{name[5]}\n" for name in self.NAMES)
        (folder / "classification_labels.csv").write_text(table)
        write_results(folder / "predictions", self.ROWS, self.HEADER)
        found = evaluate(folder / "predictions", folder, split="train", resamples=20)
        assert [(fold.fold, fold.cases, fold.macro_f1) for fold in found.folds] == [
            (0, 1, 1.0),
            (1, 1, 1.0),
            (2, 1, 0.0),
        ]
        said = comparison_table(found)
        assert "| fold | cases | whole DSC | lesion DSC | macro-F1 |" in said
        assert "| mean +- standard deviation | | 1.000 +- 0.000 | 1.000 +- 0.000 | 0.667 +- 0.577 |" in said
