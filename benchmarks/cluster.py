"""One and two workers of a local Ray cluster, each with one core, on the same folder of phantoms.

    python -m nnturbo.benchmarks.cluster [--cases 40] [--json FILE]

Whole commands run in the order 1 2 2 1. The rate is measured between the first and the last finished case, so that the
start of the cluster and of the workers does not count. The labels are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from datetime import datetime
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from nnturbo.training.phantoms.phantom import write_dataset

from .report import run_measured, write_report
from .task_models import DEMO_MODEL

SEED = 20261124


def main() -> None:
    """Measure, print the ratio with the agreement beside it, and keep the samples."""
    parser = argparse.ArgumentParser(description="workers of a cluster")
    parser.add_argument("--cases", type=int, default=40)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rates: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        scans = folder / "scans"
        scans.mkdir()
        for case in write_dataset(
            folder / "phantoms", counts={"test": options.cases}, seed=SEED, workers=os.cpu_count() or 1
        ):
            case.image.rename(scans / case.image.name)
        for run, workers in enumerate((1, 2, 2, 1)):
            log = folder / f"{run}.log"
            job = ["-m", DEMO_MODEL, "-i", scans, "-o", folder / f"labels_{workers}", "--disable_tta", "--log", log]
            ray = ["--ray", "local", "--cores", 1, "--workers", workers, "-device", "cpu", "--disable_progress_bar"]
            run_measured([str(part) for part in (Path(sys.executable).with_name("nnturbo"), "predict", *job, *ray)])
            rates[workers].append(rate(log))
            print(f"{workers} workers: {rates[workers][-1]:.3f} cases a second", flush=True)
        labels = [
            np.concatenate([read(path).ravel() for path in sorted((folder / f"labels_{workers}").glob("*.nii.gz"))])
            for workers in rates
        ]
    medians = {workers: statistics.median(samples) for workers, samples in rates.items()}
    differing = int(np.count_nonzero(labels[0] != labels[1]))
    print(f"two workers are {medians[2] / medians[1]:.2f} times one; {differing} of {labels[0].size} voxels differ")
    write_report(options.json, {
        "benchmark": "cluster", "cases": options.cases, "cases_per_s": medians, "ratio": medians[2] / medians[1],
        "voxels": labels[0].size, "voxels_differing": differing, "samples": rates,
    })  # fmt: skip


def rate(log: Path) -> float:
    """Cases per second between the first and the last finished case."""
    events = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    times = [datetime.fromisoformat(event.time) for event in events if event.kind == "done"]
    return (len(times) - 1) / (times[-1] - times[0]).total_seconds()


def read(path: Path) -> np.ndarray:
    """Labels of a case."""
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


if __name__ == "__main__":
    main()
