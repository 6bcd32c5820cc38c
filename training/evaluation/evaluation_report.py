"""Write an evaluation for people and programs: JSON, CSV, a figure, and a table against the targets."""

from __future__ import annotations

import csv
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from ...engine.errors import EngineError, OutputError
from ...engine.files import write_json, written_atomically
from .metrics import Interval, StructureMetrics
from .results import Evaluation

if TYPE_CHECKING:
    from matplotlib.axes import Axes

JSON_FILE = "evaluation.json"
CSV_FILE = "evaluation_cases.csv"
FIGURE_FILE = "evaluation.png"


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One measure beside its target and the best published value.

    Attributes:
        measure: Name of the measure.
        value: Measured value; `None` if it was not evaluated.
        interval: Bootstrap 95 % interval of the value.
        target: Target of the task.
        best_published: Best value of others, on the task's 36 validation cases.
    """

    measure: str
    value: float | None
    interval: Interval | None
    target: float
    best_published: float


def compare_with_targets(evaluation: Evaluation) -> tuple[Comparison, ...]:
    """Put the three measures of the task beside its targets and the best published values."""
    subtypes = evaluation.subtypes
    return (
        Comparison(
            measure="whole-pancreas DSC",
            value=evaluation.whole.dsc,
            interval=evaluation.whole_dsc_interval,
            target=0.91,
            best_published=0.939,
        ),
        Comparison(
            measure="lesion DSC",
            value=evaluation.lesion.dsc,
            interval=evaluation.lesion_dsc_interval,
            target=0.31,
            best_published=0.667,
        ),
        Comparison(
            measure="subtype macro-F1",
            value=None if subtypes is None else subtypes.metrics.macro_f1,
            interval=None if subtypes is None else subtypes.macro_f1_interval,
            target=0.70,
            best_published=0.7445,
        ),
    )


def comparison_table(evaluation: Evaluation) -> str:
    """Markdown table of `compare_with_targets`, with a line about missing and additional cases."""
    lines = [
        f"| over {len(evaluation.cases)} cases | measured | 95 % interval | target | reached | best published |",
        "|---|---|---|---|---|---|",
    ]
    for row in compare_with_targets(evaluation):
        value = "not evaluated" if row.value is None else f"{row.value:.3f}"
        interval = "" if row.interval is None else f"{row.interval.low:.3f} to {row.interval.high:.3f}"
        reached = "" if row.value is None else "yes" if row.value >= row.target else "no"
        lines.append(
            f"| {row.measure} | {value} | {interval} | {row.target:.2f} | {reached} | {row.best_published:g} |"
        )
    for what, names in (
        ("masks missing, counted as 0", evaluation.missing_masks),
        ("subtypes missing, counted as wrong", evaluation.missing_subtypes),
        ("predictions not in the reference, not counted", evaluation.additional),
    ):
        if names:
            lines += ["", f"{len(names)} {what}: {', '.join(names)}"]
    return "\n".join(lines) + "\n"


def write_evaluation(evaluation: Evaluation, folder: str | os.PathLike[str]) -> tuple[Path, Path, Path]:
    """Write `evaluation.json` (everything), `evaluation_cases.csv` (a row a case) and `evaluation.png`.

    Args:
        evaluation: Result of `evaluate`.
        folder: Folder for the files; made if it does not exist. Files of these names are replaced.

    Returns:
        The three files, in this order.

    Raises:
        EngineError: If matplotlib is not installed; nothing is written then.
        OutputError: If a file cannot be written.
    """
    folder = Path(folder)
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise EngineError(f"the figure needs matplotlib ({error}): pip install 'nnturbo[training]'") from error
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder} cannot be made: {error.strerror}; choose another folder") from error
    comparison = [asdict(row) for row in compare_with_targets(evaluation)]
    write_json(folder / JSON_FILE, {**asdict(evaluation), "comparison": comparison})
    _write_cases(evaluation, folder / CSV_FILE)
    _draw_figure(evaluation, folder / FIGURE_FILE)
    return folder / JSON_FILE, folder / CSV_FILE, folder / FIGURE_FILE


def _write_cases(evaluation: Evaluation, path: Path) -> None:
    names = [field.name for field in fields(StructureMetrics)]
    header = ["case", "is_missing", *(f"{part}_{name}" for part in ("whole", "lesion") for name in names)]
    with written_atomically(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*header, "subtype", "predicted_subtype"])
        for case in evaluation.cases:
            measured = [f"{getattr(part, name):.6g}" for part in (case.whole, case.lesion) for name in names]
            writer.writerow([case.name, int(case.is_missing), *measured, case.subtype, case.predicted_subtype])


def _draw_figure(evaluation: Evaluation, path: Path) -> None:
    """Draw the DSC of all cases and, if there is one, the confusion matrix."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2), layout="constrained")  # without pyplot, no display and no global state
    panels = figure.subplots(1, 2 if evaluation.subtypes else 1, squeeze=False)[0]
    _draw_dsc(panels[0], evaluation)
    if evaluation.subtypes is not None:
        _draw_confusion(panels[1], evaluation.subtypes.metrics.confusion)
    with written_atomically(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _draw_dsc(axes: Axes, evaluation: Evaluation) -> None:
    for position, row in enumerate(compare_with_targets(evaluation)[:2]):
        values = sorted((case.whole if position == 0 else case.lesion).dsc for case in evaluation.cases)
        # Spread sideways by rank, so that cases of the same value stay apart.
        offsets = [0.3 * (rank / max(1, len(values) - 1) - 0.5) for rank in range(len(values))]
        axes.scatter([position + offset for offset in offsets], values, s=14, alpha=0.7)
        axes.hlines(row.target, position - 0.35, position + 0.35, colors="black", linestyles="dashed")
        axes.hlines(sum(values) / len(values), position - 0.25, position + 0.25, colors="black")
    axes.set_xticks([0, 1], ["whole pancreas", "lesion"])
    axes.set_ylim(-0.03, 1.03)
    axes.set_ylabel("DSC of each case")
    axes.set_title("line: mean, dashed: target")


def _draw_confusion(axes: Axes, confusion: tuple[tuple[int, ...], ...]) -> None:
    shown = confusion if any(row[-1] for row in confusion) else tuple(row[:-1] for row in confusion)
    most = max(1, *(count for row in shown for count in row))
    axes.imshow(shown, cmap="Blues", vmin=0, vmax=most)
    for y, row in enumerate(shown):
        for x, count in enumerate(row):
            axes.text(x, y, str(count), ha="center", va="center", color="white" if 2 * count > most else "black")
    names = [str(subtype) for subtype in range(len(confusion))]
    axes.set_xticks(range(len(shown[0])), [*names, "none"][: len(shown[0])])
    axes.set_yticks(range(len(confusion)), names)
    axes.set_xlabel("predicted subtype")
    axes.set_ylabel("true subtype")
    axes.set_title("cases")
