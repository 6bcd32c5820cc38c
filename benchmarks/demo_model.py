"""The demo model on held-out phantoms: segmentation, subtypes, and random subtypes as the control.

    python -m nnturbo.benchmarks.demo_model [--cases 48] [--mirror] [--json FILE] [--output FOLDER]

The phantoms come from a seed that no training used. Masks, tables and the figure stay in `--output`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
from nnturbo.training.demo import DEMO_SEED, demonstrate
from nnturbo.training.evaluation.evaluate import comparison_table, write_evaluation
from nnturbo.training.evaluation.metrics import bootstrap_macro_f1, classification_metrics

from .report import write_report

MODEL = Path(__file__).resolve().parents[1] / "examples" / "demo_model"
RESAMPLES = 2000


def main() -> None:
    """Predict, evaluate, print and keep."""
    parser = argparse.ArgumentParser(description="demo model on held-out phantoms")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--cases", type=int, default=48)
    parser.add_argument("--mirror", action="store_true")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        output = options.output or Path(folder)
        demo = demonstrate(options.model, output, cases=options.cases, seed=DEMO_SEED, mirror=options.mirror)
        write_evaluation(demo.evaluation, output)
    evaluation = demo.evaluation
    truth = [int(case.subtype) for case in evaluation.cases if case.subtype is not None]
    guesses = np.random.default_rng(0).integers(3, size=len(truth)).tolist()
    control, interval = (
        classification_metrics(truth, guesses),
        bootstrap_macro_f1(truth, guesses, resamples=RESAMPLES, seed=0),
    )
    print(comparison_table(evaluation))
    print(f"random subtypes, as a control: macro-F1 {control.macro_f1:.3f} ({interval.low:.3f} to {interval.high:.3f})")
    subtypes = evaluation.subtypes
    write_report(options.json, {
        "benchmark": "demo_model", "cases": len(evaluation.cases), "seed": DEMO_SEED, "mirror": options.mirror,
        **{name: asdict(metrics) for name, metrics in evaluation.structures.items()},
        **{f"{name}_dsc_interval": asdict(interval) for name, interval in evaluation.dsc_intervals.items()},
        "subtypes": None if subtypes is None else asdict(subtypes),
        "control": {"macro_f1": control.macro_f1, "interval": asdict(interval)},
        "classifier": next(iter(demo.records.values()))["provenance"].get("classifier"),
        "seconds": time.perf_counter() - start,
    })  # fmt: skip


if __name__ == "__main__":
    main()
