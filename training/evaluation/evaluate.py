"""Compare predictions with the truth: segmentation, volumes and class, case by case and on average.

`metrics` and `calibration` have the measures, `results` their dataclasses, and `evaluation_report` writes tables and
figures.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path

import numpy as np

from ...engine.errors import VolumeError
from ..data.masks import grid_difference, read_mask
from ..data.references import RESULTS_FILE, References, find_references, masks_in, missing
from ..data.tables import DatasetError, PredictedClasses, in_words, raise_problems, read_subtype_results
from ..data.task import Task
from .calibration import probability_metrics
from .evaluation_report import comparison_table, write_evaluation
from .metrics import (
    StructureMetrics,
    bootstrap_macro_f1,
    bootstrap_mean,
    classification_metrics,
    compare_structure,
)
from .results import CaseEvaluation, Evaluation, FoldEvaluation, SubtypeEvaluation

__all__ = [
    "RESULTS_FILE",
    "CaseEvaluation",
    "Evaluation",
    "SubtypeEvaluation",
    "comparison_table",
    "evaluate",
    "write_evaluation",
]

RECORDS_FILE = "predictions.json"

logger = logging.getLogger(__name__)


# Its parameters are the flags of `nnturbo evaluate`.
def evaluate(
    predictions_folder: str | os.PathLike[str],
    reference_folder: str | os.PathLike[str],
    *,
    subtypes: str | os.PathLike[str] | Mapping[str, int | str] | None = None,
    predicted_subtypes: str | os.PathLike[str] | Mapping[str, int | str] | None = None,
    split: str | None = None,
    out: str | os.PathLike[str] | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> Evaluation:
    """Evaluate predicted masks and classes.

    Args:
        predictions_folder: Masks `<name><ending>`.
        reference_folder: True masks of the same names, in any layout that `references.find_references` knows.
        subtypes: True classes by case, or a table of them; by default the one that `reference_folder` holds, else names
            `quiz_<subtype>_<nnn>`.
        predicted_subtypes: Predicted classes by case, or a csv with the header `Names,Subtype`, columns of
            probabilities if any, and names with the file ending; by default `subtype_results.csv` in
            `predictions_folder`, if there is one, and the probabilities in `predictions.json`.
        split: Evaluate only the cases of this split, such as "validation"; the references must have splits.
        out: Folder for JSON, CSV and figure, see `write_evaluation`.
        resamples: Number of resamples of the bootstrap over cases.
        seed: Seed of the bootstrap.

    Returns:
        The evaluation.

    Raises:
        ValueError: If `split` is given and the references have no splits, or `resamples` is below 1.
        DatasetError: If a folder, mask or table cannot be used, or the grids of two masks differ; it lists all.
        OutputError: If `out` cannot be written.
    """
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    references = find_references(reference_folder, subtypes=subtypes, split=split, predictions=predictions_folder)
    predictions = masks_in(references.task, predictions_folder)
    guesses = _predicted_classes(Path(predictions_folder), predicted_subtypes, references.task)
    if guesses is not None and (unknown := missing(references.masks, references.subtypes)):
        wanted = ", ".join(references.task.class_names) or "any class"
        raise DatasetError(f"subtypes must be known for all cases, got none of {wanted} for {', '.join(unknown)}")
    cases = _compare_all(predictions, references, guesses)
    found = {*predictions, *(() if guesses is None else guesses.subtypes)}
    evaluation = _summarise(cases, references.task, found, guesses is not None, resamples, seed)
    for what, names in (
        ("masks are missing and count as 0", evaluation.missing_masks),
        ("subtypes are missing and count as wrong", evaluation.missing_subtypes),
        ("predictions are not in the reference and do not count", evaluation.additional),
    ):
        if names:
            logger.warning("%d %s: %s", len(names), what, ", ".join(names))
    if out is not None:
        write_evaluation(evaluation, out)
    return evaluation


def _predicted_classes(
    folder: Path, given: str | os.PathLike[str] | Mapping[str, int | str] | None, task: Task
) -> PredictedClasses | None:
    """Predicted classes by case, with their probabilities where those are known."""
    if isinstance(given, Mapping):
        if wrong := {name: label for name, label in given.items() if str(label) not in task.class_names}:
            raise DatasetError(f"predicted subtypes must be {in_words(task.class_names)}, got {wrong}")
        return PredictedClasses(subtypes={name: str(label) for name, label in given.items()}, probabilities={})
    if given is None and not (folder / RESULTS_FILE).is_file():
        return None
    table = folder / RESULTS_FILE if given is None else given
    read = read_subtype_results(table, class_names=task.class_names, file_ending=task.file_ending)
    if given is None and not read.probabilities:
        return replace(read, probabilities=_recorded_probabilities(folder / RECORDS_FILE, task.class_names))
    return read


def _recorded_probabilities(path: Path, class_names: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """Read the probabilities that `nnturbo predict` recorded; none from a file of another program."""
    try:
        records = json.loads(path.read_bytes())["cases"]
        answers = {record["name"]: record["classification"]["probabilities"] for record in records
                   if record.get("classification")}  # fmt: skip
        return {
            name: tuple(float(shares[label]) for label in class_names)
            for name, shares in answers.items()
            if set(shares) == set(class_names)
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _compare_all(
    predictions: Mapping[str, Path], references: References, guesses: PredictedClasses | None
) -> tuple[CaseEvaluation, ...]:
    cases, problems = [], []
    for name in sorted(references.masks):
        try:
            structures = _compare_masks(predictions.get(name), references.masks[name], references.task)
        except (VolumeError, DatasetError) as error:
            problems.append(f"{name}: {error}")
            continue
        case = CaseEvaluation(
            name=name,
            is_missing=name not in predictions,
            structures=structures,
            subtype=None if guesses is None else references.subtypes[name],
            predicted_subtype=None if guesses is None else guesses.subtypes.get(name),
            probabilities=None if guesses is None else guesses.probabilities.get(name),
            fold=references.folds.get(name),
        )
        cases.append(case)
    raise_problems("the evaluation", problems)
    return tuple(cases)


def _compare_masks(prediction: Path | None, reference: Path, task: Task) -> dict[str, StructureMetrics]:
    """Measure every structure of one case, where the truth is known."""
    truth, _ = read_mask(reference, task)
    found = replace(truth, array=np.zeros_like(truth.array)) if prediction is None else read_mask(prediction, task)[0]
    if difference := grid_difference(found, truth):
        raise DatasetError(f"prediction and reference lie on different grids: {difference}")
    known = np.ones(truth.array[0].shape, bool) if task.ignore_label is None else truth.array[0] != task.ignore_label
    measured = {}
    for name, values in task.structures.items():
        ours, theirs = (np.isin(mask.array[0], values) & known for mask in (found, truth))
        metrics = compare_structure(ours, theirs, truth.geometry.spacing)
        # A missing mask counts as 0, also if the true mask is empty.
        measured[name] = metrics if prediction else replace(metrics, dsc=0.0, nsd_1mm=0.0, nsd_2mm=0.0)
    return measured


def _summarise(
    cases: Sequence[CaseEvaluation], task: Task, predicted: set[str], has_classes: bool, resamples: int, seed: int
) -> Evaluation:
    """Compute means and intervals, and list missing and additional cases."""
    structures = list(task.structures)
    folds = sorted({case.fold for case in cases if case.fold is not None})
    return Evaluation(
        cases=tuple(cases),
        structures={name: _mean([case.structures[name] for case in cases]) for name in structures},
        dsc_intervals={
            name: bootstrap_mean([case.structures[name].dsc for case in cases], resamples=resamples, seed=seed)
            for name in structures
        },
        subtypes=_classification(cases, task.class_names, resamples, seed) if has_classes else None,
        folds=tuple(
            _evaluate_fold(fold, [case for case in cases if case.fold == fold], task, has_classes, resamples, seed)
            for fold in (folds if all(case.fold is not None for case in cases) else ())
        ),
        is_pancreas=task.is_pancreas,
        missing_masks=tuple(case.name for case in cases if case.is_missing),
        missing_subtypes=tuple(case.name for case in cases if has_classes and case.predicted_subtype is None),
        additional=tuple(sorted(predicted - {case.name for case in cases})),
        resamples=resamples,
        seed=seed,
    )


def _classification(
    cases: Sequence[CaseEvaluation], class_names: Sequence[str], resamples: int, seed: int
) -> SubtypeEvaluation:
    place = {name: index for index, name in enumerate(class_names)}
    truth = [place[case.subtype] for case in cases if case.subtype is not None]
    found = [None if case.predicted_subtype is None else place[case.predicted_subtype] for case in cases]
    shares = [case.probabilities for case in cases if case.probabilities is not None]
    is_known = shares and all((case.predicted_subtype is None) or case.probabilities for case in cases)
    answered = [label for label, case in zip(truth, cases, strict=True) if case.probabilities is not None]
    return SubtypeEvaluation(
        class_names=tuple(class_names),
        metrics=classification_metrics(truth, found, len(class_names)),
        macro_f1_interval=bootstrap_macro_f1(truth, found, resamples=resamples, seed=seed, classes=len(class_names)),
        probabilities=probability_metrics(answered, shares, resamples=resamples, seed=seed) if is_known else None,
    )


def _evaluate_fold(
    fold: int, cases: Sequence[CaseEvaluation], task: Task, has_classes: bool, resamples: int, seed: int
) -> FoldEvaluation:
    by_structure = {name: [case.structures[name].dsc for case in cases] for name in task.structures}
    subtypes = _classification(cases, task.class_names, resamples, seed) if has_classes else None
    return FoldEvaluation(
        fold=fold,
        cases=len(cases),
        dsc={name: float(np.mean(values)) for name, values in by_structure.items()},
        dsc_intervals={
            name: bootstrap_mean(values, resamples=resamples, seed=seed) for name, values in by_structure.items()
        },
        macro_f1=None if subtypes is None else subtypes.metrics.macro_f1,
        macro_f1_interval=None if subtypes is None else subtypes.macro_f1_interval,
    )


def _mean(metrics: Sequence[StructureMetrics]) -> StructureMetrics:
    names = [field.name for field in fields(StructureMetrics)]
    return StructureMetrics(**{name: float(np.mean([getattr(one, name) for one in metrics])) for name in names})
