r"""Runs all checks that need a GPU: tests, kernels, backends, the whole path against nnU-Net, memory.

    python benchmarks/gpu.py [--out FILE.json] [--minutes 9]

It runs from a checkout, with nnturbo installed or not, and without a network. Parts whose packages are missing are
named and left out. A failure is recorded, and the other parts run. Parts for which there is no time left are named too.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
ROUNDS = 20
TILE = (64, 128, 192)
MATRIX_SIDE = 8192


class Bench:
    """Times calls on a device, and collects the results."""

    def __init__(self, device: torch.device, minutes: float, out: Path) -> None:
        self.device = device
        self.found: dict[str, Any] = {"benchmark": "gpu", "left_out": {}, "failed": {}}
        self._out = out
        self._deadline = time.monotonic() + 60 * minutes

    def part(self, name: str, run: Callable[[], Any], needs: tuple[str, ...] = ()) -> None:
        """Run one part, unless something is missing or there is no time left; a failure does not stop the rest."""
        missing = [package for package in needs if importlib.util.find_spec(package) is None]
        if missing or self.is_late():
            why = f"{', '.join(missing)} not installed" if missing else "no time left"
            self.found["left_out"][name] = why
            print(f"{name}: left out, {why}", flush=True)
            self.write()
            return
        start = time.monotonic()
        try:
            self.found[name] = run()
        except Exception as error:
            self.found["failed"][name] = f"{type(error).__name__}: {error}"[:2000]
            traceback.print_exc()
        print(f"{name}: {time.monotonic() - start:.1f} s", flush=True)
        self.write()

    def is_late(self) -> bool:
        """Whether there is no time left to begin another part."""
        return time.monotonic() > self._deadline

    def write(self) -> None:
        """Write the results so far, so that they are kept if the time runs out."""
        from nnturbo.benchmarks.report import write_report

        write_report(self._out, self.found)

    def seconds(self, run: Callable[[], Any], rounds: int = ROUNDS) -> float:
        """Median time of a call on the device, after two warm-up calls; on a CPU, to test the script, of one call."""
        taken = []
        warm_up, rounds = (2, rounds) if self.device.type == "cuda" else (0, 1)
        for _ in range(warm_up + rounds):
            self._wait()
            start = time.perf_counter()
            run()
            self._wait()
            taken.append(time.perf_counter() - start)
        return statistics.median(taken[warm_up:])

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def peaks(bench: Bench, size: int) -> dict[str, float]:
    """Measure the device's peaks: bytes copied per second (read and written), and half-precision products."""
    block = torch.empty(size, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(block)
    dtype = torch.float16 if bench.device.type == "cuda" else torch.float32
    side = MATRIX_SIDE if bench.device.type == "cuda" else 256
    matrix = torch.randn(side, side, device=bench.device, dtype=dtype)
    return {
        "copy_gb_per_s": 2 * size / bench.seconds(lambda: target.copy_(block)) / 1e9,
        "matmul_tflop_per_s": 2 * side**3 / bench.seconds(lambda: matrix @ matrix) / 1e12,
    }


def kernels(bench: Bench, tile: tuple[int, int, int], copy_gb_per_s: float) -> list[dict[str, Any]]:
    """Time each kernel: bytes that it must move per second, as a share of a plain copy; and its torch twin."""
    from nnturbo.kernels import device as fast
    from nnturbo.kernels import reference
    from nnturbo.kernels.loader import has_cupy

    fast = fast if bench.device.type == "cuda" and has_cupy() else reference
    rows = []
    for name, dtype, moved, run in kernel_calls(bench.device, tile):
        seconds, twin = (bench.seconds(lambda of=of, run=run: run(of)) for of in (fast, reference))
        rate = moved / seconds / 1e9
        rows.append({
            "kernel": name, "type": str(dtype).removeprefix("torch."), "bytes": moved, "seconds": seconds,
            "gb_per_s": rate, "of_copy": rate / copy_gb_per_s, "twin_seconds": twin,
        })  # fmt: skip
        print(
            f"  {name:16} {rate:8.0f} GB/s, {rate / copy_gb_per_s:4.0%} of a copy, twin {twin / seconds:.1f} x slower"
        )
    return rows


def kernel_calls(
    device: torch.device, tile: tuple[int, int, int]
) -> Iterator[tuple[str, torch.dtype, int, Callable[[Any], Any]]]:
    """Yield name, type, bytes that have to be moved, and a call on real sizes, of every kernel."""
    from nnturbo.engine.model.mirroring import mirror_views
    from nnturbo.engine.pipeline.resampling import spline_operator

    views, classes, voxels = mirror_views((0, 1, 2)), 3, math.prod(tile)
    half = torch.float16
    volume = torch.randn(1, *(2 * n for n in tile), device=device)
    batch = torch.empty(len(views), 1, *tile, dtype=half, device=device)
    yield (
        "gather_tiles",
        half,
        voxels * (4 + 2 * len(views)),
        lambda of: of.gather_tiles(volume, (3, 5, 7), tile, views, batch),
    )
    logits = torch.randn(len(views), classes, *tile, device=device).to(half)
    weights = tuple(torch.rand(n, device=device) for n in tile)
    sums = torch.zeros(classes, *(2 * n for n in tile), device=device)
    place = sums[:, 3 : 3 + tile[0], 5 : 5 + tile[1], 7 : 7 + tile[2]]
    yield (
        "accumulate_views",
        half,
        classes * voxels * (2 * len(views) + 8),
        lambda of: of.accumulate_views(logits, views, weights, place),
    )
    scan = (200 * torch.randn(1, *tile, device=device)).to(torch.int16)
    for axis, name in ((-3, "z"), (-2, "y"), (-1, "x")):
        operator = spline_operator(tile[axis], round(1.1 * tile[axis]), 3)
        data = scan if axis == -3 else scan.float()
        moved = voxels * data.element_size() + 4 * voxels // tile[axis] * operator.n_out
        options = {"normalization": ((-56.0, 180.0, 74.06, 44.36),)} if axis == -3 else {}
        yield (
            f"resample_axis {name}",
            data.dtype,
            moved,
            lambda of, o=operator, a=axis, d=data, k=options: of.resample_axis(d, o, a, **k),
        )
    grid = tuple(spline_operator(n, round(0.9 * n), 1) for n in tile)
    shape = tuple(operator.n_out for operator in grid)
    out = torch.empty(shape, dtype=torch.uint8, device=device)
    one = torch.randn(classes, *tile, device=device)
    yield (
        "resample_labels",
        torch.uint8,
        4 * classes * voxels + math.prod(shape),
        lambda of: of.resample_labels(one, grid, out, rows=(0, shape[0])),
    )


def networks(
    bench: Bench, models: dict[str, Path], wanted: Sequence[str], folder: Path, matmul_tflop_per_s: float
) -> list[dict[str, Any]]:
    """Time every backend on all mirror views of one tile, against nnU-Net's eager network under autocast."""
    from nnturbo.engine.backends.choose import backends, choose_precision
    from nnturbo.engine.backends.torch import DTYPES
    from nnturbo.engine.bundles.manifest import compile_model, describe_machine, new_bundle, plan_bundle
    from nnturbo.engine.model.folder import read_model
    from nnturbo.engine.model.folds import InferenceNetwork
    from nnturbo.engine.model.mirroring import mirror_views
    from nnturbo.engine.model.network import build_network
    from torch.utils.flop_counter import FlopCounterMode

    rows: list[dict[str, Any]] = bench.found.setdefault("networks", [])
    precision = choose_precision("auto", bench.device)
    for name, path in models.items():
        model = read_model(path)
        views = len(mirror_views(model.mirror_axes))
        tiles = torch.randn(views, model.plan.input_channels, *model.plan.patch_size, device=bench.device)
        stock = InferenceNetwork([build_network(model.plan, weights) for weights in model.weights]).to(bench.device)

        def eager(network: InferenceNetwork = stock, batch: torch.Tensor = tiles) -> Any:
            with (
                torch.inference_mode(),
                torch.autocast(batch.device.type, DTYPES[precision], enabled=precision != "fp32"),
            ):
                return network(batch)

        counter = FlopCounterMode(display=False)
        with counter:
            expected = eager()[0].float()
        flops = counter.get_total_flops()
        reference = bench.seconds(eager, 5)
        ways: dict[str, Callable[[], Any]] = {"nnU-Net, eager": eager}
        for backend_name, backend in backends().items():
            if wanted and backend_name not in wanted:
                continue
            bench.write()
            if bench.is_late():
                rows.append({"model": name, "way": backend_name, "left_out": "no time left"})
                continue
            reason = backend.unavailable(bench.device, precision)
            if reason is not None:
                rows.append({"model": name, "way": backend_name, "left_out": reason})
                continue
            try:
                bundle = folder / f"{name}-{backend_name}"
                start = time.perf_counter()
                with new_bundle(bundle) as aside:
                    manifest = plan_bundle(model, {}, backend, precision, describe_machine(bench.device))
                    compile_model(model, manifest, backend, tiles[:2], aside)
                build_s = time.perf_counter() - start
                runner = backend.load(model, bundle, bench.device, precision)
                ways[backend_name] = lambda run=runner, batch=tiles: run(batch)
                differing = float((runner(tiles).seg_logits.argmax(1) != expected.argmax(1)).float().mean())
                rows.append({"model": name, "way": backend_name, "build_s": build_s, "voxels_differing": differing})
            except Exception as error:
                rows.append({"model": name, "way": backend_name, "failed": f"{type(error).__name__}: {error}"[:500]})
                print(f"  {name} {backend_name}: {error}", flush=True)
                continue
            seconds = bench.seconds(ways[backend_name], 5)
            rows[-1] |= {
                "seconds": seconds, "ratio": reference / seconds, "tflop_per_s": flops / seconds / 1e12,
                "of_matmul": flops / seconds / 1e12 / matmul_tflop_per_s,
            }  # fmt: skip
            print(f"  {name} {backend_name}: {seconds * 1e3:.1f} ms, {reference / seconds:.2f} x eager", flush=True)
        rows.append({
            "model": name, "way": "nnU-Net, eager", "seconds": reference, "precision": precision, "views": views,
            "flops": flops, "of_matmul": flops / reference / 1e12 / matmul_tflop_per_s,
        })  # fmt: skip
    return rows


def model_folders(folder: Path, names: list[str]) -> dict[str, Path]:
    """Models of the task's size with random weights, and the demo model."""
    from nnturbo.benchmarks.task_models import write_task_model

    made = {name: write_task_model(folder / name, name) for name in names}
    return made | {"demo_model": ROOT / "examples" / "demo_model"}


def whole_path(bench: Bench, folder: Path, patch: Sequence[int], shapes: Sequence[tuple[int, ...]]) -> list[Any]:
    """Time the path from scan to labels in one process, and nnU-Net's own predictor if it is installed.

    Same weights, mirroring, step, device and precision. The weights are random: labels differ more than a trained
    model's would.
    """
    import numpy as np
    from nnturbo.benchmarks.stages import smooth_field
    from nnturbo.benchmarks.task_models import SPACING_MM, write_task_model
    from nnturbo.engine import Engine, Volume

    model = write_task_model(folder / "whole-path", "PlainConvUNet", patch)
    engine = Engine.load(model, device=str(bench.device), backend="torch", mirror=bench.device.type == "cuda")
    predictor = stock_predictor(bench, model)
    rows: list[Any] = []
    for shape in shapes:
        scan = (50 + 60 * smooth_field((1, *shape), 0)).to(torch.int16).numpy()
        # Thick slices, as scanners make them, so that there is something to resample.
        spacing = (1.25 * SPACING_MM[0], *SPACING_MM[1:])
        volume = Volume.from_array(scan, spacing)
        labels: dict[str, Any] = {}

        def run_ours(of: Any = volume, into: dict[str, Any] = labels) -> None:
            into["nnturbo"] = engine.predict(of)

        def run_many(of: Any = volume) -> None:
            list(engine.predict_many([of] * 4))

        def run_stock(of: Any = scan, at: Any = spacing, into: dict[str, Any] = labels) -> None:
            properties = {"spacing": list(at)}
            into["stock"] = predictor.predict_single_npy_array(of.astype(np.float32), properties, None, None, False)

        row: dict[str, Any] = {"scan": shape, "nnturbo_s": bench.seconds(run_ours, 3)}
        row["nnturbo_of_many_s"] = bench.seconds(run_many, 1) / 4
        row["timings_ms"] = dict(labels["nnturbo"].timings)
        if predictor is not None:
            row["stock_s"] = bench.seconds(run_stock, 1)
            row["ratio"] = row["stock_s"] / row["nnturbo_s"]
            row["voxels_differing"] = int((labels["nnturbo"].segmentation != labels["stock"]).sum())
            row["voxels"] = labels["stock"].size
        rows.append(row)
        print(f"  {row}", flush=True)
    return rows


def stock_predictor(bench: Bench, model: Path) -> Any:
    """nnU-Net's predictor for a model, or None where nnU-Net is not installed."""
    if importlib.util.find_spec("nnunetv2") is None:
        bench.found["left_out"]["nnU-Net beside the whole path"] = "nnunetv2 not installed"
        return None
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(
        device=bench.device,
        use_mirroring=bench.device.type == "cuda",
        perform_everything_on_device=bench.device.type == "cuda",
        allow_tqdm=False,
    )
    predictor.initialize_from_trained_model_folder(str(model), (0,), "checkpoint_final.pth")
    return predictor


def memory(bench: Bench, rows: int) -> dict[str, Any]:
    """Greatest memory of the device while a long scan is predicted, for two lengths, one tile wide."""
    import numpy as np
    from nnturbo.engine import Engine, Volume

    engine = Engine.load(ROOT / "examples" / "demo_model", device=str(bench.device), mirror=bench.device.type == "cuda")
    depth, *wide = engine.model.plan.patch_size_3d
    found = {}
    # The first run compiles kernels and tries algorithms, which takes memory too.
    for length in (2 * depth, 2 * depth, rows * depth):
        array = np.random.default_rng(0).integers(-100, 300, (length, *wide), dtype=np.int16)
        if bench.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(bench.device)
        engine.predict(Volume.from_array(array, engine.model.plan.spacing_3d(1.0)))
        peak = torch.cuda.max_memory_allocated(bench.device) if bench.device.type == "cuda" else None
        found[str(length)] = {"peak_bytes": peak, "voxels": array.size}
    return found


def tests() -> dict[str, Any]:
    """Run the tests that need a GPU."""
    done = subprocess.run(
        # Other tests may need packages that are not installed.
        [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--no-header", "--continue-on-collection-errors", "tests"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    print(done.stdout[-3000:], done.stderr[-1000:], flush=True)
    counted = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped)", done.stdout[-400:])}
    if not counted.get("passed") or counted.get("failed"):
        raise RuntimeError(f"{counted or 'no test'} of those that need a GPU: {done.stdout[-1500:]}")
    return {**counted, "printed": done.stdout[-6000:]}


def tensorrt_rtx() -> dict[str, Any]:
    """Whether TensorRT-RTX runs on this GPU, and what it says if it does not."""
    from nnturbo.engine.backends.tensorrt import TensorRtBackend

    return {"unavailable": TensorRtBackend().unavailable(torch.device("cuda", 0), "fp16")}


def main(arguments: list[str] | None = None) -> int:
    """Run all of it, and write one JSON."""
    parser = argparse.ArgumentParser(description="everything that needs a GPU")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu.json")
    parser.add_argument("--minutes", type=float, default=7, help="nothing new begins after these")
    parser.add_argument("--backends", nargs="*", default=(), help="of these alone; by default every one that runs")
    parser.add_argument("--device", default="cuda", help="cpu tries the script itself, on small sizes")
    options = parser.parse_args(arguments)
    on_gpu = options.device != "cpu"
    if on_gpu and not torch.cuda.is_available():
        print("no CUDA device is here: nothing was measured", file=sys.stderr)
        return 2
    _find_nnturbo()

    bench = Bench(torch.device("cuda", 0) if on_gpu else torch.device("cpu"), options.minutes, options.out)
    tile = TILE if on_gpu else (8, 16, 24)
    names = ["PlainConvUNet", "ResidualEncoderUNet"] if on_gpu else []
    bench.found["device"] = torch.cuda.get_device_name(0) if on_gpu else "cpu"
    networks_need = ("dynamic_network_architectures",)
    patch = (64, 128, 192) if on_gpu else (16, 64, 64)
    shapes = [(60, 118, 180), (160, 256, 256)] if on_gpu else [(12, 64, 60)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bench.part("peaks", lambda: peaks(bench, 2**30 if on_gpu else 2**20))
        best = bench.found.get("peaks", {"copy_gb_per_s": math.nan, "matmul_tflop_per_s": math.nan})
        bench.part("kernels", lambda: kernels(bench, tile, best["copy_gb_per_s"]))
        if on_gpu:
            bench.part("tests", tests, ("pytest",))
            bench.part("tensorrt_rtx", tensorrt_rtx, ("tensorrt_rtx", *networks_need))
        bench.part("memory", lambda: memory(bench, 8 if on_gpu else 3), networks_need)
        bench.part("whole_path", lambda: whole_path(bench, folder, patch, shapes), networks_need)
        bench.part(
            "networks",
            lambda: networks(bench, model_folders(folder, names), options.backends, folder, best["matmul_tflop_per_s"]),
            networks_need,
        )
    print(json.dumps({"failed": bench.found["failed"], "left_out": bench.found["left_out"]}, indent=1))
    return 1 if bench.found["failed"] else 0


def _find_nnturbo() -> None:
    """Make this checkout importable where it is not installed: `nnturbo` is the name of its folder."""
    if importlib.util.find_spec("nnturbo") is not None:
        return
    site = tempfile.mkdtemp(prefix="nnturbo-site-")
    (Path(site) / "nnturbo").symlink_to(ROOT)
    sys.path.insert(0, site)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [site, os.environ.get("PYTHONPATH")]))


if __name__ == "__main__":
    sys.exit(main())
