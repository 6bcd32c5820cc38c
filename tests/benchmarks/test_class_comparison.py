"""Ways to answer for the class: what they are fitted on, and what is read from a scan."""

from types import SimpleNamespace

import numpy as np
import pytest
from nnturbo.benchmarks.class_comparison import Comparison, compare, fitted_on_the_others
from nnturbo.benchmarks.demo_model import better_classifier, class_logits, observe, summarise
from nnturbo.engine import Engine, EngineOptions
from nnturbo.engine.model.folder import read_model
from nnturbo.training.whole_cases import LabelledCase

from tests.engine.factory import multi_task, plans_json, pooled_classifier, write_model, write_scan

CLASSES = 3
LABELS = np.random.default_rng(9).permutation(np.arange(60) % CLASSES)


def features(strength, seed):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(len(LABELS), CLASSES)) + strength * np.eye(CLASSES)[LABELS]


def accuracy(logits):
    return (logits.argmax(1) == LABELS).mean()


def test_a_case_does_not_help_to_answer_for_itself():
    many = np.random.default_rng(0).normal(size=(len(LABELS), 40))
    assert accuracy(fitted_on_the_others(many, LABELS)) < 0.6
    assert accuracy(fitted_on_the_others(features(6, 1), LABELS)) == 1
    assert not np.allclose(
        fitted_on_the_others(features(1, 1), LABELS), fitted_on_the_others(features(1, 1), LABELS, cases=20)
    )


def test_differences_are_those_of_the_same_cases():
    truth = np.arange(90) % CLASSES
    right, wrong = np.eye(CLASSES)[truth], np.eye(CLASSES)[(truth + (np.arange(90) < 30)) % CLASSES]
    comparison = Comparison(truth.tolist(), CLASSES)
    comparison.add("right", right)
    comparison.add("a third wrong", wrong)
    comparison.compare_with("right")
    first, second = (row["difference"] for row in comparison.rows)
    assert first == {"from": "right", "value": 0, "low": 0, "high": 0}
    assert second["value"] == pytest.approx(-1 / 3)
    assert second["low"] < -1 / 3 < second["high"] < 0


def test_the_stage_that_tells_the_class_is_found():
    by_stage = {stage: features(6.0 * (stage == 1), stage) for stage in range(5)}
    head, fitted = features(0, 8), features(6, 9)
    found = {row["way"]: row["macro_f1"] for row in compare(head, fitted, by_stage, {"a tile": features(6, 7)}, LABELS)}
    assert found["the same, 48 cases, stage 1"] > 0.95
    assert found["the same, 48 cases, stage 3"] < 0.6
    assert found["the same, 48 cases, a tile"] > 0.95
    assert found["lda, fitted on the training cases"] > 0.95
    assert found["head, as trained"] < 0.6
    assert found["lda, fitted on shuffled classes"] < 0.6


def test_the_better_classifier_answers_and_the_head_where_they_are_equal():
    right, wrong = np.eye(CLASSES)[LABELS], np.eye(CLASSES)[(LABELS + (LABELS == 0)) % CLASSES]
    assert better_classifier({"head": wrong, "lda": right}, LABELS) == "lda"
    assert better_classifier({"head": right, "lda": wrong}, LABELS) == "head"
    assert better_classifier({"head": wrong, "lda": 2 * wrong}, LABELS) == "head"


def test_the_class_is_measured_on_the_half_that_chose_nothing():
    observed = SimpleNamespace(
        labels=LABELS, whole=np.ones(60), lesion=np.ones(60), coarse=np.ones(60), contrast=np.full(60, 5.0)
    )
    values = np.eye(CLASSES)[LABELS]
    values[:30] = values[:30, ::-1]
    measures, _ = summarise(observed, {"head": values, "lda": values}, "head")
    assert measures["subtype macro-F1, second half"]["value"] == 1


def test_calibration_is_measured_on_the_half_that_did_not_give_the_temperature():
    observed = SimpleNamespace(
        labels=LABELS,
        whole=np.full(60, 0.9),
        lesion=np.linspace(0.5, 0.7, 60),
        coarse=np.full(60, 0.95),
        contrast=np.linspace(5, 29, 60),
    )
    measures, temperatures = summarise(observed, {"head": 20 * features(1, 0), "lda": features(1, 0)}, "head")
    assert temperatures["head"] == pytest.approx(20 * temperatures["lda"], rel=1e-3)
    name = "expected calibration error, second half"
    assert measures[name] != measures[f"{name}, without temperature"]
    assert measures["lesion DSC"]["value"] == pytest.approx(0.6)
    assert measures["lesion DSC of 13 lesions 0 to 10 HU from the gland"]["value"] < 0.55
    assert measures["lesion DSC of 47 lesions 10 to 30 HU from the gland"]["value"] > 0.6


def test_outputs_are_the_engine_s(tmp_path):
    checkpoint = {"pooled_classifier": pooled_classifier() | {"temperature": 2.0}, "class_temperature": 4.0}
    plans = multi_task(plans_json())
    folder = write_model(tmp_path / "m", plans=plans, checkpoint=checkpoint)
    scan, mask = write_scan(tmp_path / "a_0000.nii.gz"), tmp_path / "a.nii.gz"
    engines = {
        kind: Engine.load(folder, device="cpu", mirror=False, options=EngineOptions(classifier=kind))
        for kind in ("head", "lda")
    }
    engines["head"].predict(scan).save(mask)
    model = read_model(folder)
    case = LabelledCase(name="a", images=(scan,), labels=mask, subtype=1)
    observed = observe(model, [case])
    assert observed.whole.tolist() == [1]
    logits, _ = class_logits(model, observed, (4, 8))
    for kind, temperature in (("head", 4), ("lda", 2)):
        theirs = np.array(engines[kind].predict(scan).classification.logits) * temperature
        ours = logits[kind][0]
        assert ours - ours.mean() == pytest.approx(theirs - theirs.mean(), abs=1e-4)
