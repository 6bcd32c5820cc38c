"""Recipes that go on from one checkpoint: which weights each model has, what is compared, and what is kept."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
from nnturbo.benchmarks import recipes
from nnturbo.benchmarks.recipes import MEAN, Predicted, compare, recipe_of
from nnturbo.engine.ensemble import Ensemble
from nnturbo.engine.options import EngineOptions
from nnturbo.training.data.masks import read_mask
from nnturbo.training.data.task import read_task
from nnturbo.training.evaluation.metrics import dice
from nnturbo.training.recipe import PRESETS
from nnturbo.training.trainer_state import stored_recipe

from tests.training.conftest import tiny, trained, without_curves  # noqa: F401 - fixtures
from tests.training.tiny import PHANTOMS, TINY

LABELS = np.arange(60) % 3


def seen(overlap, wrong):
    """A way whose DSC is given, and which answers wrong for the first cases."""
    shares = np.eye(3)[(LABELS + (np.arange(60) < wrong)) % 3]
    return Predicted(dsc=np.column_stack([np.linspace(overlap, overlap + 0.1, 60)] * 2), shares={"head": shares})


def test_differences_are_those_of_the_same_cases():
    better, reference = compare({"better": seen(0.8, 0), "other": seen(0.7, 30)}, LABELS.tolist(), "other")
    dsc, f1 = better["measures"]["lesion DSC"], better["measures"]["macro-F1, head"]
    assert dsc["value"] == pytest.approx(0.85)
    assert dsc["low"] < 0.85 < dsc["high"]
    assert [dsc["difference"][key] for key in ("value", "low", "high")] == pytest.approx([0.1] * 3)
    assert f1["value"] == 1
    assert f1["difference"]["value"] == pytest.approx(0.5)
    assert 0.3 < f1["difference"]["low"] < 0.5 < f1["difference"]["high"] < 0.7
    for measure in reference["measures"].values():
        assert measure["difference"] == {"value": 0, "low": 0, "high": 0}


def test_recipes_differ_by_their_preset_alone_and_keep_the_start_s_head():
    start = replace(TINY, head_hidden=9)
    made = {preset: recipe_of(preset, start, 200, "bf16") for preset in PRESETS}
    for preset, recipe in made.items():
        assert (recipe.epochs * recipe.iterations, recipe.head_hidden) == (200, 9)
        assert recipe.learning_rate == PRESETS[preset].learning_rate
        assert recipe.left_out == PRESETS[preset].left_out
    assert len(set(made.values())) == 4


@pytest.mark.thorough  # four trainings
def test_a_run_goes_on_where_it_was_and_averages_as_an_ensemble_does(
    tiny, trained, without_curves, tmp_path, monkeypatch  # noqa: F811
):  # fmt: skip
    monkeypatch.setattr(recipes, "SMALL_SETTINGS", PHANTOMS)
    arguments = {
        "start": trained / "fold_0" / "checkpoint_final.pth", "dataset": tiny.name, "plans": tiny.plans_name,
        "raw": tiny.raw, "preprocessed": tiny.preprocessed, "folder": tmp_path / "kept", "cases": 6, "seed": 5,
        "steps": 8, "fit": 240, "device": "cpu", "json": tmp_path / "recipes.json",
    }  # fmt: skip
    line = [str(part) for name, value in arguments.items() for part in (f"--{name}", value)]
    monkeypatch.setattr(sys, "argv", ["recipes", *line, "--stages", "1", "2"])
    recipes.main()
    checkpoints = {path: path.read_bytes() for path in sorted((tmp_path / "kept").rglob("checkpoint_final.pth"))}
    assert len(checkpoints) == 4
    found = json.loads((tmp_path / "recipes.json").read_text())
    rows = {row["way"]: row["measures"] for row in found["rows"]}
    assert list(rows) == [*PRESETS, MEAN]
    assert set(rows[MEAN]) == {"whole-pancreas DSC", "lesion DSC", "macro-F1, head", "macro-F1, lda"}

    # The second run trains and generates nothing, and finds the same.
    for part in ("write_dataset", "fit_pooled_classifier"):
        monkeypatch.setattr(recipes, part, None)
    recipes.main()
    assert all(path.read_bytes() == content for path, content in checkpoints.items())
    assert json.loads((tmp_path / "recipes.json").read_text())["rows"] == found["rows"]

    models = {name: next(path.parents[1] for path in checkpoints if name in path.parts) for name in PRESETS}
    assert stored_recipe(models["aggressive"] / "fold_0" / "checkpoint_final.pth").preset == "aggressive"
    case = recipes.held_out_phantoms(tmp_path / "kept" / "phantoms_5_6")[0]
    task = read_task(tiny.preprocessed / tiny.name / "dataset.json")
    mean = recipes.predict_all(models, list(PRESETS), [case], task, "cpu")[MEAN]
    truth = read_mask(case.labels, task)[0].array[0]
    for kind in ("head", "lda"):
        options = EngineOptions(classifier=kind)
        ensemble = Ensemble.load(list(models.values()), device="cpu", mirror=False, options=options)
        prediction = ensemble.predict(case.images[0])
        assert mean.shares[kind][0] == pytest.approx(prediction.classification.probabilities, abs=1e-4)
        for place, inside in enumerate((lambda labels: labels > 0, lambda labels: labels == 2)):
            assert mean.dsc[0, place] == dice(inside(prediction.segmentation), inside(truth))
