r"""Times every backend on one tile, against nnU-Net's eager fp32 network in the same process.

    python -m nnturbo.benchmarks.backends [--models PlainConvUNet ...] [--backends native ...] [--demo FOLDER] \
        [--rounds 5] [--json FILE]

Bundles are built first; then each round is one run of each. Load time and memory come from a separate process for each
bundle, which loads it and runs one tile.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from nnturbo.engine.backends.choose import backends
from nnturbo.engine.backends.openvino import OpenVinoBackend
from nnturbo.engine.backends.torch import TorchRunner
from nnturbo.engine.bundles.manifest import (
    bundle_model,
    compile_model,
    describe_machine,
    plan_bundle,
    read_manifest,
    source_hashes,
)
from nnturbo.engine.errors import EngineError
from nnturbo.engine.files import new_folder
from nnturbo.engine.model.folder import Model, read_model
from nnturbo.engine.model.folds import InferenceNetwork
from nnturbo.engine.model.network import build_network
from nnturbo.engine.options import PRECISIONS
from torch import Tensor

from .report import machine, python, run_measured, write_report
from .stages import smooth_field
from .task_models import ARCHITECTURES, DATASET, FLAT, write_task_model

CPU = torch.device("cpu")
STOCK = "nnU-Net, eager fp32"
ALONE = """
import sys, time, json
start = time.perf_counter()
import torch
from pathlib import Path
from nnturbo.engine.backends.choose import backends
from nnturbo.engine.bundles.manifest import bundle_model, read_manifest
imported = time.perf_counter()
folder = Path(sys.argv[1])
manifest = read_manifest(folder)
model = bundle_model(manifest, folder)
runner = backends()[manifest.backend].load(model, folder, torch.device("cpu"), manifest.precision)
loaded = time.perf_counter()
runner(torch.zeros(1, model.plan.input_channels, *model.plan.patch_size))
answered = time.perf_counter()
answer = {"load_s": loaded - imported, "first_s": answered - loaded}
print(json.dumps(answer), file=open(sys.argv[2], "w"))
"""


def ways(names: list[str], precisions: list[str]) -> list[tuple[str, str]]:
    """Those backends and precisions that run on this CPU."""
    return [
        (name, precision)
        for name, backend in backends().items()
        if name in names
        for precision in precisions
        if backend.unavailable(CPU, precision) is None
    ]


def tile_of(model: Model) -> Tensor:
    """One tile (1, C, *patch) like a normalised scan: smooth, with noise."""
    channels, *patch = model.plan.input_channels, *model.plan.patch_size
    shape = (channels, *[1] * (3 - len(patch)), *patch)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return (smooth_field(shape, 0) + 0.2 * noise).view(1, channels, *patch)


def build(model: Model, hashes: dict[str, str], name: str, precision: str, tile: Tensor, folder: Path) -> float:
    """Write a bundle; returns seconds."""
    backend = backends()[name]
    start = time.perf_counter()
    if precision == "int8" and model.plan.dataset_name == DATASET:
        backend = OpenVinoBackend(floor=0)  # labels of random weights are noise, so int8 uses the first recipe
    with new_folder(folder) as aside:
        tiles = torch.cat([tile, tile.flip(-1)])
        compile_model(
            model, plan_bundle(model, hashes, backend, precision, describe_machine(CPU)), backend, tiles, aside
        )
    return time.perf_counter() - start


def load(folder: Path) -> Callable[[Tensor], Any]:
    """Open a bundle's runner."""
    manifest = read_manifest(folder)
    return backends()[manifest.backend].load(bundle_model(manifest, folder), folder, CPU, manifest.precision)


def eager(model: Model) -> TorchRunner:
    """nnU-Net's own way to run the network."""
    return TorchRunner(InferenceNetwork([build_network(model.plan, weights) for weights in model.weights]), CPU, "fp32")


def alone(folder: Path) -> dict[str, float]:
    """Load and run a bundle in a separate process."""
    answer = folder.parent / "alone.json"
    run = run_measured(python("-c", ALONE, str(folder), str(answer)))
    return {**json.loads(answer.read_bytes()), "peak_bytes": run.peak_bytes}


def measure(name: str, model: Model, rounds: int, chosen: list[tuple[str, str]], folder: Path) -> list[dict[str, Any]]:
    """Several backends and precisions on one model."""
    tile, hashes = tile_of(model), source_hashes(model, "checkpoint_final.pth")
    runners: dict[str, Callable[[Tensor], Any]] = {STOCK: eager(model)}
    rows: dict[str, dict[str, Any]] = {STOCK: {"model": name, "way": STOCK}}
    for backend, precision in chosen:
        way, bundle = f"{backend} {precision}", folder / f"{backend}-{precision}"
        try:
            row: dict[str, Any] = {"build_s": build(model, hashes, backend, precision, tile, bundle)}
            row |= alone(bundle)
            runners[way] = load(bundle)
        except EngineError as error:
            print(f"{name} {way}: {error}")
            continue
        row["file_bytes"] = sum(file.stat().st_size for file in bundle.iterdir())
        rows[way] = {"model": name, "way": way, **row}
        print(f"{name} {way}: built in {row['build_s']:.1f} s", flush=True)
    expected = runners[STOCK](tile).seg_logits.argmax(1)
    samples: dict[str, list[float]] = {way: [] for way in runners}
    for way, runner in runners.items():
        differing = int((runner(tile).seg_logits.argmax(1) != expected).sum())
        rows[way] |= {"voxels_differing": differing, "voxels": expected.numel()}
    for _ in range(rounds):
        for way, runner in runners.items():
            start = time.perf_counter()
            runner(tile)
            samples[way].append(time.perf_counter() - start)
    reference = statistics.median(samples[STOCK])
    for way, taken in samples.items():
        median = statistics.median(taken)
        rows[way] |= {"samples_s": taken, "median_s": median, "ratio": reference / median}
        print(f"{name:20} {way:22} {median:7.3f} s  {reference / median:5.2f} x", flush=True)
    return list(rows.values())


def main() -> None:
    """Measure, print, and keep the samples."""
    parser = argparse.ArgumentParser(description="backends")
    parser.add_argument("--models", nargs="*", choices=[*ARCHITECTURES, FLAT], default=[*ARCHITECTURES, FLAT])
    parser.add_argument("--backends", nargs="+", choices=list(backends()), default=list(backends()))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=["fp32", "bf16", "int16", "int8"])
    parser.add_argument("--demo", type=Path, help="a trained model, measured too")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    stored = json.loads(options.json.read_bytes()) if options.json and options.json.exists() else {"rows": []}
    if stored.get("machine", machine()["machine"]) != machine()["machine"]:
        parser.error(f"{options.json} holds what another machine measured: give another file")
    kept = stored["rows"]  # results of other models stay
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folders = {network: write_task_model(folder / network, network) for network in options.models}
        if options.demo:
            folders[options.demo.name] = options.demo
        for network, model in folders.items():
            bundles = folder / f"bundles-{network}"
            chosen = ways(options.backends, options.precisions)
            rows = measure(network, read_model(model), options.rounds, chosen, bundles)
            rows = [{**row, "commit": machine()["commit"]} for row in rows]
            places = [index for index, row in enumerate(kept) if row["model"] == network] or [len(kept)]
            others = [row for row in kept if row["model"] != network]
            kept = [*others[: places[0]], *rows, *others[places[0] :]]
            write_report(options.json, {"benchmark": "backends", "threads": torch.get_num_threads(), "rows": kept})


if __name__ == "__main__":
    main()
