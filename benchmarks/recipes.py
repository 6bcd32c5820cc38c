"""Goes on from one checkpoint by several recipes, with as many batches each, and compares them on held-out phantoms.

    python -m nnturbo.benchmarks.recipes --start CHECKPOINT --dataset NAME --plans NAME --raw FOLDER
        --preprocessed FOLDER --folder FOLDER [--cases 300] [--seed S] [--steps 200] [--fit 0]
        [--cpu_precision bf16] [--json FILE]

The recipes are the four presets, with an average of the weights; the mean of the four models is compared too. With
`--fit` a discriminant analysis is fitted to each model, on so many of the training cases. The phantoms come from a seed
by which nothing has been chosen: take another seed after anything was chosen by the result. Trainings, fits and
phantoms are kept in `--folder`, so that an interrupted run goes on; give another folder for another start or other
steps.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from nnturbo.engine.files import sha256
from nnturbo.engine.model.folder import read_model
from nnturbo.engine.options import DEFAULT_CHECKPOINT
from nnturbo.training.data.planning import nnunet_environment
from nnturbo.training.data.task import DATASET_FILE, Task, read_task
from nnturbo.training.evaluation.metrics import draw_resamples, interval_of, resampled_macro_f1
from nnturbo.training.evidence import compare_ensembles
from nnturbo.training.held_out import FOREGROUND, HEAD, LDA, HeldOutNetwork
from nnturbo.training.phantoms.phantom import SMALL_SETTINGS, write_dataset
from nnturbo.training.pooled_classifier import fit_pooled_classifier, training_scans
from nnturbo.training.recipe import CPU_PRECISIONS, PRESETS, Recipe
from nnturbo.training.train import recipe_to_go_on_with, train
from nnturbo.training.trainer_state import stored_recipe
from nnturbo.training.whole_cases import LabelledCase
from numpy.typing import NDArray
from scipy.special import softmax

from .demo_model import held_out_phantoms
from .heads import POOLED_STAGES
from .report import write_report

RESAMPLES, EPOCHS = 2000, 4
CONFIGURATION = "3d_fullres"
REFERENCE, MEAN = "balanced", "mean of the four presets"
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Predicted:
    """What one way to train gives for N cases.

    Attributes:
        dsc: (N, 2), of the whole foreground and of the focus.
        shares: Class probabilities (N, S) by classifier.
    """

    dsc: Floats
    shares: Mapping[str, Floats]


def recipe_of(preset: str, start: Recipe, steps: int, cpu_precision: str) -> Recipe:
    """Make the recipe of a short training that begins with trained weights, and keeps their head."""
    kept = ("head", "head_stages", "head_hidden", "head_queries", "focus_labels")
    values = {name: getattr(start, name) for name in kept} | {
        "epochs": EPOCHS,
        "iterations": steps // EPOCHS,
        "validation_iterations": 1,
        "segmentation_epochs": 0,
        "detached_epochs": 1,
        "oversample_foreground": 1.0,
        "validate_every": 0,
        "save_every": 1,
        "average_decay": 0.99,
        "cpu_precision": cpu_precision,
        "seed": 1,
    }
    return replace(PRESETS[preset], **values)


def train_preset(preset: str, start: Recipe, options: argparse.Namespace) -> Path:
    """Train a preset, or go on with it, and fit its classifier; give the model folder."""
    places: dict[str, Any] = {
        "plans_name": options.plans,
        "preprocessed": options.preprocessed,
        "results": options.folder / preset,
    }
    has_begun = recipe_to_go_on_with(options.dataset, CONFIGURATION, 0, **places) is not None
    model = train(
        options.dataset,
        CONFIGURATION,
        0,
        recipe=recipe_of(preset, start, options.steps, options.cpu_precision),
        raw=options.raw,
        device=options.device,
        resume=has_begun,
        pretrained=None if has_begun else options.start,
        **places,
    )
    fit(model, options)
    return model


def fit(model: Path, options: argparse.Namespace) -> None:
    """Fit a discriminant analysis on training cases, spread evenly over them, if it is asked for and not there yet."""
    if not options.fit or read_model(model, folds=[0]).pooled_classifiers[0] is not None:
        return
    scans = training_scans(options.raw / options.dataset, options.preprocessed / options.dataset, 0)
    places = np.linspace(0, len(scans), min(options.fit, len(scans)), endpoint=False).astype(int)
    fit_pooled_classifier(model, 0, [scans[place] for place in places], stages=options.stages, device=options.device)


def phantoms(options: argparse.Namespace) -> list[LabelledCase]:
    """Generate the phantoms, if they are not there."""
    folder = options.folder / f"phantoms_{options.seed}_{options.cases}"
    if not (folder / "test_answers" / "subtype_results.csv").is_file():  # written last
        write_dataset(
            folder,
            counts={"test": options.cases},
            seed=options.seed,
            settings=SMALL_SETTINGS,
            answers=True,
            overwrite=True,
            workers=2,
        )
    return held_out_phantoms(folder)


def predict_all(
    models: Mapping[str, Path], averaged: Sequence[str], cases: Sequence[LabelledCase], task: Task, device: str
) -> dict[str, Predicted]:
    """Predict cases with all models, each once, without mirroring.

    Args:
        models: Model folder of each way.
        averaged: Ways whose probabilities are averaged, as by an ensemble, for one more way.
        cases: The cases.
        task: Labels of the data set.
        device: Device of the networks.
    """
    networks = [
        HeldOutNetwork(model, 0, checkpoint=DEFAULT_CHECKPOINT, device=device, mirror=False)
        for model in models.values()
    ]
    members = tuple(place for place, way in enumerate(models) if way in averaged)
    subsets = dict(zip(models, ((place,) for place in range(len(models))), strict=True)) | {MEAN: members}
    kinds = [kind for kind in (HEAD, LDA) if all(kind in network.temperatures for network in networks)]
    start, dsc, logits = time.perf_counter(), [], []
    for done, case in enumerate(cases, start=1):
        answers = [network.predict(case, save_probabilities=place in members) for place, network in enumerate(networks)]
        measured = compare_ensembles(answers, case, task, networks[0].model.plan, list(subsets.values()))
        dsc.append([measured[subset] for subset in subsets.values()])
        logits.append([[answer.logits[kind, FOREGROUND] for kind in kinds] for answer in answers])
        if done % 20 == 0:
            print(f"{done} of {len(cases)}, {time.perf_counter() - start:.0f} s", flush=True)
    overlaps, shares = np.array(dsc), softmax(np.array(logits), axis=-1)  # (N, ways, 2), (N, models, kinds, S)
    return {
        way: Predicted(
            dsc=overlaps[:, index],
            shares={kind: shares[:, list(subset), place].mean(1) for place, kind in enumerate(kinds)},
        )
        for index, (way, subset) in enumerate(subsets.items())
    }


def compare(ways: Mapping[str, Predicted], labels: Sequence[int], reference: str) -> list[dict[str, Any]]:
    """Measure every way, each with its interval, and its difference from one of them over the same resamples."""
    weights = np.vstack([np.ones(len(labels)), draw_resamples(len(labels), RESAMPLES, 0)])  # all cases, then resamples
    found = {way: _statistics(of, labels, weights) for way, of in ways.items()}
    return [
        {
            "way": way,
            "measures": {
                name: {**_described(values), "difference": _described(values - found[reference][name])}
                for name, values in statistics.items()
            },
        }
        for way, statistics in found.items()
    ]


def _statistics(of: Predicted, labels: Sequence[int], weights: Floats) -> dict[str, Floats]:
    whole, lesion = (weights @ of.dsc / len(labels)).T
    measures = {"whole-pancreas DSC": whole, "lesion DSC": lesion}
    for kind, shares in of.shares.items():
        predicted = shares.argmax(1).tolist()
        measures[f"macro-F1, {kind}"] = resampled_macro_f1(labels, predicted, weights, shares.shape[1])
    return measures


def _described(values: Floats) -> dict[str, float]:
    """The value over all cases, which comes first, and the interval over the resamples."""
    return {"value": float(values[0]), **asdict(interval_of(values[1:]))}


def main() -> None:
    """Train, fit, predict, compare and keep."""
    parser = argparse.ArgumentParser(description="recipes from one start")
    for name in ("start", "raw", "preprocessed", "folder"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--plans", default="nnUNetCompactPlans")
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--seed", type=int, default=20261204)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--fit", type=int, default=0)
    parser.add_argument("--stages", nargs="+", type=int, default=list(POOLED_STAGES))
    parser.add_argument("--cpu_precision", choices=CPU_PRECISIONS, default="fp32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.steps % EPOCHS:
        parser.error(f"--steps must be a multiple of {EPOCHS}, the number of epochs, got {options.steps}")
    start = stored_recipe(options.start)
    with nnunet_environment(n_proc_DA=0):
        models = {preset: train_preset(preset, start, options) for preset in PRESETS}
    cases = phantoms(options)
    task = read_task(options.preprocessed / options.dataset / DATASET_FILE)
    ways = predict_all(models, list(PRESETS), cases, task, options.device)
    rows = compare(ways, [case.subtype for case in cases], REFERENCE)
    for row in rows:
        print(row["way"], *(f"{of['value']:.3f} ({of['difference']['low']:+.3f} to {of['difference']['high']:+.3f})"
                            for of in row["measures"].values()), sep="; ")  # fmt: skip
    write_report(options.json, {
        "benchmark": "recipes", "start": sha256(options.start), "steps": options.steps, "fitted_on": options.fit,
        "cases": len(cases), "seed": options.seed, "reference": REFERENCE, "rows": rows,
        "recipes": {
            preset: recipe_of(preset, start, options.steps, options.cpu_precision).describe() for preset in PRESETS
        },
    })  # fmt: skip


if __name__ == "__main__":
    main()
