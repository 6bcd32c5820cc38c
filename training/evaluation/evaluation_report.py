"""Write an evaluation for people and programs: JSON, CSV, and tables of measures, folds and probabilities."""

from __future__ import annotations

import csv
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import mean, stdev

from ...engine.errors import EngineError, OutputError
from ...engine.files import write_json, written_atomically
from .evaluation_figure import draw_evaluation
from .metrics import Interval, StructureMetrics
from .results import Evaluation

JSON_FILE = "evaluation.json"
CSV_FILE = "evaluation_cases.csv"
FIGURE_FILE = "evaluation.png"


PANCREAS_TARGETS = {
    "whole DSC": ("whole-pancreas DSC", 0.91, 0.939),
    "lesion DSC": ("lesion DSC", 0.31, 0.667),
    "subtype macro-F1": ("subtype macro-F1", 0.70, 0.7445),
}
"""Of the pancreas task: name, target, and the best value of others on the task's 36 validation cases."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One measure beside its target and the best published value.

    Attributes:
        measure: Name of the measure.
        value: Measured value; `None` if it was not evaluated.
        interval: Bootstrap 95 % interval of the value.
        target: Target of the pancreas task; `None` for other tasks.
        best_published: Best value of others, on that task's 36 validation cases.
    """

    measure: str
    value: float | None
    interval: Interval | None
    target: float | None
    best_published: float | None


def compare_with_targets(evaluation: Evaluation) -> tuple[Comparison, ...]:
    """Put DSC and macro-F1 beside the targets and the best published values of the pancreas task."""
    subtypes = evaluation.subtypes
    measured: dict[str, tuple[float | None, Interval | None]] = {
        f"{name} DSC": (metrics.dsc, evaluation.dsc_intervals[name]) for name, metrics in evaluation.structures.items()
    }
    measured["subtype macro-F1"] = (
        (None, None) if subtypes is None else (subtypes.metrics.macro_f1, subtypes.macro_f1_interval)
    )
    rows = []
    for measure, (value, interval) in measured.items():
        named, target, best = PANCREAS_TARGETS[measure] if evaluation.is_pancreas else (measure, None, None)
        rows.append(Comparison(measure=named, value=value, interval=interval, target=target, best_published=best))
    return tuple(rows)


def comparison_table(evaluation: Evaluation) -> str:
    """Markdown tables: of the measures, of the folds, of the probabilities; and what is missing or too much."""
    lines = [
        f"| over {len(evaluation.cases)} cases | measured | 95 % interval | target | reached | best published |",
        "|---|---|---|---|---|---|",
    ]
    for row in compare_with_targets(evaluation):
        value = "not evaluated" if row.value is None else f"{row.value:.3f}"
        target = "" if row.target is None else f"{row.target:.2f}"
        reached = "" if row.value is None or row.target is None else "yes" if row.value >= row.target else "no"
        best = "" if row.best_published is None else f"{row.best_published:g}"
        lines.append(f"| {row.measure} | {value} | {_range(row.interval)} | {target} | {reached} | {best} |")
    lines += [*fold_lines(evaluation), *probability_lines(evaluation)]
    for what, names in (
        ("masks missing, counted as 0", evaluation.missing_masks),
        ("subtypes missing, counted as wrong", evaluation.missing_subtypes),
        ("predictions not in the reference, not counted", evaluation.additional),
    ):
        if names:
            lines += ["", f"{len(names)} {what}: {', '.join(names)}"]
    return "\n".join(lines) + "\n"


def fold_lines(evaluation: Evaluation) -> list[str]:
    """Markdown table of a cross-validation's folds, and mean and standard deviation over them; none without folds."""
    if not evaluation.folds:
        return []
    names = list(evaluation.structures)
    columns = [*(f"{name} DSC" for name in names), *(["macro-F1"] if evaluation.subtypes else [])]
    values = [[*(fold.dsc[name] for name in names), *([] if fold.macro_f1 is None else [fold.macro_f1])]
              for fold in evaluation.folds]  # fmt: skip
    lines = ["", f"| fold | cases | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    for fold, row in zip(evaluation.folds, values, strict=True):
        intervals = [*(fold.dsc_intervals[name] for name in names), fold.macro_f1_interval]
        cells = [f"{value:.3f} ({_range(interval)})" for value, interval in zip(row, intervals, strict=False)]
        lines.append(f"| {fold.fold} | {fold.cases} | {' | '.join(cells)} |")
    over = [
        f"{mean(column):.3f} +- {stdev(column) if len(column) > 1 else 0:.3f}" for column in zip(*values, strict=True)
    ]
    return [*lines, f"| mean +- standard deviation | | {' | '.join(over)} |"]


def probability_lines(evaluation: Evaluation) -> list[str]:
    """Markdown table of the quality of class probabilities; none where they are not known."""
    subtypes = evaluation.subtypes
    if subtypes is None or subtypes.probabilities is None:
        return []
    found = subtypes.probabilities
    rows: list[tuple[str, float | None, Interval | None]] = [
        ("AUC, mean over classes", found.macro_auc, found.macro_auc_interval),
        *(
            (f"AUC of {name} against the rest", auc, None)
            for name, auc in zip(subtypes.class_names, found.auc, strict=True)
        ),
        ("Brier score", found.brier, found.brier_interval),
        ("expected calibration error", found.calibration_error, found.calibration_error_interval),
    ]
    lines = ["", f"| class probabilities, over {found.cases} cases | measured | 95 % interval |", "|---|---|---|"]
    for measure, value, interval in rows:
        lines.append(f"| {measure} | {'not defined' if value is None else f'{value:.3f}'} | {_range(interval)} |")
    return lines


def _range(interval: Interval | None) -> str:
    return "" if interval is None else f"{interval.low:.3f} to {interval.high:.3f}"


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
    targets = {name: PANCREAS_TARGETS[f"{name} DSC"][1] for name in evaluation.structures if evaluation.is_pancreas}
    draw_evaluation(evaluation, targets, folder / FIGURE_FILE)
    return folder / JSON_FILE, folder / CSV_FILE, folder / FIGURE_FILE


def _write_cases(evaluation: Evaluation, path: Path) -> None:
    names = [field.name for field in fields(StructureMetrics)]
    header = ["case", "is_missing", *(f"{part}_{name}" for part in evaluation.structures for name in names)]
    classes = () if evaluation.subtypes is None else evaluation.subtypes.class_names
    with written_atomically(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*header, "subtype", "predicted_subtype", *(f"probability_{name}" for name in classes), "fold"])
        for case in evaluation.cases:
            measured = [f"{getattr(part, name):.6g}" for part in case.structures.values() for name in names]
            shares = [f"{share:.6g}" for share in case.probabilities or ()] or [""] * len(classes)
            answer = [case.subtype, case.predicted_subtype, *shares, case.fold]
            writer.writerow([case.name, int(case.is_missing), *measured, *answer])
