"""Compiles the kernels for CPUs: one library for all processors of a kind, with nothing but Python and a compiler."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

FOLDER = Path(__file__).parent / "cpu"
SHARED = ("threads.cpp", "dispatch.cpp", "check.cpp", "operations.cpp", "head.cpp", "program.cpp")
VARIED = "convolution.cpp"
FLAGS = ("-O3", "-std=c++17", "-fvisibility=hidden", "-pthread")

VARIANTS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "x86_64": {
        "avx2": ("-mavx2", "-mfma"),
        "avx512": ("-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512cd", "-mavx512dq", "-mavx512vl"),
    },
    "aarch64": {"neon": ()},
}
"""Sets of instructions by kind of processor, with what makes compilers use them; dispatch.cpp chooses among them."""

OF_SYSTEM = {"linux": ("-fPIC",), "darwin": ("-fPIC",), "windows": ()}
LINKED = {
    "linux": (
        "-shared",
        "-static-libstdc++",
        "-static-libgcc",
        "-Wl,-s",
        f"-Wl,--version-script={FOLDER / 'exports.map'}",
    ),
    "darwin": ("-dynamiclib", "-Wl,-x"),
    "windows": ("-shared", "-static", "-s"),
}
"""So that a library needs nothing but the system's own."""


def compiler() -> list[str] | None:
    """Find a C++ compiler that runs: what CXX names, or the system's.

    Note:
        A Mac without Apple's command line tools has a `c++` that does nothing but offer to install them.
    """
    named = os.environ.get("CXX")
    for command in [shlex.split(named)] if named else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]) and _runs([*command, "--version"]):
            return command
    return None


def _runs(command: Sequence[str]) -> bool:
    try:
        return subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def here() -> tuple[str, str]:
    """Say for which system and kind of processor this Python runs, as `compile_kernels` takes them."""
    return platform.system().lower(), {"amd64": "x86_64", "arm64": "aarch64"}.get(
        platform.machine().lower(), platform.machine().lower()
    )


def library_name(system: str) -> str:
    """Name the library; no system takes that of another."""
    return {"windows": "nnturbo_kernels.dll", "darwin": "libnnturbo_kernels.dylib"}.get(system, "libnnturbo_kernels.so")


def compile_kernels(
    command: Sequence[str], path: Path, *, system: str, processor: str, more: Sequence[str] = ()
) -> None:
    """Compile the library.

    Args:
        command: The compiler, such as ["g++"] or ["zig", "c++", "-target", "x86_64-windows-gnu"].
        path: The library; it is replaced.
        system: "linux", "darwin" or "windows".
        processor: One of `VARIANTS`.
        more: Further flags for all steps.

    Raises:
        OSError: Where the compiler fails, or there are no kernels for such a processor.
    """
    if processor not in VARIANTS:
        raise OSError(f"the kernels are for {' and '.join(VARIANTS)}, not for {processor}")
    flags = [*FLAGS, *OF_SYSTEM[system], *more]
    with tempfile.TemporaryDirectory(prefix="nnturbo-") as folder:
        objects = []
        for source in SHARED:
            objects.append(str(Path(folder) / f"{source}.o"))
            _run([*command, *flags, "-c", str(FOLDER / source), "-o", objects[-1]])
        for variant, instructions in VARIANTS[processor].items():
            objects.append(str(Path(folder) / f"{variant}.o"))
            source = str(FOLDER / VARIED)
            _run([*command, *flags, *instructions, f"-DVARIANT={variant}", "-c", source, "-o", objects[-1]])
        _run([*command, *more, "-pthread", *LINKED[system], *objects, "-o", str(path)])


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
    if done.returncode != 0:
        reason = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[:200])
        raise OSError(f"{command[0]} fails: {reason:.300}")
