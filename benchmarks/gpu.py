r"""Everything that needs a GPU, in one call of some minutes, in parts of which the most telling come first.

    python benchmarks/gpu.py [--parts versions tests forward ...] [--minutes 6] [--json FILE.json]

Runs from a checkout, with nnturbo installed or not, and without a network. Each part is a process of its own: one that
fails, crashes or takes too long loses nothing but what it had not written yet. What is not installed is named and left
out. The JSON is written after each part.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_JSON = ROOT / "benchmarks" / "results" / "gpu.json"
LEAST_SECONDS = 15
"""Left of all time, below which no part begins: importing torch takes as long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One part.

    Args:
        function: Where its function is: module of this folder, and name.
        seconds: After which it is ended.
        needs: Packages without which it is left out.
        tells: What it is for.
        usual: Whether it is run where no parts are named.
        beside: Whether it needs no GPU, and runs beside the others on half of the cores.
    """

    function: tuple[str, str]
    seconds: float
    tells: str
    needs: tuple[str, ...] = ()
    usual: bool = True
    beside: bool = False


NETWORK = ("dynamic_network_architectures",)
PARTS = {
    "versions": Part(
        function=("gpu_device", "versions"), seconds=40, tells="device, versions, measured peaks of products and copies"
    ),
    "tests": Part(function=("gpu_device", "tests"), seconds=120, tells="the tests marked gpu", needs=("pytest",)),
    "forward": Part(
        function=("gpu_networks", "forward"), seconds=110, tells="ways to run the network on eight views of a tile",
        needs=NETWORK,
    ),
    "labels": Part(
        function=("gpu_cases", "labels"), seconds=60, tells="labels against fp32 on the CPU and nnU-Net",
        needs=NETWORK,
    ),
    "whole": Part(
        function=("gpu_cases", "whole"), seconds=90, tells="scan to labels, nnU-Net beside it: time and memory",
        needs=NETWORK,
    ),
    "many": Part(
        function=("gpu_cases", "many"), seconds=90, tells="many scans from file to file, and nnU-Net", needs=NETWORK
    ),
    "kernels": Part(function=("gpu_kernels", "kernels"), seconds=45, tells="each kernel as a share of a copy"),
    "profile": Part(
        function=("gpu_networks", "profile"), seconds=45, tells="the 25 longest kernels of a forward", needs=NETWORK
    ),
    "layers": Part(
        function=("gpu_networks", "layers"), seconds=45, tells="where the time of nnturbo's forward goes, by step",
        needs=NETWORK,
    ),
    "views": Part(
        function=("gpu_networks", "views"), seconds=90, tells="time and memory of a forward by its number of views",
        needs=NETWORK, usual=False,
    ),
    "trained": Part(
        function=("gpu_cases", "trained"), seconds=120, tells="labels of the model and scan that are given",
        needs=NETWORK, usual=False,
    ),
    "long": Part(
        function=("gpu_cases", "long"), seconds=120, tells="a CT of 400 slices, and nnU-Net's network", needs=NETWORK,
        usual=False,
    ),
    "long_on_cpu": Part(
        function=("gpu_cases", "long_on_cpu"), seconds=300, tells="nnU-Net's other stages of such a CT",
        needs=("nnunetv2",), usual=False, beside=True,
    ),
    "training": Part(
        function=("gpu_training", "training"), seconds=240, tells="epochs of the multi-task trainer",
        needs=("nnunetv2",), usual=False,
    ),
    "inductor": Part(
        function=("gpu_networks", "inductor"), seconds=180, tells="the network compiled by torch's inductor",
        needs=NETWORK, usual=False,
    ),
    "tensorrt_rtx": Part(
        function=("gpu_device", "tensorrt_rtx"), seconds=30, tells="whether TensorRT-RTX runs here",
        needs=("tensorrt_rtx", *NETWORK), usual=False,
    ),
}  # fmt: skip


def run_parts(
    names: Sequence[str], minutes: float, json_file: Path, command: Callable[[str, Path, Path], Sequence[str]]
) -> dict[str, Any]:
    """Run parts one after the other, and write what was found after each.

    Args:
        names: Of `PARTS`.
        minutes: In all; a part that does not fit any more is ended, or not begun.
        json_file: Where to.
        command: What runs a part, given its name, the file that it writes and the file with what was found before.
    """
    found: dict[str, Any] = {"benchmark": "gpu", "left_out": {}, "failed": {}, "seconds": {}}
    deadline = time.monotonic() + 60 * minutes
    beside = [name for name in names if PARTS[name].beside]
    with tempfile.TemporaryDirectory() as folder:
        cores = _cores()
        if beside:
            _keep_to(cores[len(cores) // 2 :])
        # Started on their half of the cores, they stay there.
        running = {name: RunningPart(name, found, command, Path(folder)) for name in beside}
        if beside:
            _keep_to(cores[: (len(cores) + 1) // 2])
        for name in (*(name for name in names if name not in beside), *beside):
            left = deadline - time.monotonic()
            if left < LEAST_SECONDS and name not in running:
                found["left_out"][name] = "no time left"
            else:
                part = running.get(name) or RunningPart(name, found, command, Path(folder))
                part.finish(min(left, PARTS[name].seconds), found)
            json_file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            said = found["left_out"].get(name) or found["failed"].get(name, "done")
            print(f"== {name}: {said:.300} ({found['seconds'].get(name, 0)} s)", flush=True)
        _keep_to(cores)
    return found


def _cores() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def _keep_to(cores: Sequence[int]) -> None:
    if cores:
        os.sched_setaffinity(0, cores)


class RunningPart:
    """A part in its process, which with those that it starts is a group that is ended as a whole."""

    def __init__(
        self, name: str, found: dict[str, Any], command: Callable[[str, Path, Path], Sequence[str]], folder: Path
    ) -> None:
        self.name, self.start = name, time.monotonic()
        self.into, before = folder / f"{name}.json", folder / f"before_{name}.json"
        before.write_text(json.dumps(found), encoding="utf-8")
        self.process = subprocess.Popen(list(command(name, self.into, before)), start_new_session=True)

    def finish(self, seconds: float, found: dict[str, Any]) -> None:
        """Wait for it, but not longer than that, and keep what it wrote, be it all or not."""
        try:
            status = self.process.wait(max(seconds, 0.1))
            ended = f"its process ended with {status}" if status else None
        except subprocess.TimeoutExpired:
            ended = f"ended after {time.monotonic() - self.start:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        found["seconds"][self.name] = round(time.monotonic() - self.start, 1)
        written: dict[str, Any] = json.loads(self.into.read_text(encoding="utf-8")) if self.into.exists() else {}
        if "found" in written:
            found[self.name] = written["found"]
        if "left_out" in written:
            found["left_out"][self.name] = written["left_out"]
        elif why := written.get("failed") or ended:
            found["failed"][self.name] = why


def main(arguments: list[str] | None = None) -> int:
    """Run the parts asked for, and write one JSON."""
    parser = argparse.ArgumentParser(
        description="everything that needs a GPU",
        epilog="parts: " + "; ".join(f"{name}: {part.tells}" for name, part in PARTS.items()),
    )
    usual = [name for name, part in PARTS.items() if part.usual]
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=usual, metavar="PART", help="in this order")
    parser.add_argument("--json", type=Path, default=DEFAULT_JSON)
    parser.add_argument("--minutes", type=float, default=6, help="for all parts together")
    parser.add_argument("--model", type=Path, help="a model that nnU-Net has trained, for the part `trained`")
    parser.add_argument("--scan", type=Path, help="a scan for it")
    parser.add_argument("--device", default="cuda", help="cpu tries the script itself, on small sizes")
    parser.add_argument("--one", nargs=3, metavar=("PART", "INTO", "BEFORE"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    environment = _find_nnturbo()
    if options.one is not None:
        from nnturbo.benchmarks.gpu_device import run_one

        name, into, before = options.one
        part = PARTS[name]
        given = (options.model, options.scan)
        return run_one(part.function, part.needs, options.device, Path(into), Path(before), given)

    os.environ.update(environment)
    script = [sys.executable, str(Path(__file__).resolve()), "--device", options.device]
    for option, path in (("--model", options.model), ("--scan", options.scan)):
        script += [] if path is None else [option, str(path)]
    if options.device != "cpu" and not _has_cuda():
        print("no CUDA device is here: nothing was measured", file=sys.stderr)
        return 2

    def command(name: str, into: Path, before: Path) -> list[str]:
        return [*script, "--one", name, str(into), str(before)]

    found = run_parts(options.parts, options.minutes, options.json, command)
    print(json.dumps({key: found[key] for key in ("failed", "left_out", "seconds")}, indent=1))
    return 1 if found["failed"] else 0


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _find_nnturbo() -> dict[str, str]:
    """Make this checkout importable where nnturbo is not installed.

    Returns:
        What processes need in their environment to find it too.
    """
    import importlib.util

    if importlib.util.find_spec("nnturbo") is not None:
        return {}
    sys.path.insert(0, str(ROOT))
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}


if __name__ == "__main__":
    sys.exit(main())
