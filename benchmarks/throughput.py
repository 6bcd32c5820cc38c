"""Times a folder of scans with a small network, so that reading and writing matter: one by one, as a job, by nnU-Net.

    python -m nnturbo.benchmarks.throughput [--model FOLDER] [--cases 24] [--rounds 1] [--json FILE]

Whole commands in fresh processes without mirroring, in the order given and then backwards; the labels are compared.
The network is the U-Net of the demo model without its head, an ordinary model of nnU-Net, on a grid of 6 mm, as in
models that find organs for other models.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from nnturbo.engine import Engine
from nnturbo.training.phantoms.phantom import write_dataset

from .report import Run, run_measured, write_report
from .task_models import ABDOMEN_SETTINGS, DEMO_MODEL, ordinary_model

SEED = 20261123
ONE_BY_ONE = """
import sys
from pathlib import Path
from nnturbo.engine import Engine

model, scans, output = map(Path, sys.argv[1:])
engine = Engine.load(model, device="cpu", mirror=False)
output.mkdir(exist_ok=True)
for scan in sorted(scans.iterdir()):
    engine.predict(scan).save(output / scan.name.replace("_0000", ""))
"""


def main() -> None:
    """Measure, print ratios with the agreement beside them, and keep the samples."""
    parser = argparse.ArgumentParser(description="throughput on a folder")
    parser.add_argument("--model", type=Path, help="a model without a head, in place of the demo model")
    parser.add_argument("--fold", default="0")
    parser.add_argument("--cases", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=1, help="there and back: twice as many runs of each")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    tools = Path(sys.executable).parent
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        scans = folder / "scans"
        scans.mkdir()
        model = options.model or ordinary_model(DEMO_MODEL, folder / "model", spacing_mm=(6.0, 6.0, 6.0))
        phantoms = write_dataset(
            folder / "phantoms",
            counts={"test": options.cases},
            seed=SEED,
            settings=ABDOMEN_SETTINGS,
            workers=os.cpu_count() or 1,
        )
        for case in phantoms:
            case.image.rename(scans / case.image.name)
        given = ["-m", model, "-i", scans, "-device", "cpu", "--disable_tta", "--disable_progress_bar"]
        commands = {
            "nnU-Net": [tools / "nnUNetv2_predict_from_modelfolder", *given, "-f", options.fold],
            "one by one": [sys.executable, "-c", ONE_BY_ONE, model, scans],
            "nnturbo predict": [tools / "nnturbo", "predict", *given],
            "nnturbo predict --workers 2": [tools / "nnturbo", "predict", *given, "--workers", "2"],
        }
        quiet = {each: os.environ.get(each, name) for each in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
        Engine.load(model, device="cpu")  # compiles the model
        runs: dict[str, list[Run]] = {way: [] for way in commands}
        for way in [*commands, *reversed(commands)] * options.rounds:
            command = commands[way]
            out = folder / way.replace(" ", "_")
            command = [*command, out] if way == "one by one" else [*command, "-o", out]
            runs[way].append(run_measured(list(map(str, command)), environment=quiet))
            print(f"{way:28} {runs[way][-1].seconds:7.1f} s", flush=True)
        labels = {way: _labels(folder / way.replace(" ", "_")) for way in commands}
    seconds = {way: statistics.median(run.seconds for run in taken) for way, taken in runs.items()}
    voxels = sum(each.size for each in labels["one by one"].values())
    differing = {
        way: sum(int(np.count_nonzero(of[case] != labels["one by one"][case])) for case in of)
        for way, of in labels.items()
    }
    for way in commands:
        ratios = [f"{seconds[other] / seconds[way]:.2f} x {other}" for other in ("nnU-Net", "one by one")]
        print(f"{way:28} {', '.join(ratios)}, {differing[way]} of {voxels} voxels")
    write_report(options.json, {
        "benchmark": "throughput", "cases": options.cases, "median_s": seconds, "voxels": voxels,
        "voxels_differing_from_one_by_one": differing,
        "samples": {way: [asdict(run) for run in taken] for way, taken in runs.items()},
    })  # fmt: skip


def _labels(folder: Path) -> dict[str, np.ndarray]:
    return {
        path.name: sitk.GetArrayFromImage(sitk.ReadImage(str(path))) for path in sorted(folder.glob("[!.]*.nii.gz"))
    }


if __name__ == "__main__":
    main()
