"""Chooses models, classifier and aggregation by held-out cases, and says where these are too few to tell."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax

from .evaluation.metrics import Interval, draw_resamples, interval_of, resampled_macro_f1
from .evidence import Evidence
from .held_out import ALIKE, FOREGROUND, HEAD, LDA

FEW_CASES = 10
"""A class with fewer held-out cases is named."""
SIMPLEST, BEST = "simplest", "best"
TAKE = (SIMPLEST, BEST)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One way to predict, and how it does.

    Attributes:
        models: Places in the list of models; the probabilities of several are averaged.
        classifier: "head" or "lda".
        aggregation: "foreground" or "mean".
        score: Mean of the next three, as in training.
        whole_dsc, focus_dsc, macro_f1: Over the held-out cases.
        score_interval, whole_dsc_interval, focus_dsc_interval, macro_f1_interval: Bootstrap 95 % intervals.
    """

    models: tuple[int, ...]
    classifier: str
    aggregation: str
    score: float
    whole_dsc: float
    focus_dsc: float
    macro_f1: float
    score_interval: Interval
    whole_dsc_interval: Interval
    focus_dsc_interval: Interval
    macro_f1_interval: Interval

    @property
    def cost(self) -> tuple[int, bool, bool]:
        """Order from simple to complex: fewer models, the network's own head, weighted tiles."""
        return len(self.models), self.classifier != HEAD, self.aggregation != FOREGROUND

    @property
    def name(self) -> str:
        """Name in tables: models counted from 1."""
        return f"{' + '.join(str(place + 1) for place in self.models)}, {self.classifier}, {self.aggregation}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """What is proposed.

    Attributes:
        chosen: The way to predict.
        candidates: All ways, the best score first.
        remarks: Where the evidence is too thin, in sentences.
    """

    chosen: Candidate
    candidates: tuple[Candidate, ...]
    remarks: tuple[str, ...]


def propose(evidence: Evidence, *, take: str = SIMPLEST, resamples: int = 2000, seed: int = 0) -> Proposal:
    """Choose by the mean of both DSC and macro-F1.

    Args:
        evidence: What held-out cases show.
        take: "best" takes the best score. "simplest" takes the simplest of the ways that are not clearly worse: those
            whose difference from the best has a 95 % interval (paired bootstrap over cases) that reaches 0.
        resamples: Number of resamples of the bootstrap.
        seed: Seed of the bootstrap.
    """
    if take not in TAKE:
        raise ValueError(f"take must be one of {', '.join(TAKE)}, got {take!r}")
    draws = draw_resamples(len(evidence.truth), resamples, seed)
    scored = [
        _score(evidence, subset, kind, how, draws) for subset in evidence.dsc for kind, how in _ways(evidence, subset)
    ]
    scored.sort(key=lambda pair: (-pair[0].score, pair[0].cost))
    best, of_best = scored[0]
    chosen, of_chosen = best, of_best
    if take == SIMPLEST:
        similar = [
            (candidate, resampled)
            for candidate, resampled in scored
            if candidate.cost <= best.cost and interval_of(of_best - resampled).low <= 0
        ]
        chosen, of_chosen = min(similar, key=lambda pair: (pair[0].cost, -pair[0].score))
    remarks = [*_rare_classes(evidence), *_differences(scored, chosen, of_chosen, len(evidence.truth))]
    if len(scored) > 1:
        remarks.append(_optimism(scored))
    return Proposal(chosen=chosen, candidates=tuple(candidate for candidate, _ in scored), remarks=tuple(remarks))


def _ways(evidence: Evidence, models: Sequence[int]) -> list[tuple[str, str]]:
    """Classifiers and aggregations that all of some models have."""
    return [
        (kind, how)
        for kind in (HEAD, LDA)
        for how in (FOREGROUND, ALIKE)
        if all((model, kind, how) in evidence.logits for model in models)
    ]


def _score(
    evidence: Evidence, models: tuple[int, ...], kind: str, how: str, draws: NDArray[np.float64]
) -> tuple[Candidate, NDArray[np.float64]]:
    """Measure one way to predict; also its score in each resample."""
    shares = np.mean([softmax(evidence.logits[model, kind, how], axis=1) for model in models], 0)
    truth, predicted = evidence.truth.tolist(), shares.argmax(1).tolist()
    once = np.ones((1, len(truth)))

    def measures(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        overlaps = weights @ evidence.dsc[models] / len(truth)
        f1 = resampled_macro_f1(truth, predicted, weights, len(evidence.class_names))
        return np.column_stack([overlaps, f1])

    (whole, focus, f1), resampled = measures(once)[0].tolist(), measures(draws)
    scores = resampled.mean(1)
    intervals = [interval_of(column) for column in resampled.T]
    candidate = Candidate(
        models=models,
        classifier=kind,
        aggregation=how,
        score=(whole + focus + f1) / 3,
        whole_dsc=whole,
        focus_dsc=focus,
        macro_f1=f1,
        score_interval=interval_of(scores),
        whole_dsc_interval=intervals[0],
        focus_dsc_interval=intervals[1],
        macro_f1_interval=intervals[2],
    )
    return candidate, scores


Scored = tuple[Candidate, NDArray[np.float64]]


def _rare_classes(evidence: Evidence) -> list[str]:
    counts = np.bincount(evidence.truth, minlength=len(evidence.class_names))
    rare = [f"{name} ({count})" for name, count in zip(evidence.class_names, counts, strict=True) if count < FEW_CASES]
    return (
        [f"Fewer than {FEW_CASES} held-out cases show class {', '.join(rare)}: its F1 may be anything."] if rare else []
    )


def _differences(scored: Sequence[Scored], chosen: Candidate, of_chosen: NDArray[np.float64], cases: int) -> list[str]:
    """Name the best of each other kind of choice that the cases do not tell from the chosen one."""
    kinds: dict[str, Callable[[Candidate], bool]] = {
        "The best score": lambda other: True,
        "Another model": lambda other: len(other.models) == 1 and other.models != chosen.models,
        "An ensemble": lambda other: len(other.models) > 1 and other.models != chosen.models,
        "The other classifier": lambda other: other.models == chosen.models and other.classifier != chosen.classifier,
        "The other aggregation": lambda other: (
            (other.models, other.classifier) == (chosen.models, chosen.classifier)
            and other.aggregation != chosen.aggregation
        ),
    }
    said: dict[str, str] = {}
    for what, belongs in kinds.items():
        other, resampled = next(((c, r) for c, r in scored if belongs(c)), (chosen, of_chosen))
        interval = interval_of(resampled - of_chosen)
        if other != chosen and interval.low <= 0 <= interval.high:
            said.setdefault(
                other.name,
                f"{what} ({other.name}) differs from the choice by {other.score - chosen.score:+.3f} "
                f"({interval.low:+.3f} to {interval.high:+.3f}): {cases} cases are too few to tell them apart.",
            )
    return list(said.values())


def _optimism(scored: Sequence[Scored]) -> str:
    """Say by how much the best of many looks better than it is (Harrell's bootstrap estimate)."""
    resampled = np.array([values for _, values in scored])
    winners = resampled.argmax(0)
    scores = np.array([candidate.score for candidate, _ in scored])
    flattery = float((resampled.max(0) - scores[winners]).mean())
    return (
        f"The best of {len(scored)} ways was found on the cases that measure it: its score {scores[0]:.3f} is about "
        f"{max(flattery, 0.0):.3f} too high."
    )


def candidate_table(proposal: Proposal, models: Sequence[str | os.PathLike[str]], most: int = 12) -> str:
    """Markdown table of the best ways, the chosen one and each model alone; then the remarks."""
    lines = [
        *(f"model {place}: {model}" for place, model in enumerate(models, start=1)),
        "",
        "| models, classifier, aggregation | score | whole DSC | focus DSC | macro-F1 | choice |",
        "|---|---|---|---|---|---|",
    ]
    shown = [*proposal.candidates[:most], *(c for c in proposal.candidates[most:] if c == proposal.chosen)]
    for candidate in shown:
        cells = [
            f"{value:.3f} ({interval.low:.3f} to {interval.high:.3f})"
            for value, interval in (
                (candidate.score, candidate.score_interval),
                (candidate.whole_dsc, candidate.whole_dsc_interval),
                (candidate.focus_dsc, candidate.focus_dsc_interval),
                (candidate.macro_f1, candidate.macro_f1_interval),
            )
        ]
        cells.append("chosen" if candidate == proposal.chosen else "-")
        lines.append(f"| {candidate.name} | {' | '.join(cells)} |")
    if left := len(proposal.candidates) - len(shown):
        lines += ["", f"{left} more in choice.json"]
    return "\n".join([*lines, "", *proposal.remarks]) + "\n"
