r"""Compares DALI's loader with the exact one on a CPU: labels, and time before the network.

    python -m nnturbo.benchmarks.loaders --model FOLDER [--cases 6 | --scans FILE ...] [--json FILE]

Times are of the stages "read" and "preprocess", for which the network waits. Both loaders read ahead.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from nnturbo.engine import Engine, EngineError, EngineOptions, Prediction
from nnturbo.engine.options import LOADERS
from nnturbo.training.phantoms.phantom import SMALL_SETTINGS, write_dataset

from .agreement import SEED
from .report import write_report


def predictions(model: Path, loader: str, scans: list[Path]) -> list[Prediction]:
    """Predict all scans with one loader, in fp32 and without mirroring."""
    engine = Engine.load(model, device="cpu", mirror=False, options=EngineOptions(loader=loader))
    found = []
    for answer in engine.predict_many(scans):
        if isinstance(answer, EngineError):
            raise answer
        found.append(answer)
    return found


def lowest_dice(exact: list[Prediction], other: list[Prediction]) -> float:
    """Dice of the label that agrees least, over all scans and all labels that occur."""
    scores = []
    for label in exact[0].labels.foreground:
        pairs = [(a.segmentation == label, b.segmentation == label) for a, b in zip(exact, other, strict=True)]
        size = sum(np.count_nonzero(a) + np.count_nonzero(b) for a, b in pairs)
        if size:
            scores.append(2 * sum(np.count_nonzero(a & b) for a, b in pairs) / size)
    return min(scores)


def main() -> None:
    """Measure, print, and keep."""
    parser = argparse.ArgumentParser(description="loaders")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--cases", type=int, default=6, help="phantoms")
    parser.add_argument("--scans", type=Path, nargs="+", help="in place of phantoms")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        scans = options.scans or [
            case.image
            for case in write_dataset(folder, counts={"test": options.cases}, seed=SEED, settings=SMALL_SETTINGS)
        ]
        exact: list[Prediction] = []
        for loader in LOADERS:
            found = predictions(options.model, loader, scans)
            exact = exact or found
            seconds = statistics.median(
                (answer.timings["read"] + answer.timings["preprocess"]) / 1e3 for answer in found
            )
            different = sum(
                int(np.count_nonzero(a.segmentation != b.segmentation)) for a, b in zip(exact, found, strict=True)
            )
            rows.append({
                "loader": loader, "scans": len(scans), "what": "given scans" if options.scans else "phantoms",
                "waiting_s": seconds, "voxels": sum(answer.segmentation.size for answer in found),
                "different": different, "lowest_dice": lowest_dice(exact, found),
            })  # fmt: skip
            print(f"{loader:12} {seconds:.3f} s, {different} voxels differ, Dice {rows[-1]['lowest_dice']:.4f}")
    write_report(options.json, {"benchmark": "loaders", "model": options.model.name, "rows": rows})


if __name__ == "__main__":
    main()
