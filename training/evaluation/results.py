"""Results of an evaluation: by case, by fold, of the classes, and over all cases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .calibration import ProbabilityMetrics
from .metrics import ClassificationMetrics, Interval, StructureMetrics


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseEvaluation:
    """One case.

    Attributes:
        name: Such as "quiz_0_041".
        is_missing: Whether there is no predicted mask; then every measure is 0.
        structures: Of all foreground together ("whole"), and of every label or region.
        subtype: True class; `None` where classes are not evaluated.
        predicted_subtype: `None` where there is none.
        probabilities: Of all classes; `None` where they are not known.
        fold: Fold of the cross-validation in which the case is held out; `None` where there is none.
    """

    name: str
    is_missing: bool
    structures: Mapping[str, StructureMetrics]
    subtype: str | None
    predicted_subtype: str | None
    probabilities: tuple[float, ...] | None = None
    fold: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SubtypeEvaluation:
    """The classification over all cases.

    Attributes:
        class_names: In the order of all that is listed by class.
        metrics: F1, confusion, and more.
        macro_f1_interval: Bootstrap 95 % interval.
        probabilities: `None` where not every predicted class has its probabilities.
    """

    class_names: tuple[str, ...]
    metrics: ClassificationMetrics
    macro_f1_interval: Interval
    probabilities: ProbabilityMetrics | None


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldEvaluation:
    """One fold of a cross-validation.

    Attributes:
        fold: Number of the fold.
        cases: Number of its cases.
        dsc: Mean DSC of each structure.
        dsc_intervals: Bootstrap 95 % intervals.
        macro_f1: `None` where classes are not evaluated.
        macro_f1_interval: Bootstrap 95 % interval.
    """

    fold: int
    cases: int
    dsc: Mapping[str, float]
    dsc_intervals: Mapping[str, Interval]
    macro_f1: float | None
    macro_f1_interval: Interval | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Everything about one set of predictions.

    Attributes:
        cases: All cases of the reference, sorted by name.
        structures: Means over all cases, of all foreground together ("whole") and of every label or region.
        dsc_intervals: Bootstrap 95 % intervals of the mean DSC.
        subtypes: `None` if no classes were predicted.
        folds: The folds of a cross-validation, if every case belongs to one; otherwise empty.
        is_pancreas: Whether the data are of the pancreas task, which has targets.
        missing_masks: Cases without a predicted mask; they count as 0.
        missing_subtypes: Cases without a predicted class, if any were predicted; they count as wrong.
        additional: Predictions that the reference does not have; they do not count.
        resamples: Number of resamples of the bootstrap.
        seed: Seed of the bootstrap.
    """

    cases: tuple[CaseEvaluation, ...]
    structures: Mapping[str, StructureMetrics]
    dsc_intervals: Mapping[str, Interval]
    subtypes: SubtypeEvaluation | None
    folds: tuple[FoldEvaluation, ...]
    is_pancreas: bool
    missing_masks: tuple[str, ...]
    missing_subtypes: tuple[str, ...]
    additional: tuple[str, ...]
    resamples: int
    seed: int
