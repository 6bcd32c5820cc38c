"""Results of an evaluation: by case, of the subtypes, and over all cases."""

from __future__ import annotations

from dataclasses import dataclass

from .metrics import ClassificationMetrics, Interval, StructureMetrics


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
        resamples: Number of resamples of the bootstrap.
        seed: Seed of the bootstrap.
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
