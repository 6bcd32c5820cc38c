"""Compare predictions with the truth: segmentation, volumes and subtype, case by case and on average.

`metrics` has the measures, `results` their dataclasses, and `evaluation_report` writes tables and figures.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path

import numpy as np

from ...engine.errors import VolumeError
from ..data.cases import LABELS, grid_difference, read_mask
from ..data.references import RESULTS_FILE, References, find_references, masks_in, missing
from ..data.tables import SUBTYPES, DatasetError, raise_problems, read_subtype_results
from .evaluation_report import comparison_table, write_evaluation
from .metrics import StructureMetrics, bootstrap_macro_f1, bootstrap_mean, classification_metrics, compare_structure
from .results import CaseEvaluation, Evaluation, SubtypeEvaluation

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


# Its parameters are the flags of `nnturbo evaluate`.
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
        reference_folder: True masks of the same names, in any layout that `references.find_references` knows.
        subtypes: True classes by case, or a table of them; by default the one that `reference_folder` holds, else names
            `quiz_<subtype>_<nnn>`.
        predicted_subtypes: Predicted classes by case, or a csv with the header `Names,Subtype` and names that end with
            .nii.gz; by default `subtype_results.csv` in `predictions_folder`, if there is one.
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
    predictions = masks_in(predictions_folder)
    references = find_references(reference_folder, subtypes=subtypes, split=split)
    default = Path(predictions_folder) / RESULTS_FILE
    results = default if predicted_subtypes is None and default.is_file() else predicted_subtypes
    guesses = _predicted_subtypes(results)
    if guesses is not None and (unknown := missing(references.masks, references.subtypes)):
        raise DatasetError(f"subtypes must be known for all cases, got none of 0, 1, 2 for {', '.join(unknown)}")
    cases = _compare_all(predictions, references, guesses)
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
    predictions: Mapping[str, Path], references: References, guesses: Mapping[str, int] | None
) -> tuple[CaseEvaluation, ...]:
    cases, problems = [], []
    for name in sorted(references.masks):
        try:
            whole, lesion = _compare_masks(predictions.get(name), references.masks[name])
        except (VolumeError, DatasetError) as error:
            problems.append(f"{name}: {error}")
            continue
        case = CaseEvaluation(
            name=name,
            is_missing=name not in predictions,
            whole=whole,
            lesion=lesion,
            subtype=None if guesses is None else references.subtypes[name],
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
        # A missing mask counts as 0, also if the true mask is empty.
        measured.append(metrics if prediction else replace(metrics, dsc=0.0, nsd_1mm=0.0, nsd_2mm=0.0))
    return measured[0], measured[1]


def _summarise(
    cases: Sequence[CaseEvaluation], predicted: set[str], guesses: Mapping[str, int] | None, resamples: int, seed: int
) -> Evaluation:
    """Compute means and intervals, and list missing and additional cases."""
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
