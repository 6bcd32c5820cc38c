"""The demo model on held-out phantoms: segmentation, subtypes by each classifier, and random subtypes as the control.

    python -m nnturbo.benchmarks.demo_model [--cases 300] [--seed S] [--mirror] [--json FILE] [--output FOLDER]

The phantoms come from a seed that no training and no choice has used: take another seed after anything was chosen by
the result. Both classifiers of a model answer on the same cases, without mirroring. Masks, tables and the figure stay
in `--output`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from nnturbo.engine.model.folder import read_model
from nnturbo.training.demo import demonstrate
from nnturbo.training.evaluation.evaluate import comparison_table, write_evaluation
from nnturbo.training.evaluation.metrics import bootstrap_macro_f1, classification_metrics, draw_resamples, interval_of
from nnturbo.training.pooled_classifier import class_answers

from .heads import held_out_scans
from .report import write_report

MODEL = Path(__file__).resolve().parents[1] / "examples" / "demo_model"
RESAMPLES = 2000
FRESH_SEED = 20261127
"""Of phantoms by which nothing has been chosen; the demo's own, of `DEMO_SEED`, have been looked at often."""


def compared(model: Path, phantoms: Path) -> dict[str, dict[str, Any]]:
    """Macro-F1 of the head and of a fitted classifier on the same phantoms, and of their difference."""
    scans = held_out_scans(phantoms)
    answers = class_answers(read_model(model), scans)
    one_hot = np.eye(3)
    truth = np.array([scan.subtype for scan in scans])
    draws = draw_resamples(len(scans), RESAMPLES, 0)
    rows, resampled = {}, {}
    for name, predicted in answers.items():
        pairs = one_hot[truth][:, :, None] * one_hot[predicted][:, None, :]
        resampled[name] = _macro_f1(np.tensordot(draws, pairs, axes=1))
        value = _macro_f1(pairs.sum(0)[None])[0]
        rows[f"macro-F1, {name}"] = {"value": float(value), "interval": asdict(interval_of(resampled[name]))}
    if len(answers) == 2:
        (one, first), (other, second) = resampled.items()
        difference = rows[f"macro-F1, {one}"]["value"] - rows[f"macro-F1, {other}"]["value"]
        interval = asdict(interval_of(first - second))
        rows[f"macro-F1, {one} less {other}"] = {"value": difference, "interval": interval}
    return rows


def _macro_f1(confusions: np.ndarray) -> np.ndarray:
    """Of (N, K, K) counts by truth and answer, where every class occurs."""
    hits = np.diagonal(confusions, axis1=1, axis2=2)
    return (2 * hits / (confusions.sum(1) + confusions.sum(2))).mean(1)


def main() -> None:
    """Predict, evaluate, print and keep."""
    parser = argparse.ArgumentParser(description="demo model on held-out phantoms")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--seed", type=int, default=FRESH_SEED)
    parser.add_argument("--mirror", action="store_true")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        output = options.output or Path(folder)
        demo = demonstrate(options.model, output, cases=options.cases, seed=options.seed, mirror=options.mirror)
        write_evaluation(demo.evaluation, output)
        classes = compared(options.model, output)
    evaluation = demo.evaluation
    truth = [int(case.subtype) for case in evaluation.cases if case.subtype is not None]
    guesses = np.random.default_rng(0).integers(3, size=len(truth)).tolist()
    control, interval = (
        classification_metrics(truth, guesses),
        bootstrap_macro_f1(truth, guesses, resamples=RESAMPLES, seed=0),
    )
    print(comparison_table(evaluation))
    print(f"random subtypes, as a control: macro-F1 {control.macro_f1:.3f} ({interval.low:.3f} to {interval.high:.3f})")
    for name, row in classes.items():
        print(f"{name}: {row['value']:.3f} ({row['interval']['low']:.3f} to {row['interval']['high']:.3f})")
    subtypes = evaluation.subtypes
    write_report(options.json, {
        "benchmark": "demo_model", "cases": len(evaluation.cases), "seed": options.seed, "mirror": options.mirror,
        **{name: asdict(metrics) for name, metrics in evaluation.structures.items()},
        **{f"{name}_dsc_interval": asdict(interval) for name, interval in evaluation.dsc_intervals.items()},
        "subtypes": None if subtypes is None else asdict(subtypes),
        "classes": classes,
        "control": {"macro_f1": control.macro_f1, "interval": asdict(interval)},
        "classifier": next(iter(demo.records.values()))["provenance"].get("classifier"),
        "seconds": time.perf_counter() - start,
    })  # fmt: skip


if __name__ == "__main__":
    main()
