"""Draw an evaluation: DSC of all cases, confusion matrix, and how well probabilities are calibrated."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ...engine.files import written_atomically
from .calibration import ProbabilityMetrics
from .results import Evaluation, SubtypeEvaluation

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_evaluation(evaluation: Evaluation, targets: Mapping[str, float], path: Path) -> None:
    """Draw what was evaluated, each in a panel.

    Args:
        evaluation: Result of `evaluate`.
        targets: Target of the DSC by structure; none for those without.
        path: File of the picture, PNG.
    """
    from matplotlib.figure import Figure

    subtypes = evaluation.subtypes
    probabilities = None if subtypes is None else subtypes.probabilities
    count = 1 + (subtypes is not None) + (probabilities is not None)
    # Without pyplot, no display and no global state.
    figure = Figure(figsize=(4.5 * max(2, count), 4.2), layout="constrained")
    panels = figure.subplots(1, count, squeeze=False)[0]
    _draw_dsc(panels[0], evaluation, targets)
    if subtypes is not None:
        _draw_confusion(panels[1], subtypes)
    if probabilities is not None:
        _draw_reliability(panels[2], probabilities)
    with written_atomically(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _draw_dsc(axes: Axes, evaluation: Evaluation, targets: Mapping[str, float]) -> None:
    for position, name in enumerate(evaluation.structures):
        values = sorted(case.structures[name].dsc for case in evaluation.cases)
        # Spread sideways by rank, so that cases of the same value stay apart.
        offsets = [0.3 * (rank / max(1, len(values) - 1) - 0.5) for rank in range(len(values))]
        axes.scatter([position + offset for offset in offsets], values, s=14, alpha=0.7)
        if name in targets:
            axes.hlines(targets[name], position - 0.35, position + 0.35, colors="black", linestyles="dashed")
        axes.hlines(sum(values) / len(values), position - 0.25, position + 0.25, colors="black")
    axes.set_xticks(range(len(evaluation.structures)), list(evaluation.structures))
    axes.set_ylim(-0.03, 1.03)
    axes.set_ylabel("DSC of each case")
    axes.set_title("line: mean, dashed: target" if targets else "line: mean")


def _draw_confusion(axes: Axes, subtypes: SubtypeEvaluation) -> None:
    confusion = subtypes.metrics.confusion
    shown = confusion if any(row[-1] for row in confusion) else tuple(row[:-1] for row in confusion)
    most = max(1, *(count for row in shown for count in row))
    axes.imshow(shown, cmap="Blues", vmin=0, vmax=most)
    for y, row in enumerate(shown):
        for x, count in enumerate(row):
            axes.text(x, y, str(count), ha="center", va="center", color="white" if 2 * count > most else "black")
    names = list(subtypes.class_names)
    axes.set_xticks(range(len(shown[0])), [*names, "none"][: len(shown[0])])
    axes.set_yticks(range(len(confusion)), names)
    axes.set_xlabel("predicted subtype")
    axes.set_ylabel("true subtype")
    axes.set_title("cases")


def _draw_reliability(axes: Axes, found: ProbabilityMetrics) -> None:
    axes.plot([0, 1], [0, 1], color="black", linestyle="dashed", linewidth=1)
    points = [(part.confidence or 0.0, part.accuracy or 0.0) for part in found.reliability if part.cases]
    axes.plot(*zip(*points, strict=True), marker="o")
    for point, part in zip(points, (part for part in found.reliability if part.cases), strict=True):
        axes.annotate(str(part.cases), point, textcoords="offset points", xytext=(4, -10))
    axes.set_xlim(0, 1)
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("confidence")
    axes.set_ylabel("share of right answers")
    axes.set_title(f"calibration error {found.calibration_error:.3f}")
