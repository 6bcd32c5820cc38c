"""Measures the gain of each technique on one scan, with the time of each stage, and the floor.

    python -m nnturbo.benchmarks.waterfall [-m MODEL -i SCAN] [--device cpu] [--no_mirroring] [--rounds 2] [--json FILE]

By default it runs PlainConvUNet of the pancreas task's size on a scan of one tile, mirrored. Every step runs in a fresh
process and reports the time of its stages; the order of steps alternates. The floor is the network's operations at the
measured peak of matrix products and convolutions, and the bytes that must be moved at the measured copy bandwidth.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from nnturbo.engine.backends.choose import backends
from nnturbo.engine.bundles.manifest import source_hashes
from nnturbo.engine.errors import BackendUnavailable
from nnturbo.engine.model.folder import read_model
from nnturbo.engine.model.folds import inference_network
from nnturbo.engine.model.mirroring import mirror_views
from nnturbo.engine.options import DEFAULT_CHECKPOINT
from nnturbo.engine.pipeline.preprocessing import preprocess
from nnturbo.engine.pipeline.window import SlidingWindow
from nnturbo.engine.scans.volume import read_volume
from torch.nn.functional import conv3d
from torch.utils.flop_counter import FlopCounterMode

from .backends import build, tile_of
from .report import python, run_measured, write_report
from .task_models import write_task_model, write_task_scan

COPIES = 3
"""Scans of the step that overlaps reading, computing and writing."""
SCAN_SHAPE, SCAN_SPACING_MM = (51, 109, 165), (2.5, 0.8, 0.8)
"""(z, y, x); 64 x 119 x 180 voxels of the network's grid, as the task's median, so that it is resampled both ways."""

# Both programs write the seconds of their stages. The rest of the time is "start".
STOCK = """
import json, sys, time
from pathlib import Path
answer, model, scan, out, device, mirror, operators = sys.argv[1:]
import torch
from nnunetv2.inference.export_prediction import export_prediction_from_logits
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

took = {}
def ended(stage):
    global begun
    took[stage], begun = time.perf_counter() - begun, time.perf_counter()

predictor = nnUNetPredictor(use_mirroring=mirror == "1", device=torch.device(device), allow_tqdm=False)
predictor.initialize_from_trained_model_folder(model, (0,))
plans, configuration, dataset = predictor.plans_manager, predictor.configuration_manager, predictor.dataset_json
if operators == "ours":
    from nnturbo.engine.pipeline.labels import segment
    from nnturbo.engine.model.folder import read_model
    from nnturbo.engine.pipeline.preprocessing import preprocess
    from nnturbo.engine.pipeline.timing import Timings
    from nnturbo.engine.pipeline.transfers import Transfers
    from nnturbo.engine.scans.volume import read_volume, write_segmentation
    plan = read_model(Path(model), folds=["0"]).plan
    begun = time.perf_counter()
    volume = read_volume(scan, channels=1)
    ended("read")
    case = preprocess(volume, plan, torch.device("cpu"))
    (data,) = case.planes([(0, case.shape[0])])
else:
    begun = time.perf_counter()
    data, _, properties = configuration.preprocessor_class(verbose=False).run_case(
        [scan], None, plans, configuration, dataset)
    data = torch.from_numpy(data)
ended("preprocess")
logits = predictor.predict_logits_from_preprocessed_data(data).cpu()
ended("network")
if operators == "ours":
    transfers = Transfers(torch.device("cpu"))
    labels = segment([logits.float()], case, plan.labels, timings=Timings(), transfers=transfers)[0].numpy()
    ended("labels")
    write_segmentation(out, labels, volume.geometry)
    ended("write")
else:
    export_prediction_from_logits(logits, properties, configuration, plans, dataset, out.removesuffix(".nii.gz"))
    ended("labels")
json.dump(took, open(answer, "w"))
"""
ENGINE = """
import json, sys, time
answer, model, scan, out, device, mirror, backend, views, is_loaded = sys.argv[1:]
from nnturbo.engine import Engine, EngineOptions
options = EngineOptions(views_per_call=int(views) or None)
engine = Engine.load(model, backend=backend, device=device, mirror=mirror == "1", options=options)
if is_loaded == "1":
    engine.predict(scan)
begun = time.perf_counter()
prediction = engine.predict(scan)
predicted = time.perf_counter()
prediction.save(out)
ended = time.perf_counter()
took = {stage: ms / 1000 for stage, ms in prediction.timings.items()} | {"write": ended - predicted}
json.dump(took | {"whole": ended - begun}, open(answer, "w"))
"""


class Waterfall:
    """The steps on one model and one scan, in a temporary folder."""

    def __init__(self, folder: Path, model: Path, scan: Path, device: str, mirror: bool) -> None:
        self.folder, self.scan, self.device, self.mirror = folder, scan, torch.device(device), mirror
        self.found = read_model(model, folds=["0"])
        self.models = {"model": model}
        self.left_out: dict[str, str] = {}
        self.window = SlidingWindow.of_plan(
            self.found.plan, views=mirror_views(self.found.mirror_axes) if mirror else ((),)
        )
        if self.found.plan.input_channels != 1 or self.found.plan.file_ending != ".nii.gz":
            raise ValueError(f"{model}: the steps are for models of one channel that read .nii.gz")
        views = len(self.window.views)
        self.steps: dict[str, tuple[str, ...]] = {
            "nnU-Net": ("stock", "theirs"),
            "operators": ("stock", "ours"),
            "slabs": ("engine", "model", "torch", "1", "0"),
            "mirrored batch": ("engine", "model", "torch", str(views), "0"),
        }
        ways = {
            "cpu": {
                "compiled network": ("openvino", "fp32"),
                "own kernels": ("native", "fp32"),
                "bf16": ("openvino", "bf16"),
                "int8": ("openvino", "int8"),
            },
            "cuda": {"compiled network": ("tensorrt", "fp16")},
        }[self.device.type]
        fastest = "model"
        for step, (backend, precision) in ways.items():
            if (why := backends()[backend].unavailable(self.device, precision)) is not None:
                self.left_out[step] = why
                continue
            bundle = f"{backend} {precision}"
            print(f"building {bundle}", flush=True)
            hashes = source_hashes(self.found, DEFAULT_CHECKPOINT)
            try:
                build(self.found, hashes, backend, precision, tile_of(self.found), folder / bundle)
            except BackendUnavailable as error:
                self.left_out[step] = str(error)
                continue
            self.models[bundle] = folder / bundle
            self.steps[step] = ("engine", bundle, "auto", "0", "0")
            fastest = bundle if step in ("compiled network", "own kernels") else fastest
        # These two run in nnU-Net's precision.
        self.steps["loaded model"] = ("engine", fastest, "auto", "0", "1")
        self.steps["overlap"] = ("command", fastest)
        self.samples: dict[str, list[dict[str, Any]]] = {step: [] for step in self.steps}

    def run(self, step: str) -> None:
        """Run one step once."""
        kind, *how = self.steps[step]
        answer, out = self.folder / "answer.json", self.output(step)
        of_all = [str(self.device), str(int(self.mirror))]
        quiet = {key: str(self.folder) for key in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
        if kind == "command":
            scans = self.folder / "copies"
            if not scans.exists():
                scans.mkdir()
                for index in range(COPIES):
                    (scans / f"scan{index}_0000.nii.gz").symlink_to(self.scan.absolute())
            tool, flags = Path(sys.executable).with_name("nnturbo"), [] if self.mirror else ["--disable_tta"]
            command = [tool, "predict", "-m", self.models[how[0]], "-i", scans, "-o", out.parent, "-device", of_all[0]]
            run = run_measured([str(part) for part in (*command, *flags)])
            stages, seconds = {}, run.seconds / COPIES
        else:
            code, model, rest = (STOCK, "model", how) if kind == "stock" else (ENGINE, *how[:1], how[1:])
            run = run_measured(
                python("-c", code, str(answer), str(self.models[model]), str(self.scan), str(out), *of_all, *rest),
                environment=quiet,
            )
            stages = json.loads(answer.read_bytes())
            whole = stages.pop("whole", None)
            seconds = whole if step == "loaded model" else run.seconds
            stages["start"] = seconds - sum(stages.values())
        self.samples[step].append({"seconds": seconds, "stages_s": stages, "process": asdict(run)})
        print(f"{step:18} {seconds:7.2f} s  {' '.join(f'{name} {of:.2f}' for name, of in stages.items())}", flush=True)

    def output(self, step: str) -> Path:
        """File with the labels of a step."""
        folder = self.folder / f"labels {step}"
        folder.mkdir(exist_ok=True)
        return folder / ("scan0.nii.gz" if self.steps[step][0] == "command" else "scan.nii.gz")

    def rows(self) -> list[dict[str, Any]]:
        """Medians, ratios to nnU-Net, and numbers of voxels with another label."""
        labels = {step: sitk.GetArrayFromImage(sitk.ReadImage(str(self.output(step)))) for step in self.steps}
        seconds = {step: statistics.median(run["seconds"] for run in runs) for step, runs in self.samples.items()}
        return [
            {
                "step": step,
                "median_s": seconds[step],
                "ratio": seconds["nnU-Net"] / seconds[step],
                "peak_bytes": statistics.median(run["process"]["peak_bytes"] for run in runs),
                "stages_s": {
                    stage: statistics.median(run["stages_s"][stage] for run in runs) for stage in runs[0]["stages_s"]
                },
                "voxels_differing": int(np.count_nonzero(labels[step] != labels["nnU-Net"])),
                "voxels": int(labels[step].size),
                "samples": runs,
            }
            for step, runs in self.samples.items()
        ]

    def floor(self) -> dict[str, float]:
        """Time of the network's operations and of the bytes in and out of memory, at this machine's measured peaks."""
        volume = read_volume(self.scan, channels=self.found.plan.input_channels)
        case = preprocess(volume, self.found.plan, torch.device("cpu"))
        padded = [max(n, patch) for n, patch in zip(case.shape, self.window.patch_size, strict=True)]
        forwards = math.prod(len(of) for of in self.window.positions(padded)) * len(self.window.views)
        tile = torch.empty(1, self.found.plan.input_channels, *self.found.plan.patch_size, device="meta")
        network = inference_network(self.found).to("meta")
        with FlopCounterMode(display=False) as counted, torch.no_grad():
            network(tile)
        operations = counted.get_total_flops() * forwards
        voxels, grid = math.prod(volume.array.shape[1:]), math.prod(case.shape)
        # Read the scan, write and read it on the network's grid, write and read the logits, write the labels.
        moved = (
            volume.array.nbytes + 8 * grid * case.num_channels + 8 * grid * self.found.plan.labels.num_outputs + voxels
        )
        peak, bandwidth = peak_operations(self.device), copy_bandwidth(self.device)
        return {
            "forwards": forwards,
            "operations": operations,
            "operations_per_s": peak,
            "network_s": operations / peak,
            "bytes": moved,
            "copied_bytes_per_s": bandwidth,
            "rest_s": moved / bandwidth,
        }


def peak_operations(device: torch.device) -> float:
    """Operations per second of the faster of a matrix product and a convolution.

    A multiplication and an addition are two operations. On some processors torch's library for one of them is much
    slower than its library for the other.
    """
    side, dtype = (8192, torch.float16) if device.type == "cuda" else (2048, torch.float32)
    one = torch.randn(side, side, device=device, dtype=dtype)
    channels, grid = 256, (32, 64, 64)
    values = torch.randn(1, channels, *grid, device=device, dtype=dtype).contiguous(
        memory_format=torch.channels_last_3d
    )
    kernel = torch.randn(channels, channels, 3, 3, 3, device=device, dtype=dtype)
    with torch.inference_mode():
        product = 2 * side**3 / _fastest(lambda: one @ one, device)
        convolved = 2 * kernel.numel() * math.prod(grid) / _fastest(lambda: conv3d(values, kernel, padding=1), device)
    return max(product, convolved)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written together, of the fastest of several copies of 256 MiB."""
    source = torch.ones(64 * 2**20, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _fastest(lambda: target.copy_(source), device)


def _fastest(run: Callable[[], Any], device: torch.device) -> float:
    least = math.inf
    for _ in range(10):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        least = min(least, time.perf_counter() - start)
    return least


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description="what each technique gains")
    parser.add_argument("-m", type=Path, metavar="MODEL", help="model folder with a fold 0, that nnU-Net can run")
    parser.add_argument("-i", type=Path, metavar="SCAN")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--no_mirroring", action="store_true")
    parser.add_argument("--rounds", type=int, default=2, help="through the steps, there and back in turn")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if bool(options.m) != bool(options.i):
        parser.error("give a model and a scan, -m and -i, or neither")
    with tempfile.TemporaryDirectory(prefix="nnturbo-") as name:
        folder = Path(name)
        model = options.m or write_task_model(folder / "PlainConvUNet", "PlainConvUNet")
        scan = options.i or write_task_scan(folder / "scan_0000.nii.gz", SCAN_SHAPE, SCAN_SPACING_MM)
        waterfall = Waterfall(folder, model, scan, options.device, not options.no_mirroring)
        for index in range(options.rounds):
            for step in list(waterfall.steps)[:: -1 if index % 2 else 1]:
                waterfall.run(step)
        rows, floor = waterfall.rows(), waterfall.floor()
    for row in rows:
        print(
            f"{row['step']:18} {row['median_s']:7.2f} s {row['ratio']:6.2f} x {row['peak_bytes'] / 2**30:5.1f} GiB "
            f"{row['voxels_differing']} of {row['voxels']} voxels differ"
        )
    print(
        f"floor: network {floor['network_s']:.2f} s, all else {floor['rest_s']:.3f} s; left out: {waterfall.left_out}"
    )
    write_report(options.json, {
        "benchmark": "waterfall", "device": options.device, "mirroring": waterfall.mirror,
        "dataset": waterfall.found.plan.dataset_name, "copies": COPIES, "rows": rows, "floor": floor,
        "left_out": waterfall.left_out,
    })  # fmt: skip


if __name__ == "__main__":
    main()
