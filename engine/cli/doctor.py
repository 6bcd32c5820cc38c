"""`nnturbo doctor`: lists the hardware and packages of this machine."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

from .output import say_rows

CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8")

PACKAGES = (
    "torch",
    "numpy",
    "SimpleITK",
    "dynamic-network-architectures",
    "nnunetv2",
    "openvino",
    "nncf",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "cupy-cuda12x",
    "cupy-cuda13x",
    "tensorrt",
    "tensorrt-rtx-cu13",
    "torch-tensorrt",
    "nvidia-dali-cuda120",
    "nvidia-dali-cuda130",
    "imageio",
    "tifffile",
    "highdicom",
    "ray",
)


def add_doctor(commands: Any) -> None:
    """Declare `nnturbo doctor`."""
    doctor = commands.add_parser("doctor", help="say what this machine offers")
    doctor.set_defaults(run=_doctor)


def _doctor(options: argparse.Namespace) -> int:
    return say_rows(examine())


def examine() -> list[tuple[str, str]]:
    """Look at processor, memory, GPUs and installed packages.

    Returns:
        Rows of (what, finding).
    """
    import torch

    from ...kernels.compilation import compiler
    from ..backends.native import NativeBackend

    rows = [
        ("python", platform.python_version()),
        ("processor", f"{_processor()}, {_usable_cores()} usable cores"),
        ("cpu features", ", ".join(_cpu_features()) or "none of those nnturbo looks for"),
        ("memory", f"{_memory_bytes() / 2**30:.1f} GiB" if _memory_bytes() else "unknown"),
    ]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            rows.append(
                (
                    f"cuda:{index}",
                    f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB, "
                    f"compute capability {properties.major}.{properties.minor}",
                )
            )
    else:
        built = torch.version.cuda
        rows.append(
            ("cuda", f"no GPU found (torch is built for CUDA {built})" if built else "torch is built without CUDA")
        )
    rows.append(
        ("gpu path", "ran on NVIDIA H100 and H200 in 11/2026: in a clone, python benchmarks/gpu.py tries it here")
    )
    reason = NativeBackend().unavailable(torch.device("cpu"), "fp32")
    rows.append(("native kernels", "run here" if reason is None else f"do not run here: {reason}"))
    rows.append(("c++ compiler", " ".join(compiler() or ["none"])))
    for package in PACKAGES:
        try:
            rows.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            rows.append((package, "not installed"))
    return rows


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpuinfo(key: str) -> str:
    """Read one value of the first processor from /proc/cpuinfo; empty if there is none."""
    path = Path("/proc/cpuinfo")
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""


def _processor() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpu_features() -> list[str]:
    flags = set(_cpuinfo("flags").split())
    return [feature for feature in CPU_FEATURES if feature in flags]


def _memory_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
