"""Compares ways to answer for the class by what one network gives for cases that no training saw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from nnturbo.training.evaluation.metrics import (
    classification_metrics,
    draw_resamples,
    interval_of,
    resampled_macro_f1,
)
from nnturbo.training.pooled_classifier import fit_discriminant
from numpy.typing import NDArray
from scipy.special import softmax

RESAMPLES, PARTS = 2000, 5
Floats = NDArray[np.float64]


class Comparison:
    """Measures ways to answer on the same cases.

    Args:
        truth: Their classes.
        classes: Number of classes.
    """

    def __init__(self, truth: Sequence[int], classes: int) -> None:
        self._truth, self._classes = list(truth), classes
        self._draws = draw_resamples(len(truth), RESAMPLES, 0)
        self._resampled: dict[str, Floats] = {}
        self.rows: list[dict[str, Any]] = []

    def add(self, name: str, logits: Floats) -> None:
        """Measure one way by its class logits (N, S)."""
        predicted = logits.argmax(1).tolist()
        metrics = classification_metrics(self._truth, predicted, self._classes)
        self._resampled[name] = resampled_macro_f1(self._truth, predicted, self._draws, self._classes)
        interval = interval_of(self._resampled[name])
        self.rows.append({
            "way": name,
            "macro_f1": metrics.macro_f1,
            "interval": [interval.low, interval.high],
            "f1": metrics.f1,
            "confusion": metrics.confusion,
        })  # fmt: skip

    def compare_with(self, name: str) -> None:
        """Add to each row its difference from another, and the interval of it over the same resamples."""
        value = next(row["macro_f1"] for row in self.rows if row["way"] == name)
        for row in self.rows:
            interval = interval_of(self._resampled[row["way"]] - self._resampled[name])
            difference = {"value": row["macro_f1"] - value, "low": interval.low, "high": interval.high}
            row["difference"] = {"from": name, **difference}


def fitted_on_the_others(features: Floats, labels: NDArray[np.integer[Any]], *, cases: int | None = None) -> Floats:
    """Fit discriminant analyses without every fifth case in turn, and give the class logits of what was left out.

    Args:
        features: (N, F).
        labels: (N,).
        cases: On how many of the others each is fitted, spread evenly; by default on all.
    """
    classes, part_of = int(labels.max()) + 1, np.arange(len(labels)) % PARTS
    logits = np.zeros((len(labels), classes))
    for part in range(PARTS):
        left, others = part_of == part, np.flatnonzero(part_of != part)
        places = others[np.linspace(0, len(others), cases or len(others), endpoint=False).astype(int)]
        weight, bias = fit_discriminant(features[places], labels[places], classes)
        logits[left] = features[left] @ weight.numpy().T + bias.numpy()
    return logits


def compare(
    head: Floats,
    fitted: Floats,
    by_stage: Mapping[int, Floats],
    around: Mapping[str, Floats],
    labels: NDArray[np.integer[Any]],
) -> list[Any]:
    """Measure every way to answer.

    Args:
        head: (N, S) class logits of the network's own head.
        fitted: (N, S) of the discriminant analysis in its checkpoint.
        by_stage: Pooled features of each stage of the encoder, (N, F).
        around: Pooled features (N, F) of stages 0 to 3 by way, from tiles around the lesion.
        labels: (N,) true classes.
    """
    comparison, classes = Comparison(labels.tolist(), head.shape[1]), head.shape[1]

    def of(*stages: int) -> Floats:
        return np.concatenate([by_stage[stage] for stage in stages], 1)

    comparison.add("head, as trained", head)
    comparison.add("lda, fitted on the training cases", fitted)
    comparison.add("mean of the probabilities of both", softmax(head, 1) + softmax(fitted, 1))
    unseen = len(labels) * (PARTS - 1) // PARTS
    for count in (unseen, unseen // 2, unseen // 4):
        comparison.add(
            f"lda, fitted on {count} unseen cases", fitted_on_the_others(of(0, 1, 2, 3), labels, cases=count)
        )
    for stages in ((0,), (1,), (2,), (3,), (4,), (0, 1), (0, 1, 2), (2, 3, 4), (0, 1, 2, 3, 4)):
        name = f"the same, {unseen} cases, stage{'s' * (len(stages) > 1)} {', '.join(map(str, stages))}"
        comparison.add(name, fitted_on_the_others(of(*stages), labels))
    both = np.concatenate([of(0, 1, 2, 3), head], 1)
    comparison.add(f"the same, {unseen} cases, and the head's logits as features", fitted_on_the_others(both, labels))
    for way, features in around.items():
        comparison.add(f"the same, {unseen} cases, {way}", fitted_on_the_others(features, labels))
    shuffled = np.random.default_rng(0).permutation(labels)
    comparison.add("lda, fitted on shuffled classes", fitted_on_the_others(of(0, 1, 2, 3), shuffled))
    comparison.add("random answers", np.eye(classes)[np.random.default_rng(1).integers(classes, size=len(labels))])
    comparison.compare_with("lda, fitted on the training cases")
    return comparison.rows
