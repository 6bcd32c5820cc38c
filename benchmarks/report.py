"""What every benchmark needs: a child process measured, the machine described, and the file it leaves."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from nnturbo.engine.doctor import examine

PACKAGES = ("torch", "numpy", "scipy", "scikit-image", "SimpleITK", "nnunetv2", "nnturbo")


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What one child process took; memory is the greatest resident size of any one process in it."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int


def run_measured(command: Sequence[str], *, environment: dict[str, str] | None = None) -> Run:
    """Run a command to its end.

    Raises:
        RuntimeError: Where it fails; with the end of what it printed.
    """
    start = time.perf_counter()
    with subprocess.Popen(
        command, env={**os.environ, **(environment or {})}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as child:
        printed = child.stdout.read() if child.stdout else ""
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0:
        raise RuntimeError(f"{' '.join(command)[:200]} ended with {child.returncode}: {printed[-2000:]}")
    return Run(seconds=seconds, cpu_seconds=usage.ru_utime + usage.ru_stime, peak_bytes=usage.ru_maxrss * 1024)


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
    """Commit of the checkout the code lies in, marked where files differ from it; "unknown" outside one."""
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
    """Write one benchmark's result as JSON, with machine, versions and commit; nothing where there is no path."""
    if path is not None:
        path.write_text(json.dumps({**content, **machine()}, indent=1) + "\n")
