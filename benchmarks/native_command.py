"""Times the C program against `nnturbo predict` and nnU-Net's command, each in fresh processes, in turn.

    python -m nnturbo.benchmarks.native_command PROGRAM [--cases small ...] [--rounds 3] [--json FILE]

PROGRAM is `nnturbo-native`, built from kernels/libnnturbo. `nnturbo predict` runs from the model folder, as nnU-Net
does, and from the native bundle, as the program does. The first round does not count, because caches are cold. The
program's labels must be those of `nnturbo predict`; how many differ from nnU-Net's is counted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from nnturbo.engine import build
from nnturbo.training.phantoms.phantom import SMALL_SETTINGS, write_dataset

from .report import Run, machine, run_measured, write_report
from .task_models import DEMO_MODEL, FLAT, ordinary_model, write_task_model, write_task_scan

STOCK, MODEL, BUNDLE, PROGRAM = "nnU-Net", "nnturbo predict", "nnturbo predict, bundle", "nnturbo-native"
SEED = 20261127
FLAT_CASES = {"2d 256": (256, 6), "2d 512": (512, 3)}
"""Patch size along both axes, and slices of as many pixels."""


def small_case(folder: Path) -> tuple[str, Path, Path, Path, bool]:
    """The demo model on a small phantom; a description, the models for nnturbo and nnU-Net, the scan, mirroring."""
    (case,) = write_dataset(folder / "data", counts={"test": 1}, seed=SEED, settings=SMALL_SETTINGS)
    return "demo model, a small phantom", DEMO_MODEL, ordinary_model(DEMO_MODEL, folder / "stock"), case.image, False


def flat_case(folder: Path, patch: int, slices: int) -> tuple[str, Path, Path, Path, bool]:
    """The same of a 2D network."""
    model = write_task_model(folder / "model", FLAT, (patch, patch))
    scan = write_task_scan(folder / "scan_0000.nii.gz", (slices, patch, patch))
    return f"2D network of 33 million weights, {slices} slices of {patch} x {patch}", model, model, scan, True


def commands(
    program: Path, model: Path, stock_model: Path, scan: Path, folder: Path, *, mirror: bool
) -> tuple[dict[str, list[str]], dict[str, Path]]:
    """Give each side's command, and the file with its labels."""
    fold = next(model.glob("fold_*")).name.removeprefix("fold_")
    bundle = build(model, folder / "bundle", folds=[fold], backend="native", device="cpu")
    scans = folder / "scans"
    scans.mkdir()
    (scans / "scan_0000.nii.gz").symlink_to(scan.absolute())
    tools, shared = Path(sys.executable).parent, ["-device", "cpu", "--disable_progress_bar"]
    shared += [] if mirror else ["--disable_tta"]
    python_sides = {
        STOCK: [tools / "nnUNetv2_predict_from_modelfolder", "-m", stock_model, "-f", fold],
        MODEL: [tools / "nnturbo", "predict", "-m", model, "-f", fold],
        BUNDLE: [tools / "nnturbo", "predict", "-m", bundle],
    }
    made, written = {}, {}
    for side, command in python_sides.items():
        out = folder / f"labels {side}"
        made[side] = [str(word) for word in (*command, *shared, "-i", scans, "-o", out)]
        written[side] = out / "scan.nii.gz"
    written[PROGRAM] = folder / "labels.nii.gz"
    words = (program.absolute(), bundle, scan, written[PROGRAM], *([] if mirror else ["--disable-tta"]))
    made[PROGRAM] = [str(word) for word in words]
    return made, written


def in_turn(sides: Mapping[str, Sequence[str]], rounds: int, folder: Path) -> dict[str, list[Run]]:
    """Run all sides in turn; the first run of each comes first."""
    runs: dict[str, list[Run]] = {side: [] for side in sides}
    environment: dict[str, str] = dict.fromkeys(("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"), str(folder))
    for _ in range(rounds + 1):
        for side, command in sides.items():
            runs[side].append(run_measured(command, environment=environment))
            print(f"{side:24} {runs[side][-1]}", flush=True)
    return runs


def measure(case: str, program: Path, rounds: int, folder: Path) -> dict[str, Any]:
    """Measure a case.

    Raises:
        RuntimeError: Where a command fails, or the program's labels are not those of `nnturbo predict`.
    """
    what, model, stock_model, scan, mirror = (
        small_case(folder) if case == "small" else flat_case(folder, *FLAT_CASES[case])
    )
    sides, written = commands(program, model, stock_model, scan, folder, mirror=mirror)
    runs = in_turn(sides, rounds, folder)
    labels = {side: sitk.GetArrayFromImage(sitk.ReadImage(str(file))) for side, file in written.items()}
    if not np.array_equal(labels[PROGRAM], labels[BUNDLE]):
        raise RuntimeError(f"{what}: labels of {program} must be those of nnturbo predict, and are not")
    medians = {
        of: {side: statistics.median(getattr(run, of) for run in taken[1:]) for side, taken in runs.items()}
        for of in ("seconds", "cpu_seconds", "peak_bytes")
    }
    return {
        "case": case,
        "what": what,
        "mirroring": mirror,
        "voxels": labels[STOCK].size,
        "voxels_differing": int(np.count_nonzero(labels[PROGRAM] != labels[STOCK])),
        **{f"median_{of}": values for of, values in medians.items()},
        "samples": {side: [asdict(run) for run in taken] for side, taken in runs.items()},
    }


def main() -> None:
    """Measure, print and keep."""
    cases = ["small", *FLAT_CASES]
    parser = argparse.ArgumentParser(description="the C program against commands in Python")
    parser.add_argument("program", type=Path)
    parser.add_argument("--cases", nargs="+", choices=cases, default=cases)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    stored = json.loads(options.json.read_bytes()) if options.json and options.json.exists() else {"rows": []}
    if stored.get("machine", machine()["machine"]) != machine()["machine"]:
        parser.error(f"{options.json} holds what another machine measured: give another file")
    rows = {row["case"]: row for row in stored["rows"]}  # results of other cases stay
    for case in options.cases:
        with tempfile.TemporaryDirectory() as folder:
            row = measure(case, options.program, options.rounds, Path(folder))
        rows[case] = {**row, "commit": machine()["commit"]}
        seconds, peaks = row["median_seconds"], row["median_peak_bytes"]
        print(
            f"{row['what']}: {seconds[BUNDLE] / seconds[PROGRAM]:.2f} times sooner than nnturbo predict, with "
            f"{peaks[PROGRAM] / peaks[BUNDLE]:.0%} of its memory; nnU-Net takes {seconds[STOCK] / seconds[MODEL]:.2f} "
            f"times as long as nnturbo predict from the same model folder",
            flush=True,
        )
        ordered = [rows[case] for case in cases if case in rows]
        write_report(options.json, {"benchmark": "native_command", "rows": ordered})


if __name__ == "__main__":
    main()
