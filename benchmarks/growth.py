"""Time and memory against the length of a scan, classes, mirror views and cases, nnU-Net's command against nnturbo's.

    python -m nnturbo.benchmarks.growth [--rounds 1] [--json FILE]

One of them grows, and the others keep their first value. Each measurement is a whole command in a fresh process, and
the two sides run in turn. A fitted line gives the cost of one more plane, class, view or case. The network is small, so
that the other stages can be seen. A model's first run, which compiles it, does not count.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .command import SIDES, compare_labels
from .memory import write_model, write_scan
from .report import Run, run_measured, write_report


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Size of one command's job.

    Args:
        planes: Planes of each scan, of 256 x 256 voxels.
        classes: Background included.
        views: 1, 2, 4 or 8.
        cases: Scans in the folder.
    """

    planes: int = 64
    classes: int = 3
    views: int = 1
    cases: int = 1


GROWTH: dict[str, Sequence[int]] = {
    "planes": (64, 128, 256, 384),
    "classes": (3, 10, 20, 40),
    "views": (1, 2, 4, 8),
    "cases": (1, 3, 6),
}


def fit(sizes: Sequence[float], values: Sequence[float]) -> dict[str, float]:
    """Fit a line by least squares: its `slope` and `intercept`, and `r2`, the share of the variance it explains."""
    slope, intercept = np.polyfit(sizes, values, 1)
    residual = np.asarray(values) - (slope * np.asarray(sizes) + intercept)
    spread = np.var(values)
    return {
        "slope": float(slope),
        "intercept": float(intercept),
        "r2": 1.0 if spread == 0 else float(1 - np.mean(residual**2) / spread),
    }


def run(job: Job, folder: Path) -> dict[str, Any]:
    """Run both commands on one job; give the time of each, and the number of labels that differ."""
    model, scans = folder / f"model{job.classes}-{job.views}", folder / f"scans{job.planes}-{job.cases}"
    if not model.exists():
        write_model(model, classes=job.classes, mirror_axes=tuple(range(job.views.bit_length() - 1)))
        run(job, folder)  # caches are cold
    if not scans.exists():
        scans.mkdir()
        for index in range(job.cases):
            write_scan(scans / f"scan{index}_0000.nii.gz", (job.planes, 256, 256), seed=index)
    tools = Path(sys.executable).parent
    given = ["-m", model, "-i", scans, "-f", "0", "-device", "cpu", "--disable_progress_bar"]
    given += ["--disable_tta"] if job.views == 1 else []
    taken: dict[str, Run] = {}
    quiet = {key: os.environ.get(key, str(folder)) for key in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    for side, tool in zip(SIDES, ("nnUNetv2_predict_from_modelfolder", "nnturbo"), strict=True):
        command = [tools / tool, *(["predict"] if side == "nnturbo" else []), *given, "-o", folder / side]
        taken[side] = run_measured([str(part) for part in command], environment=quiet)
    labels = {"background": 0, **{str(label): label for label in range(1, job.classes)}}
    audit = compare_labels(folder / "stock", folder / "nnturbo", labels, ".nii.gz")
    for side in SIDES:
        shutil.rmtree(folder / side)
    return {side: asdict(of) for side, of in taken.items()} | {
        key: audit[key] for key in ("voxels", "voxels_differing")
    }


def lines(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Fit time and memory of each side against the size that grows."""
    fitted: dict[str, Any] = {}
    for what in dict.fromkeys(row["what"] for row in rows):
        of_it = [row for row in rows if row["what"] == what]
        sizes = [row[what] for row in of_it]
        fitted[what] = {
            side: {key: fit(sizes, [row[side][key] for row in of_it]) for key in ("seconds", "peak_bytes")}
            for side in SIDES
        }
    return fitted


def main() -> None:
    """Measure, fit, print, and keep."""
    parser = argparse.ArgumentParser(description="time and memory against size")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="nnturbo-") as name:
        for what, sizes in GROWTH.items():
            for size in list(sizes) * options.rounds:
                job = replace(Job(), **{what: size})
                rows.append({"what": what, **asdict(job), **run(job, Path(name))})
                row = rows[-1]
                print(
                    f"{size:4} {what:8}"
                    + "".join(
                        f" {side} {row[side]['seconds']:6.1f} s {row[side]['peak_bytes'] / 2**30:5.2f} GiB"
                        for side in SIDES
                    )
                    + f"  {row['voxels_differing']} of {row['voxels']} voxels differ",
                    flush=True,
                )
    fitted = lines(rows)
    for what, sides in fitted.items():
        for side, of in sides.items():
            print(
                f"{side:8} one more of {what:8}: {of['seconds']['slope']:7.3f} s (r2 {of['seconds']['r2']:.3f}), "
                f"{of['peak_bytes']['slope'] / 2**20:7.2f} MiB (r2 {of['peak_bytes']['r2']:.3f})"
            )
    write_report(options.json, {"benchmark": "growth", "rows": rows, "lines": fitted})


if __name__ == "__main__":
    main()
