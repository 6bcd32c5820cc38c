"""How good class probabilities are: areas under curves, Brier score, calibration; and the temperature to mend them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from .metrics import Interval, draw_resamples, interval_of

logger = logging.getLogger(__name__)

BINS = 10
WIDEST_TEMPERATURE = 100.0
"""Temperatures from its inverse to it are tried."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReliabilityBin:
    """Cases whose confidence, the greatest class probability, lies between two bounds.

    Attributes:
        low, high: Bounds; the lower one belongs to the bin below, but for the first bin.
        cases: Number of cases.
        confidence: Their mean confidence; `None` without cases.
        accuracy: Share of them whose most probable class is the true one; `None` without cases.
    """

    low: float
    high: float
    cases: int
    confidence: float | None
    accuracy: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbabilityMetrics:
    """Quality of class probabilities over cases that have them.

    Attributes:
        cases: Number of cases.
        auc: Area under the receiver operating characteristic by class, against all others; `None` for a class that no
            case or every case has.
        macro_auc: Mean of those that are known; `None` if none is.
        macro_auc_interval: Bootstrap 95 % interval.
        brier: Mean over cases of the sum over classes of (probability - truth) squared, 0 to 2.
        brier_interval: The same of it.
        calibration_error: Expected calibration error, 0 to 1.
        calibration_error_interval: The same of it.
        reliability: The bins of the calibration error.
    """

    cases: int
    auc: tuple[float | None, ...]
    macro_auc: float | None
    macro_auc_interval: Interval | None
    brier: float
    brier_interval: Interval
    calibration_error: float
    calibration_error_interval: Interval
    reliability: tuple[ReliabilityBin, ...]


def probability_metrics(
    truth: Sequence[int], probabilities: Sequence[Sequence[float]], *, resamples: int, seed: int
) -> ProbabilityMetrics:
    """Measure class probabilities.

    Args:
        truth: Class of each case, from 0; at least one case.
        probabilities: (N, S), each row adds up to 1.
        resamples: Number of resamples of the bootstrap over cases.
        seed: Seed of the bootstrap.
    """
    labels, shares = np.asarray(truth), np.asarray(probabilities, dtype=float)
    once, drawn = np.ones((1, len(labels))), draw_resamples(len(labels), resamples, seed)
    auc = one_against_rest(labels, shares, once)[0]
    is_known = not np.isnan(auc).all()
    briers = ((shares - np.eye(shares.shape[1])[labels]) ** 2).sum(1)
    return ProbabilityMetrics(
        cases=len(labels),
        auc=tuple(None if np.isnan(value) else float(value) for value in auc),
        macro_auc=float(np.nanmean(auc)) if is_known else None,
        macro_auc_interval=interval_of(_mean_of_known(one_against_rest(labels, shares, drawn))) if is_known else None,
        brier=float(briers.mean()),
        brier_interval=interval_of(drawn @ briers / len(briers)),
        calibration_error=float(calibration_error(labels, shares, once)[0]),
        calibration_error_interval=interval_of(calibration_error(labels, shares, drawn)),
        reliability=reliability(labels, shares),
    )


def _mean_of_known(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over the last axis of what is not NaN, NaN where nothing is known."""
    known = ~np.isnan(values)
    total, count = np.where(known, values, 0).sum(-1), known.sum(-1)
    return np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0)


def one_against_rest(
    truth: NDArray[np.integer], probabilities: NDArray[np.float64], weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Area under the receiver operating characteristic of each class against all others.

    Args:
        truth: (N,) classes.
        probabilities: (N, S).
        weights: (R, N), how many times each case counts in each of R sets.

    Returns:
        (R, S), NaN where a set has no case of the class, or no other.

    Note:
        The share of pairs of a case of the class and another one in which the first has the greater probability; equal
        ones count half (Mann-Whitney).
    """
    areas = np.full((len(weights), probabilities.shape[1]), np.nan)
    for label in range(probabilities.shape[1]):
        inside, score = truth == label, probabilities[:, label]
        difference = score[inside][:, None] - score[~inside]
        wins = (difference > 0) + 0.5 * (difference == 0)
        ours, others = weights[:, inside], weights[:, ~inside]
        pairs = ours.sum(1) * others.sum(1)
        np.divide(((ours @ wins) * others).sum(1), pairs, out=areas[:, label], where=pairs > 0)
    return areas


def calibration_error(
    truth: NDArray[np.integer], probabilities: NDArray[np.float64], weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Expected calibration error, in each of R sets as for `one_against_rest`; (R,).

    Note:
        sum over ten bins of |correct - confidence| / N, Guo et al. 2017 (arXiv:1706.04599), with the sums over the
        cases of a bin.
    """
    bins, confidence, correct = _binned(truth, probabilities)
    by_bin = np.eye(BINS)[bins] * (correct - confidence)[:, None]
    return np.abs(weights @ by_bin).sum(1) / weights.sum(1)


def reliability(truth: NDArray[np.integer], probabilities: NDArray[np.float64]) -> tuple[ReliabilityBin, ...]:
    """Compare confidence and accuracy, bin by bin; arguments as those of `one_against_rest`."""
    bins, confidence, correct = _binned(truth, probabilities)
    rows = []
    for index in range(BINS):
        inside = bins == index
        rows.append(
            ReliabilityBin(
                low=index / BINS,
                high=(index + 1) / BINS,
                cases=int(inside.sum()),
                confidence=float(confidence[inside].mean()) if inside.any() else None,
                accuracy=float(correct[inside].mean()) if inside.any() else None,
            )
        )
    return tuple(rows)


def _binned(
    truth: NDArray[np.integer], probabilities: NDArray[np.float64]
) -> tuple[NDArray[np.integer], NDArray[np.float64], NDArray[np.bool_]]:
    """The bin of each case, its confidence, and whether its most probable class is the true one."""
    confidence = probabilities.max(1)
    bins = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    return bins, confidence, probabilities.argmax(1) == truth


def fit_temperature(logits: NDArray[np.float64], truth: NDArray[np.integer]) -> float:
    """Find the temperature by which class logits are divided so that the probabilities suit the truth best.

    Args:
        logits: (N, S), of cases that no training saw.
        truth: (N,) classes.

    Returns:
        The temperature of the least cross-entropy, 0.01 to 100. It changes no case's most probable class. It is 1 where
        every case is answered right: the cross-entropy then falls without end, and would make all answers certain.

    Raises:
        ValueError: Where the logits are not finite, or there are no cases.

    Note:
        Guo et al. 2017 (arXiv:1706.04599). The cross-entropy is convex in the inverse temperature.
    """
    if not len(truth) or not np.isfinite(logits).all():
        raise ValueError(f"a temperature needs finite logits of at least one case, got {len(truth)} cases")
    places = np.arange(len(truth))
    if (logits[places, truth] == logits.max(1)).all():
        logger.warning(
            "all %d cases are answered right, so that no temperature follows: probabilities stay", len(truth)
        )
        return 1.0

    def cross_entropy(log_inverse: float) -> float:
        return float(-log_softmax(logits * np.exp(log_inverse), axis=1)[places, truth].mean())

    bound = np.log(WIDEST_TEMPERATURE)
    found = minimize_scalar(cross_entropy, bounds=(-bound, bound), method="bounded", options={"xatol": 1e-6})
    return float(np.exp(-found.x))
