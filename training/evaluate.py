"""Compare predictions with the truth: segmentation, volumes and subtype, case by case and on average.

The measures themselves are `metrics`; what people read is `evaluation_report`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np

from ..engine.errors import VolumeError
from .cases import (
    ENDING,
    IMAGE_ENDING,
    LABELS,
    case_name,
    grid_difference,
    read_mask,
    subtype_in_name,
)
from .evaluation_report import comparison_table, write_evaluation
from .metrics import (
    ClassificationMetrics,
    Interval,
    StructureMetrics,
    bootstrap_macro_f1,
    bootstrap_mean,
    classification_metrics,
    compare_structure,
)
from .tables import SUBTYPES, DatasetError, parse_subtype, raise_problems, read_subtype_results, read_table

__all__ = [
    "RESULTS_FILE",
    "CaseEvaluation",
    "Evaluation",
    "SubtypeEvaluation",
    "comparison_table",
    "evaluate",
    "write_evaluation",
]

logger = logging.getLogger(__name__)

RESULTS_FILE = "subtype_results.csv"


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseEvaluation:
    """One case.

    Attributes:
        name: Such as "quiz_0_041".
        is_missing: Whether there is no predicted mask; then every measure is 0.
        whole: Of pancreas and lesion together.
        lesion: Of the lesion.
        subtype: True class; `None` where classes are not evaluated.
        predicted_subtype: `None` where there is none.
    """

    name: str
    is_missing: bool
    whole: StructureMetrics
    lesion: StructureMetrics
    subtype: int | None
    predicted_subtype: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SubtypeEvaluation:
    """The classification over all cases, and the interval of its macro-F1."""

    metrics: ClassificationMetrics
    macro_f1_interval: Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Everything about one set of predictions.

    Attributes:
        cases: All cases of the reference, sorted by name.
        whole: Means over all cases.
        lesion: The same.
        whole_dsc_interval: Bootstrap 95 % interval of the mean.
        lesion_dsc_interval: The same.
        subtypes: `None` if no subtypes were predicted.
        missing_masks: Cases without a predicted mask; they count as 0.
        missing_subtypes: Cases without a predicted subtype, if any were predicted; they count as wrong.
        additional: Predictions that the reference does not have; they do not count.
        resamples: Of the bootstrap.
        seed: Of the bootstrap.
    """

    cases: tuple[CaseEvaluation, ...]
    whole: StructureMetrics
    lesion: StructureMetrics
    whole_dsc_interval: Interval
    lesion_dsc_interval: Interval
    subtypes: SubtypeEvaluation | None
    missing_masks: tuple[str, ...]
    missing_subtypes: tuple[str, ...]
    additional: tuple[str, ...]
    resamples: int
    seed: int


def evaluate(
    predictions_folder: str | os.PathLike[str],
    reference_folder: str | os.PathLike[str],
    *,
    subtypes: str | os.PathLike[str] | Mapping[str, int] | None = None,
    predicted_subtypes: str | os.PathLike[str] | Mapping[str, int] | None = None,
    split: str | None = None,
    out: str | os.PathLike[str] | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> Evaluation:
    """Evaluate predicted masks and subtypes.

    Args:
        predictions_folder: Masks `<name>.nii.gz`.
        reference_folder: True masks of the same names, at any depth; images (`_0000`) among them are passed over.
        subtypes: True classes by case, or a `classification_labels.csv`; by default from names `quiz_<subtype>_<nnn>`.
        predicted_subtypes: Predicted classes by case, or a csv with the header `Names,Subtype` and names that end with
            .nii.gz; by default `subtype_results.csv` in `predictions_folder`, if there is one.
        split: Evaluate only the cases of this split of the file `subtypes`, such as "validation".
        out: Folder to write JSON, CSV and figure to, see `write_evaluation`.
        resamples: Of the bootstrap over cases.
        seed: Of the bootstrap.

    Returns:
        The evaluation.

    Raises:
        ValueError: If `split` is given without a file of true subtypes, or `resamples` is below 1.
        DatasetError: If a folder, mask or table cannot be used, or the grids of two masks differ; all at once.
        OutputError: If `out` cannot be written.
    """
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    predictions, references = _masks(predictions_folder, deep=False), _masks(reference_folder, deep=True)
    references, truth = _select(references, subtypes, split)
    if not references:
        raise DatasetError(f"{reference_folder}: there must be masks named <case>{ENDING} to compare with, got none")
    default = Path(predictions_folder) / RESULTS_FILE
    results = default if predicted_subtypes is None and default.is_file() else predicted_subtypes
    guesses = _predicted_subtypes(results)
    if guesses is not None and (unknown := sorted(set(references) - set(truth))):
        raise DatasetError(f"subtypes must be known for all cases, got none of 0, 1, 2 for {', '.join(unknown)}")
    cases = _compare_all(predictions, references, truth, guesses)
    evaluation = _summarise(cases, {*predictions, *(guesses or ())}, guesses, resamples, seed)
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


def _masks(folder: str | os.PathLike[str], *, deep: bool) -> dict[str, Path]:
    """Masks of a folder by case."""
    folder = Path(folder)
    if not folder.is_dir():
        raise DatasetError(f"{folder}: there is no such folder with masks: check the path")
    masks: dict[str, Path] = {}
    for path in sorted(folder.rglob(f"*{ENDING}") if deep else folder.glob(f"*{ENDING}")):
        if path.name.startswith(".") or path.name.endswith(IMAGE_ENDING):
            continue
        name = case_name(path.name)
        if name in masks:
            raise DatasetError(f"{path}: a case must occur once, {masks[name]} has the same name")
        masks[name] = path
    return masks


def _select(
    references: dict[str, Path], subtypes: str | os.PathLike[str] | Mapping[str, int] | None, split: str | None
) -> tuple[dict[str, Path], dict[str, int]]:
    """The references of a split, and the true classes that are known of them."""
    if split is not None and not isinstance(subtypes, str | os.PathLike):
        raise ValueError(f"split={split!r} needs subtypes to be a file with the columns case, subtype and split")
    if subtypes is None:
        known = {name: subtype_in_name(name) for name in references}
    elif isinstance(subtypes, Mapping):
        known = dict(subtypes)
    else:
        rows = read_table(subtypes, ("case", "subtype", *(["split"] if split else [])))
        rows = [row for row in rows if split is None or row.cells["split"] == split]
        known = {row.cells["case"]: parse_subtype(row.cells["subtype"]) for row in rows}
        if split is not None:
            if absent := sorted(set(known) - set(references)):
                raise DatasetError(f"{subtypes}: cases of {split} must have a reference, none for {', '.join(absent)}")
            references = {name: path for name, path in references.items() if name in known}
    return references, {name: label for name, label in known.items() if label in SUBTYPES and name in references}


def _predicted_subtypes(results: str | os.PathLike[str] | Mapping[str, int] | None) -> dict[str, int] | None:
    """Predicted classes by case."""
    if results is None:
        return None
    if isinstance(results, Mapping):
        if wrong := {name: label for name, label in results.items() if label not in SUBTYPES}:
            raise DatasetError(f"predicted subtypes must be 0, 1 or 2, got {wrong}")
        return dict(results)
    return read_subtype_results(results)


def _compare_all(
    predictions: Mapping[str, Path],
    references: Mapping[str, Path],
    truth: Mapping[str, int],
    guesses: Mapping[str, int] | None,
) -> tuple[CaseEvaluation, ...]:
    cases, problems = [], []
    for name in sorted(references):
        try:
            whole, lesion = _compare_masks(predictions.get(name), references[name])
        except (VolumeError, DatasetError) as error:
            problems.append(f"{name}: {error}")
            continue
        case = CaseEvaluation(
            name=name,
            is_missing=name not in predictions,
            whole=whole,
            lesion=lesion,
            subtype=None if guesses is None else truth[name],
            predicted_subtype=None if guesses is None else guesses.get(name),
        )
        cases.append(case)
    raise_problems("the evaluation", problems)
    return tuple(cases)


def _compare_masks(prediction: Path | None, reference: Path) -> tuple[StructureMetrics, StructureMetrics]:
    """Measure the whole pancreas and the lesion of one case."""
    truth, _ = read_mask(reference)
    found = replace(truth, array=np.zeros_like(truth.array)) if prediction is None else read_mask(prediction)[0]
    if difference := grid_difference(found, truth):
        raise DatasetError(f"prediction and reference lie on different grids: {difference}")
    measured = []
    for least in (LABELS["pancreas"], LABELS["lesion"]):  # the lesion lies in the pancreas and has the highest label
        metrics = compare_structure(found.array[0] >= least, truth.array[0] >= least, truth.geometry.spacing)
        # A mask that is missing has found nothing, not even that there is nothing.
        measured.append(metrics if prediction else replace(metrics, dsc=0.0, nsd_1mm=0.0, nsd_2mm=0.0))
    return measured[0], measured[1]


def _summarise(
    cases: Sequence[CaseEvaluation], predicted: set[str], guesses: Mapping[str, int] | None, resamples: int, seed: int
) -> Evaluation:
    """Means, intervals, and what is missing or too much."""
    names = {case.name for case in cases}
    subtypes, missing_subtypes = None, ()
    if guesses is not None:
        truth = [case.subtype for case in cases if case.subtype is not None]
        found = [case.predicted_subtype for case in cases]
        missing_subtypes = tuple(case.name for case in cases if case.predicted_subtype is None)
        subtypes = SubtypeEvaluation(
            metrics=classification_metrics(truth, found),
            macro_f1_interval=bootstrap_macro_f1(truth, found, resamples=resamples, seed=seed),
        )
    wholes, lesions = [case.whole for case in cases], [case.lesion for case in cases]
    return Evaluation(
        cases=tuple(cases),
        whole=_mean(wholes),
        lesion=_mean(lesions),
        whole_dsc_interval=bootstrap_mean([metrics.dsc for metrics in wholes], resamples=resamples, seed=seed),
        lesion_dsc_interval=bootstrap_mean([metrics.dsc for metrics in lesions], resamples=resamples, seed=seed),
        subtypes=subtypes,
        missing_masks=tuple(case.name for case in cases if case.is_missing),
        missing_subtypes=missing_subtypes,
        additional=tuple(sorted(predicted - names)),
        resamples=resamples,
        seed=seed,
    )


def _mean(metrics: Sequence[StructureMetrics]) -> StructureMetrics:
    names = [field.name for field in fields(StructureMetrics)]
    return StructureMetrics(**{name: float(np.mean([getattr(one, name) for one in metrics])) for name in names})
