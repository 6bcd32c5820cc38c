"""Parts of `gpu.py` about whole cases: labels, time and memory, with nnU-Net's own predictor beside them."""

from __future__ import annotations

import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnturbo.engine import Engine, EngineError, EngineOptions, Prediction, Volume

from .gpu_device import Bench
from .stages import smooth_field, stock_functions
from .task_models import (
    CLASSES,
    DEMO_MODEL,
    SPACING_MM,
    ordinary_model,
    plans_json,
    write_task_model,
    write_task_scan,
)

THICK_SPACING_MM = (1.25 * SPACING_MM[0], *SPACING_MM[1:])
"""As thick as a scanner's slices are, so that there is something to resample."""

CT_SPACING_MM = (1.0, 0.75, 0.75)
STOCK_PROCESSES = 3
"""nnU-Net's default, for reading as for writing."""

PHANTOMS = 1

MORE_VIEWS = 4
"""That go through the network at once where time counts more than memory; more gain nothing."""


def stock_predictor(bench: Bench, model: Path, *, mirror: bool, fold: int | str = 0) -> Any:
    """nnU-Net's predictor for a fold of a model, with its own settings but for mirroring.

    Raises:
        ImportError: Where nnU-Net is not installed, or lacks something.
    """
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(
        device=bench.device, use_mirroring=mirror, perform_everything_on_device=bench.on_gpu, allow_tqdm=False
    )
    predictor.initialize_from_trained_model_folder(str(model), (fold,), "checkpoint_final.pth")
    return predictor


def beside(row: dict[str, Any], run: Callable[[], dict[str, Any]]) -> None:
    """Add what nnU-Net gives; where it fails, why: it is the yardstick, not what is measured."""
    try:
        row |= run()
    except Exception as error:
        traceback.print_exc()
        row["stock_failed"] = f"{type(error).__name__}: {error}"[:500]


def whole(bench: Bench) -> list[dict[str, Any]]:
    """Scan to labels in one process, the same weights, mirroring, step, device and precision as nnU-Net.

    The weights are random: labels differ more than a trained model's would.
    """
    with tempfile.TemporaryDirectory() as folder:
        model = write_task_model(Path(folder) / "model", "PlainConvUNet", bench.sizes.patch)
        rows, labels = [], []
        for shape in bench.sizes.scans:
            rows.append(_case(bench, model, shape, THICK_SPACING_MM, labels))
            rows[-1]["more_views"] = _case(bench, model, shape, THICK_SPACING_MM, [], views_per_call=MORE_VIEWS)
            bench.keep(rows)
        stock: list[Any] = []
        for row, found in zip(rows, labels, strict=True):
            beside(row, lambda row=row, found=found: _stock_case(bench, stock, model, row, found))
            bench.keep(rows)
            print("  ", row, flush=True)
    return rows


def _scan(shape: Sequence[int]) -> np.ndarray:
    return (50 + 60 * smooth_field((1, *shape), 0)).to(torch.int16).numpy()


def _case(
    bench: Bench, model: Path, shape: Sequence[int], spacing: Sequence[float], labels: list[np.ndarray],
    rounds: int = 3, views_per_call: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Measure a scan with an engine of its own, and append its labels."""
    options = EngineOptions(views_per_call=views_per_call)
    engine = Engine.load(model, device=str(bench.device), backend="torch", mirror=bench.on_gpu, options=options)
    small, volume = (Volume.from_array(_scan(of), tuple(spacing)) for of in (bench.sizes.scans[0], shape))
    for _ in range(3):  # what is searched, compiled and recorded first; the network sees patches alone
        engine.predict(small)
    predictions: list[Prediction] = []
    held = bench.held_bytes(lambda: predictions.append(engine.predict(volume)))
    labels.append(predictions[0].segmentation)
    seconds = bench.seconds(lambda: predictions.append(engine.predict(volume)), rounds, 0)
    return {
        "scan": tuple(shape), "nnturbo_s": seconds, "nnturbo_held_bytes": held,
        "timings_ms": dict(predictions[-1].timings),
    }  # fmt: skip


def _stock_case(bench: Bench, stock: list[Any], model: Path, row: dict[str, Any], ours: np.ndarray) -> dict[str, Any]:
    scan = _scan(row["scan"])
    if not stock:
        stock.append(stock_predictor(bench, model, mirror=bench.on_gpu))
        _stock_labels(stock[0], scan, THICK_SPACING_MM)  # what is searched first
    labels: list[np.ndarray] = []
    held = bench.held_bytes(lambda: labels.append(_stock_labels(stock[0], scan, THICK_SPACING_MM)))
    seconds = bench.seconds(lambda: _stock_labels(stock[0], scan, THICK_SPACING_MM), 1, 0)
    return {
        "stock_s": seconds, "stock_held_bytes": held, "ratio": seconds / row["nnturbo_s"],
        "voxels_differing": int((ours != labels[0]).sum()), "voxels": ours.size,
    }  # fmt: skip


def _stock_labels(predictor: Any, scan: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    properties = {"spacing": list(spacing)}
    return predictor.predict_single_npy_array(scan.astype(np.float32), properties, None, None, False)


def long(bench: Bench) -> dict[str, Any]:
    """A CT of 400 slices, and nnU-Net's network on as many voxels; see `long_on_cpu` for its other stages."""
    with tempfile.TemporaryDirectory() as folder:
        model = write_task_model(Path(folder) / "model", "PlainConvUNet", bench.sizes.patch)
        found = _case(bench, model, bench.sizes.long, CT_SPACING_MM, [], rounds=1)
        bench.keep(found)
        more = _case(bench, model, bench.sizes.long, CT_SPACING_MM, [], rounds=1, views_per_call=MORE_VIEWS)
        found["more_views"] = more
        bench.keep(found)

        def run_stock() -> dict[str, Any]:
            predictor = stock_predictor(bench, model, mirror=bench.on_gpu)
            predictor.predict_logits_from_preprocessed_data(torch.zeros(1, *bench.sizes.patch))  # searched first
            data = torch.randn(1, *_resampled(bench.sizes.long))
            start = time.perf_counter()
            held = bench.held_bytes(lambda: predictor.predict_logits_from_preprocessed_data(data).cpu())
            return {"stock_network_s": time.perf_counter() - start, "stock_held_bytes": held}

        beside(found, run_stock)
        return found


def _resampled(shape: Sequence[int]) -> list[int]:
    """Shape on the network's grid."""
    return [round(n * mm / to) for n, mm, to in zip(shape, CT_SPACING_MM, SPACING_MM, strict=True)]


def long_on_cpu(bench: Bench) -> dict[str, Any]:
    """nnU-Net's preprocessing and export of a CT of 400 slices, which run on a CPU, beside what runs on the GPU."""
    prepare, finish = stock_functions(CLASSES, plans_json("PlainConvUNet", bench.sizes.patch))
    scan = _scan(bench.sizes.long).astype(np.float32)
    start = time.perf_counter()
    data, properties = prepare(scan, CT_SPACING_MM)
    found = {"preprocessing_s": time.perf_counter() - start, "grid": list(data.shape[1:])}
    bench.keep(found)
    logits = torch.randn(CLASSES, *data.shape[1:]).half()
    start = time.perf_counter()
    finish(logits, properties)
    return {**found, "export_s": time.perf_counter() - start}


def many(bench: Bench) -> dict[str, Any]:
    """Cases from file to file, and how many there are per minute: `predict_many`, and nnU-Net with its processes."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = write_task_model(folder / "model", "PlainConvUNet", bench.sizes.patch)
        shape = bench.sizes.scans[0]
        scans = [
            write_task_scan(folder / f"{i:03}_0000.nii.gz", (shape[0] + i % 5, *shape[1:]), THICK_SPACING_MM)
            for i in range(bench.sizes.cases)
        ]
        engine = Engine.load(model, device=str(bench.device), backend="torch", mirror=bench.on_gpu)
        engine.predict(scans[0])  # what is searched and compiled first

        def run() -> None:
            for scan, prediction in zip(scans, engine.predict_many(scans), strict=True):
                if isinstance(prediction, EngineError):
                    raise prediction
                prediction.save(folder / f"ours_{scan.name}")

        held = bench.held_bytes(run)
        seconds = bench.seconds(run, 1, 0)
        found: dict[str, Any] = {
            "cases": len(scans), "nnturbo_s": seconds, "nnturbo_per_minute": 60 * len(scans) / seconds,
            "nnturbo_held_bytes": held,
        }  # fmt: skip
        bench.keep(found)

        def run_stock() -> dict[str, Any]:
            predictor = stock_predictor(bench, model, mirror=bench.on_gpu)
            _stock_labels(predictor, _scan(shape), THICK_SPACING_MM)  # what is searched first
            lists, targets = [[str(scan)] for scan in scans], [str(folder / f"stock_{i:03}") for i in range(len(scans))]
            start = time.perf_counter()
            predictor.predict_from_files(
                lists, targets, num_processes_preprocessing=STOCK_PROCESSES,
                num_processes_segmentation_export=STOCK_PROCESSES,
            )  # fmt: skip
            stock_s = time.perf_counter() - start
            return {"stock_s": stock_s, "stock_per_minute": 60 * len(scans) / stock_s, "ratio": stock_s / seconds}

        beside(found, run_stock)
        return found


def labels(bench: Bench) -> list[dict[str, Any]]:
    """Labels and classes of the demo model on phantoms: on the device in its precision, on the CPU, and nnU-Net's.

    Without mirroring, which takes eight times as long on a CPU.
    """
    from nnturbo.training.phantoms.phantom import generate_phantom

    rows: list[dict[str, Any]] = []
    device = str(bench.device)
    here, exact = (Engine.load(DEMO_MODEL, device=at, backend="torch", mirror=False) for at in (device, "cpu"))
    with tempfile.TemporaryDirectory() as folder:
        ordinary = ordinary_model(DEMO_MODEL, Path(folder) / "ordinary")
        alone = Engine.load(ordinary, device=device, backend="torch", mirror=False)
        for seed in range(PHANTOMS if bench.on_gpu else 1):
            phantom = generate_phantom(seed)
            volume = Volume.from_array(phantom.image, phantom.spacing)
            found, expected = here.predict(volume), exact.predict(volume)
            classes = [each.classification for each in (found, expected) if each.classification is not None]
            row = {
                "phantom": seed, "shape": list(volume.array.shape[1:]), "labels": here.model.plan.labels.labels,
                "against_cpu": agreement(found.segmentation, expected.segmentation),
                "classes": [each.name for each in classes], "class_logits": [list(each.logits) for each in classes],
            }  # fmt: skip
            rows.append(row)
            bench.keep(rows)

            def against_stock(volume: Volume = volume) -> dict[str, Any]:
                predictor = stock_predictor(bench, ordinary, mirror=False)
                stock = _stock_labels(predictor, volume.array, volume.spacing)
                return {"against_stock": agreement(alone.predict(volume).segmentation, stock)}

            beside(row, against_stock)
            bench.keep(rows)
            print("  ", row, flush=True)
    return rows


def trained(bench: Bench) -> dict[str, Any]:
    """Labels of a model that nnU-Net has trained, on a scan, both given: against fp32 on the CPU and nnU-Net here.

    With the model's own mirroring and step.
    """
    model, scan = bench.given
    if model is None or scan is None:
        raise ValueError("this part needs --model and --scan")
    here, exact = (Engine.load(model, folds=("all",), device=at, backend="torch") for at in (str(bench.device), "cpu"))
    labels = here.predict(scan).segmentation
    found: dict[str, Any] = {"against_cpu": agreement(labels, exact.predict(scan).segmentation)}
    bench.keep(found)

    def against_stock() -> dict[str, Any]:
        predictor = stock_predictor(bench, model, mirror=True, fold="all")
        image, properties = predictor.plans_manager.image_reader_writer_class().read_images([str(scan)])
        return {"against_stock": agreement(labels, _stock_labels(predictor, image, properties["spacing"]))}

    beside(found, against_stock)
    print("  ", found, flush=True)
    return found


def agreement(one: np.ndarray, other: np.ndarray) -> dict[str, Any]:
    """How many voxels differ, and the Dice of each label that either has."""
    dice = {}
    for label in sorted({*np.unique(one), *np.unique(other)} - {0}):
        a, b = one == label, other == label
        dice[int(label)] = float(2 * (a & b).sum() / (a.sum() + b.sum()))
    return {"voxels": one.size, "voxels_differing": int((one != other).sum()), "dice": dice}
