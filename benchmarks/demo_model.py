"""The demo model on phantoms that no training saw: segmentation, every way to answer for the class, and probabilities.

    python -m nnturbo.benchmarks.demo_model [--cases 600] [--seed S] [--calibrate] [--json FILE]

The phantoms come from a seed by which nothing has been chosen: take another seed after anything was chosen by the
result. Each is predicted once, without mirroring. The first half of the phantoms gives the temperatures and tells
whether head or fitted classifier answers; with `--calibrate` both are stored in the model. The class and its
probabilities are measured on the second half. Beside the model stand ways to answer that it does not take, and two
limits: its outline where the lesion hardly differs from the gland, and the true outline in place of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnturbo.engine.backends.torch import TorchRunner
from nnturbo.engine.engine import Engine
from nnturbo.engine.files import sha256
from nnturbo.engine.model.folder import Model, read_model, with_classifier
from nnturbo.engine.model.folds import InferenceNetwork
from nnturbo.engine.model.heads import FocusPooling
from nnturbo.engine.model.network import build_network
from nnturbo.engine.options import DEFAULT_CHECKPOINT
from nnturbo.engine.pipeline.prediction import answer
from nnturbo.engine.pipeline.steps import requests_of
from nnturbo.engine.pipeline.window import SlidingWindow
from nnturbo.engine.scans.volume import read_volume
from nnturbo.training.cross_validate import store_evidence
from nnturbo.training.data.tables import read_subtype_results
from nnturbo.training.evaluation.calibration import fit_temperature, probability_metrics
from nnturbo.training.evaluation.metrics import (
    Interval,
    bootstrap_macro_f1,
    bootstrap_mean,
    classification_metrics,
    dice,
)
from nnturbo.training.held_out import HEAD, LDA
from nnturbo.training.phantoms.phantom import SMALL_SETTINGS, write_dataset
from nnturbo.training.whole_cases import LabelledCase
from numpy.typing import NDArray
from scipy.special import softmax
from torch.nn import functional as F

from .class_comparison import RESAMPLES, Floats, compare
from .class_crops import LesionTiles, columns
from .heads import AllHeads
from .report import write_report

MODEL = Path(__file__).resolve().parents[1] / "examples" / "demo_model"
FRESH_SEED = 20261127
"""Of phantoms by which nothing has been chosen; the demo's own, of `DEMO_SEED`, have been looked at often."""
CHECKPOINT = f"fold_0/{DEFAULT_CHECKPOINT}"
CONTRASTS = ((0, 10), (10, 30), (30, 999))
"""HU between lesion and gland, from and below, for which the outline is measured apart."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Observed:
    """What a network gives for N cases.

    Attributes:
        labels: (N,) true classes.
        whole, lesion: (N,) DSC.
        coarse: (N,) DSC of the true lesion after it was brought to the network's grid and back.
        contrast: (N,) HU by which the means of lesion and gland differ.
        outputs: (N, F): logits of the head, and pooled features of all stages.
        around: Pooled features (N, F) by way, from tiles around the lesion.
    """

    labels: NDArray[np.integer[Any]]
    whole: Floats
    lesion: Floats
    coarse: Floats
    contrast: Floats
    outputs: Floats
    around: dict[str, Floats]


def held_out_phantoms(folder: Path) -> list[LabelledCase]:
    """Cases of the test split of a phantom data set that was written with its answers."""
    answers = read_subtype_results(folder / "test_answers" / "subtype_results.csv").subtypes
    return [
        LabelledCase(
            name=name,
            images=(folder / "test" / f"{name}_0000.nii.gz",),
            labels=folder / "test_answers" / f"{name}.nii.gz",
            subtype=int(subtype),
        )
        for name, subtype in answers.items()
    ]


def observe(model: Model, cases: Sequence[LabelledCase]) -> Observed:
    """Predict cases, each once."""
    network: Any = build_network(model.plan, model.weights[0]).eval()
    network.head = AllHeads([network.head, FocusPooling(range(len(network.encoder.output_channels)))])
    fitted, device = model.pooled_classifiers[0], torch.device("cpu")
    assert fitted is not None  # the demo model has one
    tiles = LesionTiles(network, model.plan, fitted.stages)
    runner = TorchRunner(InferenceNetwork([network]).eval(), device, "fp32")
    engine = Engine(model, runner, window=SlidingWindow.of_plan(model.plan), sums_device=device)
    start, rows, around = time.perf_counter(), [], []
    for done, case in enumerate(cases, start=1):
        with contextlib.closing(engine.loader(requests_of([case.images[0]], None), readers=0)) as loaded:
            prepared = next(loaded)
        if isinstance(prepared, Exception):
            raise prepared
        segmented = engine.segmenter(prepared, False, None)
        assert segmented.votes is not None  # the plan has classes
        ours = answer(replace(segmented, votes=None), model.plan, ()).segmentation
        truth, scan = (np.asarray(read_volume(path, channels=1).array[0]) for path in (case.labels, case.images[0]))
        truth = np.rint(truth)
        rows.append(
            (
                dice(ours > 0, truth > 0),
                dice(ours == 2, truth == 2),
                dice(through_grid(truth == 2, prepared.case.shape), truth == 2),
                abs(float(scan[truth == 2].mean() - scan[truth == 1].mean())),
                segmented.votes.mean_logits().numpy(),
            )
        )
        around.append(tiles.features(prepared.case, ours, truth))
        if done % 40 == 0:
            print(f"{done} of {len(cases)}, {time.perf_counter() - start:.0f} s", flush=True)
    whole, lesion, coarse, contrast, outputs = (np.array(column) for column in zip(*rows, strict=True))
    return Observed(
        labels=np.array([case.subtype for case in cases]),
        whole=whole,
        lesion=lesion,
        coarse=coarse,
        contrast=contrast,
        outputs=outputs,
        around=columns(around),
    )


def through_grid(mask: NDArray[np.bool_], shape: Sequence[int]) -> NDArray[np.bool_]:
    """Bring a mask to another grid and back, linearly."""
    values = torch.from_numpy(mask)[None, None].float()
    for size in (shape, mask.shape):
        values = F.interpolate(values, list(size), mode="trilinear")
    return (values[0, 0] > 0.5).numpy()


def class_logits(
    model: Model, observed: Observed, channels: Sequence[int]
) -> tuple[dict[str, Floats], dict[int, Floats]]:
    """Split outputs into class logits by classifier, not divided by a temperature, and features by stage."""
    fitted = model.pooled_classifiers[0]
    assert fitted is not None  # the demo model has one
    bounds = len(fitted.bias) + np.cumsum([0, *(3 * width for width in channels)])
    by_stage = {stage: observed.outputs[:, low:high] for stage, (low, high) in enumerate(pairwise(bounds))}
    features = np.concatenate([by_stage[stage] for stage in fitted.stages], 1)
    logits = {
        HEAD: observed.outputs[:, : bounds[0]] * model.temperatures[0],
        LDA: features @ fitted.weight.numpy().T + fitted.bias.numpy(),
    }
    return logits, by_stage


def summarise(
    observed: Observed, logits: dict[str, Floats], answers: str
) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Measure segmentation, class and probabilities, each with its interval; give the temperatures too.

    What may have been chosen by the first half is measured on the second one.
    """
    half = len(observed.labels) // 2
    truth = observed.labels[half:].tolist()
    temperatures = {kind: fit_temperature(values[:half], observed.labels[:half]) for kind, values in logits.items()}
    measures: dict[str, dict[str, float]] = {}

    def keep(name: str, value: float, interval: Interval) -> None:
        measures[name] = {"value": value, **asdict(interval)}

    dsc = {"whole-pancreas DSC": observed.whole, "lesion DSC": observed.lesion}
    for low, high in CONTRASTS:
        within = observed.lesion[(low <= observed.contrast) & (observed.contrast < high)]
        if len(within):
            dsc[f"lesion DSC of {len(within)} lesions {low} to {high} HU from the gland"] = within
    dsc["lesion DSC of the true outline on the network's grid"] = observed.coarse
    for name, values in dsc.items():
        keep(name, float(values.mean()), bootstrap_mean(values.tolist(), resamples=RESAMPLES, seed=0))
    predicted = logits[answers][half:].argmax(1).tolist()
    interval = bootstrap_macro_f1(truth, predicted, resamples=RESAMPLES, seed=0)
    macro_f1 = classification_metrics(truth, predicted, logits[answers].shape[1]).macro_f1
    keep("subtype macro-F1, second half", macro_f1, interval)
    for without, temperature in ((", without temperature", 1.0), ("", temperatures[answers])):
        shares = softmax(logits[answers][half:] / temperature, 1).tolist()
        found = probability_metrics(truth, shares, resamples=RESAMPLES, seed=0)
        name = f"expected calibration error, second half{without}"
        keep(name, found.calibration_error, found.calibration_error_interval)
    return measures, temperatures


def better_classifier(logits: dict[str, Floats], labels: NDArray[np.integer[Any]]) -> str:
    """Name the one with the higher macro-F1 on these cases; the head where they are equal."""
    scores = {
        kind: classification_metrics(labels.tolist(), values.argmax(1).tolist(), values.shape[1]).macro_f1
        for kind, values in logits.items()
    }
    return LDA if scores[LDA] > scores[HEAD] else HEAD


def report(model: Model, observed: Observed, options: argparse.Namespace) -> None:
    """Measure, print and keep; with `--calibrate`, store what the first half tells."""
    network: Any = build_network(model.plan, model.weights[0])
    logits, by_stage = class_logits(model, observed, network.encoder.output_channels)
    half = len(observed.labels) // 2
    if options.calibrate:
        answers = better_classifier({kind: values[:half] for kind, values in logits.items()}, observed.labels[:half])
    else:
        answers = with_classifier(model, "auto").classifier or HEAD
    measures, temperatures = summarise(observed, logits, answers)
    if options.calibrate:
        store_evidence(options.model / CHECKPOINT, temperatures, prefer_fitted=answers == LDA)
    rows = compare(logits[HEAD], logits[LDA], by_stage, observed.around, observed.labels)
    for name, of in (
        *measures.items(),
        *(
            (row["way"], {"value": row["macro_f1"], "low": row["interval"][0], "high": row["interval"][1]})
            for row in rows
        ),
    ):
        print(f"{name:56} {of['value']:.3f} ({of['low']:.3f} to {of['high']:.3f})")
    write_report(options.json, {
        "benchmark": "demo_model", "checkpoint": CHECKPOINT, "sha256": sha256(options.model / CHECKPOINT),
        "cases": len(observed.labels), "seed": options.seed, "classifier": answers, "temperatures": temperatures,
        "measures": measures, "rows": rows,
    })  # fmt: skip


def main() -> None:
    """Generate, predict and report."""
    parser = argparse.ArgumentParser(description="demo model on held-out phantoms")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--cases", type=int, default=600)
    parser.add_argument("--seed", type=int, default=FRESH_SEED)
    parser.add_argument("--calibrate", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model = read_model(options.model, folds=[0])
    with tempfile.TemporaryDirectory() as folder:
        write_dataset(
            folder, counts={"test": options.cases}, seed=options.seed, settings=SMALL_SETTINGS, answers=True, workers=2
        )
        observed = observe(model, held_out_phantoms(Path(folder)))
    report(model, observed, options)


if __name__ == "__main__":
    main()
