"""The whole command in fresh processes, `nnUNetv2_predict_from_modelfolder` against `nnturbo predict`.

    python -m nnturbo.benchmarks.command --model FOLDER --scan FILE [--bundle FOLDER] [--disable_tta] [--rounds 2] \
        [--json FILE]

Same weights, scan, mirroring, step and device (CPU), in the order A B B A; the outputs are compared.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from nnturbo.engine.bundle import read_manifest

from .report import Run, run_measured, write_report


def main() -> None:
    """Measure, print the ratio with the agreement beside it, and keep the samples."""
    parser = argparse.ArgumentParser(description="whole commands")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--bundle", type=Path, help="of the same model, for nnturbo; by default the model itself")
    parser.add_argument("--scan", type=Path, required=True, help="a file that ends in _0000 and the model's ending")
    parser.add_argument("--fold", default="all")
    parser.add_argument("--disable_tta", action="store_true")
    parser.add_argument("--rounds", type=int, default=2, help="of A B B A: twice as many runs each")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    tools = Path(sys.executable).parent
    with tempfile.TemporaryDirectory() as folder:
        scans, outputs = Path(folder) / "scans", {side: Path(folder) / side for side in ("stock", "nnturbo")}
        scans.mkdir()
        shutil.copy(options.scan, scans)
        commands = {
            side: list(map(str, (*start, "-i", scans, "-o", outputs[side], "-m", model, "-f", options.fold,
                                 "-device", "cpu", "--disable_progress_bar",
                                 *(["--disable_tta"] if options.disable_tta else []))))
            for side, model, *start in (
                ("stock", options.model, tools / "nnUNetv2_predict_from_modelfolder"),
                ("nnturbo", options.bundle or options.model, tools / "nnturbo", "predict"),
            )
        }  # fmt: skip
        quiet = {name: os.environ.get(name, folder) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
        runs: dict[str, list[Run]] = {side: [] for side in commands}
        for side in ("stock", "nnturbo", "nnturbo", "stock") * options.rounds:
            runs[side].append(run_measured(commands[side], environment=quiet))
            print(f"{side:8} {runs[side][-1].seconds:7.1f} s {runs[side][-1].peak_bytes / 2**20:7.0f} MiB", flush=True)
        labels = [
            sitk.GetArrayFromImage(sitk.ReadImage(str(next(path for path in output.iterdir() if ".nii" in path.name))))
            for output in outputs.values()
        ]
    seconds = {side: statistics.median(run.seconds for run in taken) for side, taken in runs.items()}
    differing = int(np.count_nonzero(labels[0] != labels[1]))
    print(f"{seconds['stock'] / seconds['nnturbo']:.2f} times faster, {differing} of {labels[0].size} voxels differ")
    write_report(options.json, {
        "benchmark": "command", "mirroring": not options.disable_tta, "bundle": _bundle(options.bundle),
        "ratio": seconds["stock"] / seconds["nnturbo"],
        "median_s": seconds, "voxels_differing": differing, "voxels": int(labels[0].size),
        "samples": {side: [asdict(run) for run in taken] for side, taken in runs.items()},
    })  # fmt: skip


def _bundle(folder: Path | None) -> str | None:
    """Say what a bundle runs, such as "openvino fp32"; None where nnturbo was given the model itself."""
    if folder is None:
        return None
    manifest = read_manifest(folder)
    return f"{manifest.backend} {manifest.precision}"


if __name__ == "__main__":
    main()
