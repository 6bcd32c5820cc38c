"""A demonstration in one command: predicts phantoms, compares them with the truth, and draws one."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..engine.engine import Engine
from ..engine.errors import EngineError, ModelError, PredictionError
from ..engine.files import sha256, written_atomically
from ..engine.jobs.cases import find_cases
from ..engine.jobs.job import Job
from ..engine.jobs.run import predict_cases
from ..engine.scans.volume import read_volume
from .data.task import WHOLE
from .evaluation.evaluate import evaluate
from .evaluation.results import CaseEvaluation, Evaluation
from .phantoms.phantom import SMALL_SETTINGS, write_dataset

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DEMO_SEED = 7
"""Seed of the phantoms, of which the first are shown; the demo model was trained on phantoms of another seed."""

WINDOW_HU = (-110.0, 190.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Demo:
    """Results of a demonstration.

    Attributes:
        evaluation: Comparison with the truth.
        records: Records of `predictions.json`, by case.
        picture: CT, truth and prediction of one case.
    """

    evaluation: Evaluation
    records: Mapping[str, Mapping[str, Any]]
    picture: Path


def demonstrate(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    cases: int = 6,
    seed: int = DEMO_SEED,
    mirror: bool = False,
    device: str = "auto",
) -> Demo:
    """Generate phantoms, predict, evaluate, and draw one case.

    Args:
        model: Model folder.
        output: Folder for the results; made if it does not exist. Results of an earlier demonstration are replaced.
        cases: Number of phantoms.
        seed: Seed of the phantoms.
        mirror: Whether to average over mirrored views, which takes eight times as long.
        device: Device of the network.

    Raises:
        EngineError: Where the model cannot be used, matplotlib is missing, or a case fails.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise EngineError(f"the picture needs matplotlib ({error}): pip install 'nnturbo[demo]'") from error
    output = Path(output)
    engine = Engine.load(model, mirror=mirror, device=device)
    write_dataset(output, counts={"test": cases}, seed=seed, settings=SMALL_SETTINGS, answers=True, overwrite=True)
    predictions, truth = output / "predictions", output / "test_answers"
    outcome = predict_cases(engine, find_cases(output / "test", ".nii.gz"), Job(output=predictions))
    if outcome.failed:
        raise PredictionError("; ".join(f"{name}: {reason}" for name, reason in outcome.failed.items()))
    records = {
        record["name"]: record for record in json.loads((predictions / "predictions.json").read_bytes())["cases"]
    }
    evaluation = evaluate(predictions, truth, resamples=500)
    # The case in the middle: neither the best nor the worst.
    shown = sorted(evaluation.cases, key=lambda case: case.structures["lesion"].dsc)[len(evaluation.cases) // 2]
    picture = output / f"{shown.name}.png"
    _draw(shown, output, records[shown.name].get("classification"), picture)
    return Demo(evaluation=evaluation, records=records, picture=picture)


def demo_table(demo: Demo) -> str:
    """Write the results by case, and the seconds by stage, as plain text."""
    lines = ["case        DSC pancreas  DSC lesion  subtype  predicted", "-" * 57]
    for case in demo.evaluation.cases:
        classification = demo.records[case.name].get("classification")
        predicted = "-"
        if classification:
            probability = classification["probabilities"][classification["name"]]
            predicted = f"{classification['name']} ({probability:.2f})"
        whole, lesion = (case.structures[name].dsc for name in (WHOLE, "lesion"))
        lines.append(f"{case.name:<12}{whole:>12.3f}{lesion:>12.3f}{case.subtype:>9}  {predicted:>9}")
    whole, lesion = (demo.evaluation.structures[name].dsc for name in (WHOLE, "lesion"))
    lines += ["-" * 57, f"{'mean':<12}{whole:>12.3f}{lesion:>12.3f}", "", "seconds by stage, mean over the cases"]
    stages: dict[str, list[float]] = {}
    for record in demo.records.values():
        for stage, milliseconds in record["timings_ms"].items():
            stages.setdefault(stage, []).append(milliseconds / 1000)
    lines += [f"  {stage:<15}{np.mean(seconds):>8.2f}" for stage, seconds in stages.items()]
    return "\n".join(lines)


def held_out_table(results: str | os.PathLike[str], model: str | os.PathLike[str]) -> str:
    """Write what a benchmark found of a model over many phantoms, as plain text.

    Args:
        results: File of `nnturbo.benchmarks.demo_model`.
        model: Folder of the model that is demonstrated.

    Raises:
        ModelError: Where the file is no such result, or is of another model.
    """
    try:
        found = json.loads(Path(results).read_bytes())
        width = max(map(len, found["measures"])) + 2
        lines = [
            f"{name:<{width}}{of['value']:.3f}  ({of['low']:.3f} to {of['high']:.3f})"
            for name, of in found["measures"].items()
        ]
        title = f"the same model over {found['cases']} phantoms of seed {found['seed']}, with 95 % intervals"
        checkpoint, measured = Path(model) / found["checkpoint"], found["sha256"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{results} must be a result of python -m nnturbo.benchmarks.demo_model: {type(error).__name__}: {error}"
        ) from error
    if not checkpoint.is_file() or sha256(checkpoint) != measured:
        raise ModelError(f"{results} is of another model than {model}: measure this one, or leave the results out")
    return "\n".join([title, *lines])


def _draw(case: CaseEvaluation, output: Path, classification: Mapping[str, Any] | None, path: Path) -> None:
    """Draw the axial slice with most lesion: CT, true and predicted outlines, and the class probabilities."""
    from matplotlib.figure import Figure

    image = read_volume(output / "test" / f"{case.name}_0000.nii.gz", channels=1)
    truth = read_volume(output / "test_answers" / f"{case.name}.nii.gz", channels=1).array[0]
    predicted = read_volume(output / "predictions" / f"{case.name}.nii.gz", channels=1).array[0]
    z = int(np.argmax((truth == 2).sum((1, 2))))
    aspect = image.geometry.spacing[1] / image.geometry.spacing[2]
    whole, lesion = (case.structures[name].dsc for name in (WHOLE, "lesion"))
    figure = Figure(figsize=(13, 4), layout="constrained")
    panels = figure.subplots(1, 4, width_ratios=(3, 3, 3, 1.6))
    for axes, title, labels in (
        (panels[0], f"{case.name}, slice {z}", None),
        (panels[1], "truth", truth[z]),
        (panels[2], f"prediction (DSC {whole:.3f}, lesion {lesion:.3f})", predicted[z]),
    ):
        axes.imshow(image.array[0, z], cmap="gray", vmin=WINDOW_HU[0], vmax=WINDOW_HU[1], aspect=aspect)
        axes.set_title(title, fontsize=10)
        axes.set_axis_off()
        if labels is not None:
            for values, colour in (((1, 2), "#ffb000"), ((2,), "#ff3c78")):
                mask = np.isin(np.rint(labels), values)
                if mask.any() and not mask.all():
                    axes.contour(mask, [0.5], colors=[colour], linewidths=1.4)
    _draw_classes(panels[3], case, classification)
    with written_atomically(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _draw_classes(axes: Axes, case: CaseEvaluation, classification: Mapping[str, Any] | None) -> None:
    if classification is None:
        axes.set_axis_off()
        return
    names: Sequence[str] = list(classification["probabilities"])
    colours = ["#ff3c78" if name == str(case.subtype) else "#9aa0a6" for name in names]
    axes.bar(names, [classification["probabilities"][name] for name in names], color=colours)
    axes.set_ylim(0, 1)
    axes.set_title(f"subtype (true: {case.subtype})", fontsize=10)
