"""`nnturbo benchmark`: compares the whole commands of nnU-Net and nnturbo in fresh processes.

Both have the same weights, scans, mirroring, step and device, and run in the order A B B A, which is printed before.
The time includes reading, masks and tables. The first run of each side does not count, because caches are cold. The
outputs are compared.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from nnturbo.engine import Engine
from nnturbo.engine.bundles.manifest import read_manifest
from nnturbo.engine.jobs.cases import CaseFiles, find_cases
from nnturbo.engine.model.folder import read_model
from nnturbo.training.phantoms.phantom import DEFAULT_SETTINGS, SMALL_SETTINGS, PhantomSettings, write_dataset

from .report import Run, run_measured
from .task_models import (
    ABDOMEN_SETTINGS,
    ARCHITECTURES,
    DEMO_MODEL,
    TASK_LARGEST,
    TASK_MEDIAN,
    ordinary_model,
    write_task_model,
    write_task_scan,
)

SIDES = ("stock", "nnturbo")
SEED = 20261123
GPU_MEMORY = ("gpu_peak_bytes", "gpu_byte_seconds")


# Its parameters are the flags of `nnturbo benchmark`.
def compare(
    model: Path,
    scans: Path,
    *,
    fold: str,
    bundle: Path | None = None,
    device: str = "cpu",
    mirror: bool = True,
    rounds: int = 2,
    arguments: Sequence[str] = (),
) -> dict[str, Any]:
    """Run both commands on a folder of scans.

    nnU-Net runs only the U-Net of a multi-task model, without classes; nnturbo's classes are compared with those of the
    eager float32 network on a CPU.

    Args:
        model: Model folder.
        scans: Folder of scans, or one scan.
        fold: Fold of the model.
        bundle: Bundle of the same model, for nnturbo; by default nnturbo uses the model itself.
        device: "cpu" or "cuda".
        mirror: Whether to average over mirrored views.
        rounds: Number of rounds A B B A, with two runs of each side; one more run of each side comes before.
        arguments: Flags that nnturbo gets too, such as `--workers 2`.

    Returns:
        Medians, ratios, all samples, and how far the labels agree.

    Raises:
        ModelError: Where the model cannot be used.
        RuntimeError: Where a command fails.
    """
    found = read_model(model, folds=[fold])
    ending = found.plan.file_ending
    cases = find_cases(scans, ending)
    with tempfile.TemporaryDirectory() as name:
        given = Path(name) / "scans"
        _link(cases, given, ending)
        outputs = {side: Path(name) / side for side in SIDES}
        tools = Path(sys.executable).parent
        shared = ["-i", given, "-f", fold, "-device", device, "--disable_progress_bar"]
        shared += [] if mirror else ["--disable_tta"]
        multi_task = found.plan.classification is not None
        for_stock = ordinary_model(model, Path(name) / "model") if multi_task else model
        commands = {
            "stock": [tools / "nnUNetv2_predict_from_modelfolder", "-m", for_stock, *shared],
            "nnturbo": [tools / "nnturbo", "predict", "-m", bundle or model, *shared, *arguments],
        }
        order = [*SIDES, *("stock", "nnturbo", "nnturbo", "stock") * rounds]
        print(f"{len(cases)} scans; in this order, the first of each for cold caches: {' '.join(order)}", flush=True)
        folders = {key: os.environ.get(key, name) for key in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
        runs = _run_in_turn(order, commands, outputs, folders, watch_gpu=device != "cpu")
        audit = compare_labels(outputs["stock"], outputs["nnturbo"], found.plan.labels.written, ending)
        if multi_task:
            audit |= compare_classes(outputs["nnturbo"], model, fold, mirror, cases)
        ran = json.loads((outputs["nnturbo"] / "predictions.json").read_bytes())["cases"][0]["provenance"]
    medians = {
        what: {side: statistics.median(getattr(run, what) for run in taken[1:]) for side, taken in runs.items()}
        for what in ("seconds", "cpu_seconds", "peak_bytes", *(GPU_MEMORY if device != "cpu" else ()))
    }
    return {
        "dataset": found.plan.dataset_name,
        "network": found.plan.architecture.class_name.rpartition(".")[2],
        "scans": len(cases),
        "mirroring": mirror,
        "device": device,
        "bundle": _bundle(bundle),
        "backend": f"{ran['backend']} {ran['precision']}",
        "arguments": list(arguments),
        "order": order,
        "ratio": medians["seconds"]["stock"] / medians["seconds"]["nnturbo"],
        "peak_ratio": medians["peak_bytes"]["stock"] / medians["peak_bytes"]["nnturbo"],
        "median_s": medians["seconds"],
        "median_cpu_s": medians["cpu_seconds"],
        "median_peak_bytes": medians["peak_bytes"],
        **{f"median_{what}": medians[what] for what in GPU_MEMORY if what in medians},
        **audit,
        "samples": {side: [asdict(run) for run in taken] for side, taken in runs.items()},
    }


def _link(cases: Sequence[CaseFiles], folder: Path, ending: str) -> None:
    """Make a folder with links to all channels of the cases, under nnU-Net's names."""
    folder.mkdir()
    for case in cases:
        for channel, image in enumerate(case.images):
            (folder / f"{case.name}_{channel:04d}{ending}").symlink_to(image.absolute())


def _run_in_turn(
    order: Sequence[str],
    commands: Mapping[str, Sequence[Any]],
    outputs: Mapping[str, Path],
    environment: dict[str, str],
    *,
    watch_gpu: bool,
) -> dict[str, list[Run]]:
    """Run the commands of both sides in an order, each with an empty output folder."""
    runs: dict[str, list[Run]] = {side: [] for side in SIDES}
    for side in order:
        shutil.rmtree(outputs[side], ignore_errors=True)
        command = [str(part) for part in (*commands[side], "-o", outputs[side])]
        run = run_measured(command, environment=environment, watch_gpu=watch_gpu)
        runs[side].append(run)
        print(f"{side:8} {run}", flush=True)
    return runs


def compare_labels(stock: Path, nnturbo: Path, labels: Mapping[str, tuple[int, ...]], ending: str) -> dict[str, Any]:
    """Compare the segmentations of two folders.

    Returns:
        `voxels`, `voxels_differing`, and `dice` by label or region over the voxels of all scans; None where neither
        side has any.

    Raises:
        RuntimeError: Where the folders do not hold the same scans, or grids differ.
    """
    names = [sorted(path.name for path in folder.glob(f"[!.]*{ending}")) for folder in (stock, nnturbo)]
    if names[0] != names[1] or not names[0]:
        raise RuntimeError(f"both sides must give the same segmentations, got {names[0]} and {names[1]}")
    voxels = differing = 0
    sizes = {name: [0, 0] for name in labels}  # voxels in the two masks together, and voxels in both
    for name in names[0]:
        images = [sitk.ReadImage(str(folder / name)) for folder in (stock, nnturbo)]
        one, other = (sitk.GetArrayFromImage(image) for image in images)
        grids = [[*image.GetSize(), *image.GetSpacing(), *image.GetOrigin(), *image.GetDirection()] for image in images]
        if len(grids[0]) != len(grids[1]) or not np.allclose(*grids, atol=1e-3):
            raise RuntimeError(f"{name}: both sides must be on the same grid, got {grids[0]} and {grids[1]}")
        voxels += one.size
        differing += int(np.count_nonzero(one != other))
        for label, counts in sizes.items():
            masks = [np.isin(array, labels[label]) for array in (one, other)]
            counts[0] += sum(int(np.count_nonzero(mask)) for mask in masks)
            counts[1] += int(np.count_nonzero(masks[0] & masks[1]))
    dice = {label: 2 * common / both if both else None for label, (both, common) in sizes.items()}
    return {"voxels": voxels, "voxels_differing": differing, "dice": dice}


def compare_classes(answered: Path, model: Path, fold: str, mirror: bool, cases: Sequence[CaseFiles]) -> dict[str, Any]:
    """Compare the classes that nnturbo wrote with those of the eager float32 network.

    Returns:
        `classes` compared, `classes_differing`, and the greatest `probability_difference` of any class.
    """
    written = {case["name"]: case for case in json.loads((answered / "predictions.json").read_bytes())["cases"]}
    reference = Engine.load(model, folds=[fold], backend="torch", precision="fp32", device="cpu", mirror=mirror)
    differing, furthest = 0, 0.0
    for case in cases:
        expected, answer = reference.predict(case.images).classification, written[case.name]["classification"]
        assert expected is not None  # a multi-task model's
        differing += expected.label != answer["label"]
        pairs = zip(expected.probabilities, answer["probabilities"].values(), strict=True)
        furthest = max(furthest, *(abs(one - other) for one, other in pairs))
    return {"classes": len(cases), "classes_differing": differing, "probability_difference": furthest}


def workloads(folder: Path, *, quick: bool) -> Iterator[tuple[str, Path, Path, bool]]:
    """Write models and scans that need no other data, one after the other.

    PlainConvUNet and ResEnc M have the sizes that nnU-Net plans for the pancreas task, and random weights: their speed
    is that of trained ones, and their agreement says nothing. The task's median scan is one tile, its largest
    twelve.

    Args:
        folder: Where to write.
        quick: Whether to give only the first one, which takes minutes.

    Yields:
        A description, the model's folder, the scans' folder, and whether to mirror.
    """
    yield "demo model, 5 small phantoms", DEMO_MODEL, _phantoms(folder / "small", 5, SMALL_SETTINGS), False
    if quick:
        return
    task = _phantoms(folder / "task", 20, DEFAULT_SETTINGS)
    yield "demo model, 20 phantoms of the pancreas task", DEMO_MODEL, task, True
    abdomen = _phantoms(folder / "abdomen", 1, ABDOMEN_SETTINGS)
    yield "demo model, a whole abdomen", DEMO_MODEL, abdomen, False
    models = {network: write_task_model(folder / network, network) for network in ARCHITECTURES}
    median, largest = folder / "median", folder / "largest"
    for scans, shape in ((median, TASK_MEDIAN), (largest, TASK_LARGEST)):
        scans.mkdir()
        write_task_scan(scans / "scan_0000.nii.gz", shape)
    for network, model in models.items():
        yield f"{network}, one tile", model, median, True
    yield "PlainConvUNet, twelve tiles", models["PlainConvUNet"], largest, False


def _phantoms(folder: Path, count: int, settings: PhantomSettings) -> Path:
    """Write scans alone into a folder."""
    cases = write_dataset(folder / "data", counts={"test": count}, seed=SEED, settings=settings)
    return cases[0].image.parent


def _bundle(folder: Path | None) -> str | None:
    """Backend and precision of a bundle, such as "openvino fp32"; None if nnturbo uses the model itself."""
    if folder is None:
        return None
    manifest = read_manifest(folder)
    return f"{manifest.backend} {manifest.precision}"
