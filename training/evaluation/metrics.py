"""Measures of a segmentation and of a classification, and their bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

TOLERANCES_MM = (1.0, 2.0)
_ROUNDING_MM = 1e-6  # a distance of three steps of 0.7 mm is 2.0999999999999996


@dataclass(frozen=True, slots=True, kw_only=True)
class StructureMetrics:
    """Agreement of one structure with the truth, in one case or on average.

    Attributes:
        dsc: Dice similarity coefficient, 0 to 1.
        nsd_1mm: Normalised surface Dice at 1 mm, 0 to 1.
        nsd_2mm: The same at 2 mm.
        reference_ml: Volume of the reference.
        predicted_ml: Volume of the prediction; 0 where it is missing.
    """

    dsc: float
    nsd_1mm: float
    nsd_2mm: float
    reference_ml: float
    predicted_ml: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassificationMetrics:
    """Quality of a classification.

    Attributes:
        macro_f1: Mean of the F1 of the classes that occur in truth or prediction.
        f1: By class; `None` for a class that occurs in neither.
        balanced_accuracy: Mean recall of the classes that occur in the truth.
        confusion: Counts; rows are the true classes, columns the predicted ones, and the last column cases without a
            prediction.
    """

    macro_f1: float
    f1: tuple[float | None, ...]
    balanced_accuracy: float
    confusion: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A 95 % interval."""

    low: float
    high: float


def dice(prediction: NDArray[np.bool_], reference: NDArray[np.bool_]) -> float:
    """Dice similarity coefficient 2 |P and R| / (|P| + |R|); 1 if both are empty.

    Args:
        prediction: Any shape.
        reference: The same shape.
    """
    both = np.count_nonzero(prediction) + np.count_nonzero(reference)
    return 2 * np.count_nonzero(prediction & reference) / both if both else 1.0


def surface(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Voxels of a mask with a face to the outside; voxels beyond the array are outside."""
    return mask & np.logical_not(ndimage.binary_erosion(mask))


def normalised_surface_dice(
    prediction: NDArray[np.bool_],
    reference: NDArray[np.bool_],
    spacing: Sequence[float],
    tolerances_mm: Sequence[float] = TOLERANCES_MM,
) -> tuple[float, ...]:
    """Share of both surfaces that lies within a tolerance of the other.

    Args:
        prediction: (Z, Y, X).
        reference: The same shape.
        spacing: mm, (z, y, x).
        tolerances_mm: Tolerances.

    Returns:
        One value, 0 to 1, for each tolerance: 1 if both masks are empty, 0 if one is.

    Note:
        NSD = (|{p in S_P: d(p, S_R) <= t}| + |{r in S_R: d(r, S_P) <= t}|) / (|S_P| + |S_R|), Nikolov et al. 2018
        (arXiv:1809.04430), with a surface of voxel centres, each counted once. Their code weights surface elements
        by their area, so values differ a little; more so for anisotropic voxels.
    """
    if not prediction.any() or not reference.any():
        return tuple(float(prediction.any() == reference.any()) for _ in tolerances_mm)
    box = ndimage.find_objects((prediction | reference).astype(np.uint8))[0]
    ours, theirs = surface(prediction[box]), surface(reference[box])
    distances_mm = np.concatenate([_distance_mm(theirs, spacing)[ours], _distance_mm(ours, spacing)[theirs]])
    return tuple(float(np.mean(distances_mm <= tolerance + _ROUNDING_MM)) for tolerance in tolerances_mm)


def _distance_mm(mask: NDArray[np.bool_], spacing: Sequence[float]) -> NDArray[np.float64]:
    """Distance of every voxel to the nearest voxel of a mask."""
    return np.asarray(ndimage.distance_transform_edt(~mask, sampling=tuple(spacing)))


def compare_structure(
    prediction: NDArray[np.bool_], reference: NDArray[np.bool_], spacing: Sequence[float]
) -> StructureMetrics:
    """Measure one structure of one case.

    Args:
        prediction: (Z, Y, X).
        reference: The same shape.
        spacing: mm, (z, y, x).
    """
    voxel_ml = float(np.prod(spacing)) / 1000
    nsd_1mm, nsd_2mm = normalised_surface_dice(prediction, reference, spacing)
    return StructureMetrics(
        dsc=dice(prediction, reference),
        nsd_1mm=nsd_1mm,
        nsd_2mm=nsd_2mm,
        reference_ml=np.count_nonzero(reference) * voxel_ml,
        predicted_ml=np.count_nonzero(prediction) * voxel_ml,
    )


def classification_metrics(
    truth: Sequence[int], predicted: Sequence[int | None], classes: int = 3
) -> ClassificationMetrics:
    """Measure a classification; a case without a prediction is wrong.

    Args:
        truth: Class of each case, 0 to `classes` - 1; at least one case.
        predicted: Predicted class of each case, or `None`.
        classes: Number of classes.
    """
    confusion = np.zeros((classes, classes + 1), dtype=int)
    for true, guess in zip(truth, predicted, strict=True):
        confusion[true, classes if guess is None else guess] += 1
    counted = confusion[None].astype(float)
    f1 = _f1(counted)[0]
    cases = confusion.sum(axis=1)
    occurs = cases > 0
    return ClassificationMetrics(
        macro_f1=float(np.nanmean(f1)),
        f1=tuple(None if np.isnan(value) else float(value) for value in f1),
        balanced_accuracy=float(np.mean(np.diagonal(confusion)[occurs] / cases[occurs])),
        confusion=tuple(tuple(int(count) for count in row) for row in confusion),
    )


def _f1(confusion: NDArray[np.float64]) -> NDArray[np.float64]:
    """F1 = 2 TP / (2 TP + FP + FN) by class, NaN for classes that do not occur.

    Args:
        confusion: (N, K, K + 1) counts.

    Returns:
        (N, K).
    """
    classes = confusion.shape[1]
    hits = np.diagonal(confusion, axis1=1, axis2=2)
    involved = confusion.sum(axis=2) + confusion.sum(axis=1)[:, :classes]  # 2 TP + FP + FN
    return np.divide(2 * hits, involved, out=np.full_like(involved, np.nan), where=involved > 0)


def bootstrap_mean(values: Sequence[float], *, resamples: int, seed: int) -> Interval:
    """Percentile bootstrap interval of a mean over cases.

    Args:
        values: One value per case; at least one.
        resamples: Number of sets of as many cases, drawn with replacement.
        seed: Seed of the draws; the same number of cases gives the same draws.
    """
    return interval_of(draw_resamples(len(values), resamples, seed) @ np.asarray(values, dtype=float) / len(values))


def bootstrap_macro_f1(
    truth: Sequence[int], predicted: Sequence[int | None], *, resamples: int, seed: int, classes: int = 3
) -> Interval:
    """Percentile bootstrap interval of the macro-F1 over cases; arguments as those of the functions above."""
    return interval_of(resampled_macro_f1(truth, predicted, draw_resamples(len(truth), resamples, seed), classes))


def resampled_macro_f1(
    truth: Sequence[int], predicted: Sequence[int | None], draws: NDArray[np.float64], classes: int
) -> NDArray[np.float64]:
    """Macro-F1 in each resample of `draw_resamples`, (resamples,); arguments as those of the functions above."""
    one_hot = np.zeros((len(truth), classes, classes + 1))
    for case, (true, guess) in enumerate(zip(truth, predicted, strict=True)):
        one_hot[case, true, classes if guess is None else guess] = 1
    return np.nanmean(_f1(np.tensordot(draws, one_hot, axes=1)), axis=1)


def draw_resamples(cases: int, resamples: int, seed: int) -> NDArray[np.float64]:
    """Draw how many times each resample of a bootstrap holds each case, (resamples, cases)."""
    counts = np.random.default_rng(seed).multinomial(cases, np.full(cases, 1 / cases), size=resamples)
    return counts.astype(float)


def interval_of(statistics: NDArray[np.float64]) -> Interval:
    """Take the middle 95 % of a statistic over resamples; NaN, where it is not defined, does not count."""
    low, high = np.nanpercentile(statistics, (2.5, 97.5))
    return Interval(low=float(low), high=float(high))
