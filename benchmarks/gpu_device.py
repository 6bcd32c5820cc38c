"""Parts of `gpu.py` about the device itself, and what all its parts share: where they run, sizes, and timing."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
LAUNCHES = 50
TEST_FILES = (
    "tests/kernels/test_device.py",
    "tests/engine/backends/test_channels_last.py",
    "tests/engine/test_many.py",
    "tests/engine/backends/test_tensorrt.py",
    "tests/engine/backends/test_torch_tensorrt.py",
    "tests/training/test_training_step.py",
)
PACKAGES = ("torch", "triton", "cupy-cuda13x", "cupy-cuda12x", "nnunetv2", "numpy", "scikit-image", "SimpleITK")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much is measured.

    Args:
        patch: (z, y, x) of the models with random weights, and of the kernels' tiles.
        tile: (z, y, x) on which kernels are measured too, so large that no cache holds it.
        scanned: (z, y, x) of a scan that is resampled, so large that no cache holds it.
        networks: Architectures of `task_models`.
        scans: (z, y, x) of whole cases.
        cases: How many are predicted from file to file.
        long: (z, y, x) of a long CT.
        copied_bytes: Of the copy that bandwidth is measured with.
        matrix: Side of the matrices that are multiplied.
        rotated_bytes: Of all buffers that a kernel takes in turn; more than a cache holds.
    """

    patch: tuple[int, int, int]
    tile: tuple[int, int, int]
    scanned: tuple[int, int, int]
    networks: tuple[str, ...]
    scans: tuple[tuple[int, int, int], ...]
    cases: int
    long: tuple[int, int, int]
    copied_bytes: int
    matrix: int
    rotated_bytes: int


ON_GPU = Sizes(
    patch=(64, 128, 192), tile=(128, 256, 256), scanned=(160, 512, 512),
    networks=("PlainConvUNet", "ResidualEncoderUNet"), scans=((60, 118, 180), (160, 256, 256)), cases=20,
    long=(400, 512, 512), copied_bytes=2**30, matrix=8192, rotated_bytes=256 * 2**20,
)  # fmt: skip
ON_CPU = Sizes(
    patch=(16, 32, 64), tile=(8, 16, 24), scanned=(8, 16, 32), networks=("PlainConvUNet",), scans=((12, 30, 44),),
    cases=2, long=(20, 30, 44), copied_bytes=2**20, matrix=128, rotated_bytes=2**12,
)  # fmt: skip


class Bench:
    """What a part works with.

    Args:
        device: Where it measures.
        before: What the parts before have found.
        into: Where to write what it has found so far.
        given: Model folder and scan that somebody brought, or None twice.

    Attributes:
        sizes: How much is measured.
        on_gpu: Whether the device is one; a CPU only tries the script.
    """

    def __init__(
        self,
        device: torch.device,
        before: dict[str, Any],
        into: Path,
        given: tuple[Path | None, Path | None] = (None, None),
    ) -> None:
        self.device, self.given, self._before, self._into = device, given, before, into
        self.on_gpu = device.type == "cuda"
        self.sizes = ON_GPU if self.on_gpu else ON_CPU

    def keep(self, found: Any, **more: Any) -> Any:
        """Write what was found so far, and give it back; it is kept where time runs out."""
        self._into.write_text(json.dumps({"found": found, **more}), encoding="utf-8")
        return found

    def peak(self, name: str) -> float:
        """What the first part has measured, or not a number."""
        return self._before.get("versions", {}).get(name, math.nan)

    def seconds(self, run: Callable[[], Any], rounds: int, warm_up: int = 2) -> float:
        """Median time of a call until the device is done; of one call on a CPU, which tries the script."""
        rounds, warm_up = (rounds, warm_up) if self.on_gpu else (1, 0)
        taken = []
        for _ in range(warm_up + rounds):
            self.wait()
            start = time.perf_counter()
            run()
            self.wait()
            taken.append(time.perf_counter() - start)
        return statistics.median(taken[warm_up:])

    def launch_seconds(self, calls: Sequence[Callable[[], Any]], rounds: int = 5) -> float:
        """Median time of a launch: of many in a row that take buffers in turn, by the device's own clock.

        They are replayed as a CUDA graph, because launching them from Python takes longer than they do.
        """
        if not self.on_gpu:
            return self.seconds(calls[0], 1)

        def launch() -> None:
            for index in range(LAUNCHES):
                calls[index % len(calls)]()

        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            launch()  # what is compiled or allocated once
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                launch()
            taken = []
            for _ in range(rounds):
                began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                began.record()
                graph.replay()
                ended.record()
                ended.synchronize()
                taken.append(began.elapsed_time(ended) / 1e3 / LAUNCHES)
        return statistics.median(taken)

    def wait(self) -> None:
        """Wait until the device is done."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def peak_bytes(self, run: Callable[[], Any]) -> int | None:
        """Greatest memory of tensors on the device during a call, beyond what there was before."""
        if not self.on_gpu:
            run()
            return None
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        run()
        self.wait()
        return torch.cuda.max_memory_allocated(self.device) - before

    def held_bytes(self, run: Callable[[], Any]) -> int | None:
        """Greatest memory that torch held on the device during a call, with weights, graphs and what is cached."""
        if not self.on_gpu:
            run()
            return None
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        run()
        self.wait()
        return torch.cuda.max_memory_reserved(self.device)


def run_one(
    function: tuple[str, str],
    needs: Sequence[str],
    device: str,
    into: Path,
    before: Path,
    given: tuple[Path | None, Path | None] = (None, None),
) -> int:
    """Run one part in this process and write what it found, or why it did not."""
    missing = [package for package in needs if importlib.util.find_spec(package) is None]
    if missing:
        into.write_text(json.dumps({"left_out": f"{', '.join(missing)} not installed"}), encoding="utf-8")
        return 0
    at = torch.device(device if device == "cpu" else "cuda:0")
    bench = Bench(at, json.loads(before.read_text(encoding="utf-8")), into, given)
    module, name = function
    try:
        bench.keep(getattr(importlib.import_module(f"nnturbo.benchmarks.{module}"), name)(bench))
    except Exception as error:
        traceback.print_exc()
        so_far = json.loads(into.read_text(encoding="utf-8")) if into.exists() else {}
        into.write_text(json.dumps({**so_far, "failed": f"{type(error).__name__}: {error}"[:2000]}), encoding="utf-8")
        return 1
    return 0


def versions(bench: Bench) -> dict[str, Any]:
    """What is here, and what it does at best: bytes copied per second (read and written), and products of matrices."""
    from nnturbo.benchmarks.report import machine

    found: dict[str, Any] = {
        **machine(), "platform": platform.platform(), "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(), "installed": {},
    }  # fmt: skip
    for package in PACKAGES:
        try:
            found["installed"][package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found["installed"][package] = None
    if bench.on_gpu:
        properties = torch.cuda.get_device_properties(bench.device)
        found |= {
            "device": properties.name, "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory, "driver": _nvidia_smi("driver_version"),
            "clock_mhz": _nvidia_smi("clocks.sm"), "power_limit_w": _nvidia_smi("power.limit"),
        }  # fmt: skip
    bench.keep(found)
    size, side = bench.sizes.copied_bytes, bench.sizes.matrix
    block = torch.randint(0, 255, (size,), dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(block)
    found["copy_gb_per_s"] = 2 * size / bench.seconds(lambda: target.copy_(block), 20) / 1e9
    for dtype, name in ((torch.float16, "fp16"), (torch.bfloat16, "bf16")):
        matrix = torch.randn(side, side, device=bench.device).to(dtype)
        seconds = bench.seconds(lambda matrix=matrix: matrix @ matrix, 10)
        found[f"matmul_{name}_tflop_per_s"] = 2 * side**3 / seconds / 1e12
    print({name: found[name] for name in found if "_per_s" in name}, flush=True)
    return found


def _nvidia_smi(field: str) -> str | None:
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return None
    return done.stdout.strip().partition("\n")[0] or None


def tests(bench: Bench) -> dict[str, Any]:
    """Run the tests that need a GPU, and no other file: packages that others need may not be here."""
    process = subprocess.Popen(
        # Other versions of libraries than those of the project warn of other things.
        [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "-W", "default", "--no-header", "--durations=5",
         "--continue-on-collection-errors", *TEST_FILES],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    assert process.stdout is not None  # it is a pipe
    printed, found = [], {}
    for line in process.stdout:
        printed.append(line)
        print(line, end="", flush=True)
        if verdict := re.match(r"(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED)", line):
            found[verdict[1]] = verdict[2]
            bench.keep(found)
    status = process.wait()
    if status or (bench.on_gpu and "PASSED" not in found.values()):
        bench.keep({**found, "printed": "".join(printed)[-20000:]})
        raise RuntimeError(f"of the tests that need a GPU: {printed[-1].strip() if printed else status}")
    return found


def tensorrt_rtx(bench: Bench) -> dict[str, Any]:
    """Whether TensorRT-RTX runs on this GPU, and what it says if it does not."""
    from nnturbo.engine.backends.tensorrt import TensorRtBackend

    return {"unavailable": TensorRtBackend().unavailable(bench.device, "fp16")}
