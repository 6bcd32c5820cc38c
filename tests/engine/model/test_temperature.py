"""Calibrated class logits: a temperature in the checkpoint divides them, in every way to run and to keep a model."""

import pytest
import torch
from nnturbo.engine import CheckpointError, Engine, EngineOptions
from nnturbo.engine.cli import main
from nnturbo.engine.export.build import build
from nnturbo.engine.model.folder import read_model

from tests.engine.factory import multi_task, plans_json, pooled_classifier, write_model, write_scan

KINDS = ("gap_linear", "gap_mlp", "attention")


def answer(folder, scan, **options):
    engine = Engine.load(folder, device="cpu", mirror=False, options=EngineOptions(**options))
    return engine.predict(scan).classification


@pytest.fixture(scope="module")
def scan(tmp_path_factory):
    return write_scan(tmp_path_factory.mktemp("scan") / "a_0000.nii.gz")


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_the_head_are_divided(tmp_path, scan, kind):
    plans = multi_task(plans_json(), kind=kind)
    plain = answer(write_model(tmp_path / "plain", plans=plans), scan)
    divided = answer(write_model(tmp_path / "divided", plans=plans, checkpoint={"class_temperature": 2.5}), scan)
    assert divided.logits == pytest.approx([logit / 2.5 for logit in plain.logits], rel=1e-4)
    assert divided.label == plain.label
    assert max(divided.probabilities) < max(plain.probabilities)


def test_folds_have_temperatures_of_their_own(tmp_path, scan):
    plans = multi_task(plans_json())
    folder = write_model(tmp_path / "m", plans=plans, folds=("0", "1"))
    alike = EngineOptions(aggregation="mean")  # the weights of tiles come from all folds
    engines = [Engine.load(folder, folds=[fold], device="cpu", mirror=False, options=alike) for fold in (0, 1)]
    one, two = (engine.predict(scan) for engine in engines)
    for fold, temperature in (("0", 2.0), ("1", 4.0)):
        path = folder / f"fold_{fold}" / "checkpoint_final.pth"
        torch.save({**torch.load(path, weights_only=False), "class_temperature": temperature}, path)
    pairs = zip(one.classification.logits, two.classification.logits, strict=True)
    assert answer(folder, scan, aggregation="mean").logits == pytest.approx(
        [(a / 2 + b / 4) / 2 for a, b in pairs], rel=1e-4
    )
    assert read_model(folder).temperatures == (2.0, 4.0)


def test_logits_of_a_fitted_classifier_are_divided_by_its_own(tmp_path, scan):
    plans, fitted = multi_task(plans_json()), pooled_classifier()
    plain = answer(write_model(tmp_path / "plain", plans=plans, checkpoint={"pooled_classifier": fitted}), scan)
    both = {"pooled_classifier": {**fitted, "temperature": 3.0}, "class_temperature": 7.0}
    divided = answer(write_model(tmp_path / "divided", plans=plans, checkpoint=both), scan)
    assert divided.logits == pytest.approx([logit / 3 for logit in plain.logits], rel=1e-3)


@pytest.mark.parametrize("classifier", ["head", "lda"])
def test_a_bundle_keeps_it(tmp_path, scan, classifier):
    checkpoint = {"pooled_classifier": {**pooled_classifier(), "temperature": 3.0}, "class_temperature": 7.0}
    folder = write_model(tmp_path / "m", plans=multi_task(plans_json()), checkpoint=checkpoint)
    build(folder, tmp_path / "bundle", backend="torch", device="cpu", classifier=classifier)
    by_folder = answer(folder, scan, classifier=classifier)
    assert answer(tmp_path / "bundle", scan).logits == pytest.approx(by_folder.logits, rel=1e-5)


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), "2", True, None, 1e9])
def test_what_is_no_temperature_is_refused(tmp_path, value):
    plans = multi_task(plans_json())
    folder = write_model(tmp_path / "head", plans=plans, checkpoint={"class_temperature": value})
    with pytest.raises(CheckpointError, match=r"class_temperature must be a number from 0\.001 to 1000, got"):
        read_model(folder)
    fitted = {"pooled_classifier": {**pooled_classifier(), "temperature": value}}
    with pytest.raises(CheckpointError, match=r"temperature must be a number from 0\.001 to 1000, got"):
        read_model(write_model(tmp_path / "lda", plans=plans, checkpoint=fitted))


def test_a_network_without_a_head_has_none(tmp_path):
    with pytest.raises(CheckpointError, match="class_temperature may be given only with the weights of a head"):
        read_model(write_model(tmp_path / "m", checkpoint={"class_temperature": 2.0}))


def test_inspect_says_it(tmp_path, capsys):
    checkpoint = {"pooled_classifier": {**pooled_classifier(), "temperature": 3.0}, "class_temperature": 7.0}
    folder = write_model(tmp_path / "m", plans=multi_task(plans_json()), checkpoint=checkpoint)
    assert main(["inspect", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "fold 0: lda on stages 0, 1, calibrated by temperature 3" in said
    assert "fold 0, calibrated by temperature 7" in said
