"""Shared by all benchmarks: measures child processes, describes the machine, and writes result files."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from nnturbo.engine.cli.doctor import examine

PACKAGES = ("torch", "numpy", "scipy", "scikit-image", "SimpleITK", "nnunetv2", "nnturbo")

# A separate process: the peak memory of a child includes the memory of its parent at the fork.
LAUNCHER = """
import glob, json, re, resource, subprocess, sys, threading, time

def held(process):
    try:
        with open(f"/proc/{process}/smaps_rollup") as file:
            held_bytes = 1024 * int(re.search(r"^Pss: +([0-9]+)", file.read(), re.M)[1])
        for name in glob.glob(f"/proc/{process}/task/*/children"):
            with open(name) as file:
                held_bytes += sum(map(held, file.read().split()))
    except (OSError, TypeError):
        return 0
    return held_bytes

def watch():
    global most
    while not ended.wait(0.25):
        most = max(most, held(child.pid))

most, ended = 0, threading.Event()
start = time.perf_counter()
child = subprocess.Popen(sys.argv[2:])
threading.Thread(target=watch, daemon=True).start()
status = child.wait()
ended.set()
seconds = time.perf_counter() - start
used = resource.getrusage(resource.RUSAGE_CHILDREN)
with open(sys.argv[1], "w") as told:
    json.dump({"seconds": seconds, "cpu_seconds": used.ru_utime + used.ru_stime,
               "peak_bytes": used.ru_maxrss * 1024, "peak_bytes_together": most or None}, told)
sys.exit(status if status >= 0 else 128 - status)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Time and memory of one child process.

    Attributes:
        seconds: Wall time from start to end.
        cpu_seconds: CPU time of all cores.
        peak_bytes: Greatest resident memory of any one process in it.
        peak_bytes_together: Greatest memory of all its processes together, where what several share counts once; looked
            at four times a second, so None on a command that is shorter or on systems other than Linux.
        gpu_peak_bytes: Peak of the GPU's memory, minus the memory in use before it began.
        gpu_byte_seconds: The same memory, summed over time.
    """

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    peak_bytes_together: int | None = None
    gpu_peak_bytes: int | None = None
    gpu_byte_seconds: float | None = None

    def __str__(self) -> str:
        """For people to read."""
        text = f"{self.seconds:7.1f} s, {self.cpu_seconds:7.1f} s of CPU, {self.peak_bytes / 2**20:6.0f} MiB"
        if self.gpu_peak_bytes is None or self.gpu_byte_seconds is None:
            return text
        return f"{text}, GPU {self.gpu_peak_bytes / 2**20:6.0f} MiB, {self.gpu_byte_seconds / 2**30:7.1f} GiB s"


def run_measured(command: Sequence[str], *, environment: dict[str, str] | None = None, watch_gpu: bool = False) -> Run:
    """Run a command to its end.

    Args:
        command: Command with its arguments.
        environment: Variables in addition to those of this process.
        watch_gpu: Whether to sample the memory of the first GPU; no other program should use it.

    Raises:
        RuntimeError: Where the command fails, with the end of its output; or where the GPU's memory cannot be read.
    """
    with contextlib.ExitStack() as stack:
        samples = stack.enter_context(_gpu_memory()) if watch_gpu else None
        run = _run_measured(command, environment or {})
    if samples is None:
        return run
    peak, area = memory_over_time(samples)
    return replace(run, gpu_peak_bytes=peak, gpu_byte_seconds=area)


def memory_over_time(samples: Sequence[tuple[float, int]]) -> tuple[int, float]:
    """Sum up (seconds, bytes in use): the peak beyond the first sample, and the area beyond it in byte seconds."""
    beyond = [(at, max(used - samples[0][1], 0)) for at, used in samples]
    area = sum((later - at) * used for (at, used), (later, _) in itertools.pairwise(beyond))
    return max(used for _, used in beyond), area


@contextlib.contextmanager
def _gpu_memory() -> Iterator[list[tuple[float, int]]]:
    """Sample the memory in use on the first GPU that processes may see, every 50 ms."""
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    command = ["nvidia-smi", f"--id={gpu}", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--loop-ms=50"]
    samples: list[tuple[float, int]] = []

    def sample() -> None:
        assert watcher.stdout is not None  # it is a pipe
        with contextlib.suppress(ValueError):  # the device does not report it
            for line in watcher.stdout:
                samples.append((time.perf_counter(), int(line) * 2**20))
                begun.set()
        begun.set()

    begun = threading.Event()
    try:
        watcher = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    except FileNotFoundError as error:
        raise RuntimeError("the GPU's memory is asked for with nvidia-smi, which is not installed") from error
    with watcher:
        thread = threading.Thread(target=sample, daemon=True)
        thread.start()
        try:
            begun.wait()
            if not samples:
                raise RuntimeError(f"{' '.join(command)} gave no number")
            yield samples
        finally:
            watcher.terminate()
            thread.join()


def _run_measured(command: Sequence[str], environment: dict[str, str]) -> Run:
    with tempfile.NamedTemporaryFile("r", encoding="utf-8") as told:
        done = subprocess.run(
            [sys.executable, "-S", "-c", LAUNCHER, told.name, *command],
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)[:200]} ended with {done.returncode}: {done.stdout[-2000:]}")
        return Run(**json.load(told))


def python(*arguments: str) -> list[str]:
    """Command line of this Python."""
    return [sys.executable, *arguments]


def machine() -> dict[str, Any]:
    """Machine, versions and commit."""
    installed = {}
    for package in PACKAGES:
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            installed[package] = None
    described = dict(examine())
    return {
        "machine": {key: described[key] for key in ("processor", "cpu features", "memory")},
        "threads": os.environ.get("OMP_NUM_THREADS", "all cores"),
        "python": platform.python_version(),
        "versions": installed,
        "commit": _commit(),
    }


def _commit() -> str:
    """Commit of this checkout, marked if files differ from it; "unknown" outside a checkout."""
    folder = Path(__file__).resolve().parent
    result = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    return result.stdout.strip() or "unknown"


def write_report(path: Path | None, content: dict[str, Any]) -> None:
    """Write one benchmark's result as JSON, with machine, versions and commit; without a path, write nothing."""
    if path is not None:
        path.write_text(json.dumps({**content, **machine()}, indent=1) + "\n", encoding="utf-8")
