"""Compares a training's moving average of the weights with the weights themselves, on the same held-out cases.

    python -m nnturbo.benchmarks.weight_average --weights_of MODEL/fold_0/CHECKPOINT --out WEIGHTS
    nnturbo predict -i SCANS -o PREDICTIONS -m MODEL -chk CHECKPOINT --classifier head --disable_tta
    nnturbo evaluate -p PREDICTIONS -r ANSWERS --reference_subtypes ANSWERS/subtype_results.csv
    python -m nnturbo.benchmarks.weight_average --pair WHEN AVERAGE.json WEIGHTS.json [--json FILE]

A checkpoint of a training with `average_decay` holds both, and predicts by the average; the first command makes a model
of the weights. Both predict the same cases, and the last command compares their evaluations; `--pair` may be given for
several moments of a training.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnturbo.engine.files import written_atomically
from nnturbo.engine.options import DEFAULT_CHECKPOINT
from nnturbo.training.trainer_state import FITTED

from .recipes import Predicted, compare
from .report import write_report

AVERAGE, WEIGHTS = "average", "weights"


def without_average(checkpoint: Path, target: Path) -> Path:
    """Make a model of the weights that were trained on, in place of their average; give its folder.

    Args:
        checkpoint: In a fold of a model whose training had an average.
        target: Folder of the new model.
    """
    path = target / "fold_0" / DEFAULT_CHECKPOINT
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        for name in ("plans.json", "dataset.json"):
            shutil.copyfile(checkpoint.parents[1] / name, target / name)
        content = torch.load(checkpoint, map_location="cpu", weights_only=False)
        # What was fitted was fitted to the average.
        kept = {name: value for name, value in content.items() if name not in FITTED}
        with written_atomically(path) as temporary:
            torch.save({**kept, "network_weights": content["multi_task"]["trained_weights"]}, temporary)
    return target


def read_evaluation(path: Path, focus: str) -> tuple[Predicted, dict[str, int]]:
    """Read DSC and answers of an evaluation, and the true class of each case by its name."""
    cases = json.loads(path.read_bytes())["cases"]
    dsc = [[case["structures"][structure]["dsc"] for structure in ("whole", focus)] for case in cases]
    shares = np.array([case["probabilities"] for case in cases])
    return Predicted(dsc=np.array(dsc), shares={"head": shares}), {case["name"]: int(case["subtype"]) for case in cases}


def pair(when: str, average: Path, weights: Path, focus: str) -> dict[str, Any]:
    """Compare the evaluations of a training's average and weights at one moment."""
    (of_average, truth), (of_weights, other) = (read_evaluation(path, focus) for path in (average, weights))
    if list(truth.items()) != list(other.items()):
        raise SystemExit(f"{average} and {weights} must be of the same cases")
    rows = compare({AVERAGE: of_average, WEIGHTS: of_weights}, list(truth.values()), WEIGHTS)
    return {"when": when, "cases": len(truth), **{row["way"]: row["measures"] for row in rows}}


def main() -> None:
    """Make a model of the weights, or compare."""
    parser = argparse.ArgumentParser(description="average of the weights")
    parser.add_argument("--weights_of", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--pair", nargs=3, action="append", default=[], metavar=("WHEN", "AVERAGE", "WEIGHTS"))
    parser.add_argument("--focus", default="lesion")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if (options.weights_of is not None, options.out is not None, not options.pair) not in ((True,) * 3, (False,) * 3):
        parser.error("give --weights_of and --out, or --pair once or more")
    if options.weights_of:
        without_average(options.weights_of, options.out)
        return
    rows = [pair(when, Path(average), Path(weights), options.focus) for when, average, weights in options.pair]
    for row in rows:
        for name, of in row[AVERAGE].items():
            difference = of["difference"]
            print(f"{row['when']}, {name}: {of['value']:.3f}, weights {row[WEIGHTS][name]['value']:.3f}, difference "
                  f"{difference['value']:+.3f} ({difference['low']:+.3f} to {difference['high']:+.3f})")  # fmt: skip
    write_report(options.json, {"benchmark": "weight_average", "rows": rows})


if __name__ == "__main__":
    main()
