"""Lists registers and spills of every kernel on every architecture, as nvcc reports them; needs no GPU.

python -m nnturbo.benchmarks.kernels [--json FILE]
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from nnturbo.kernels import loader

from .report import write_report

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
VARIANTS: list[tuple[str, torch.dtype, bool | None]] = [
    *((kernel, dtype, None) for kernel in ("gather_tiles", "accumulate_views") for dtype in FLOATS),
    *((f"instance_norm_{step}", dtype, None) for step in ("sums", "apply") for dtype in FLOATS),
    ("instance_norm_scales", torch.float32, None),
    *(("spread_blocks", dtype, None) for dtype in FLOATS),
    *(("upsample", dtype, None) for dtype in FLOATS[1:]),
    *(
        ("resample_axis", dtype, lines)
        for dtype in (torch.float32, torch.int16, torch.uint8)
        for lines in (False, True)
    ),
    *(("convolve", dtype, lines) for dtype in FLOATS[1:] for lines in (False, True)),
    *(("convolve_points", dtype, None) for dtype in FLOATS[1:]),
    *(("resample_labels", dtype, None) for dtype in (torch.uint8, torch.uint16)),
]
"""Every kernel, for each of its number types."""

FIRST_ARCHITECTURE = {"convolve": 80, "convolve_points": 80, "upsample": 80}
"""Of kernels that older ones cannot run."""

REPORT = re.compile(
    r"for 'sm_(\d+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers", re.DOTALL
)


def architectures_of(kernel: str) -> list[int]:
    """Those of `ARCHITECTURES` that a kernel is for."""
    return [sm for sm in ARCHITECTURES if sm >= FIRST_ARCHITECTURE.get(kernel, 0)]


def compile_variant(kernel: str, dtype: torch.dtype, lines: bool | None) -> list[dict[str, Any]]:
    """Compile one kernel for all architectures; warnings are errors.

    Raises:
        RuntimeError: Where it does not compile; the text has nvcc's message.
    """
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / f"{kernel}.cu"
        text.write_text(loader.source(kernel, dtype, lines), encoding="utf-8")
        targets = [f"-gencode=arch=compute_{sm},code=sm_{sm}" for sm in architectures_of(kernel)]
        done = subprocess.run(
            ["nvcc", "-std=c++17", "-Werror", "all-warnings", "-Xptxas", "-v", "-fatbin", *targets, "-o",
             f"{folder}/out.fatbin", str(text)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(f"{kernel} in {dtype}: {done.stderr}")
    return [
        {
            "kernel": kernel, "type": str(dtype).removeprefix("torch."), "lines": lines, "sm": int(sm),
            "registers": int(registers), "spill_bytes": int(stores) + int(loads),
        }
        for sm, stores, loads, registers in REPORT.findall(done.stderr)
    ]  # fmt: skip


def main() -> None:
    """Compile, print and keep."""
    parser = argparse.ArgumentParser(description="registers of kernels")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    for variant in VARIANTS:
        rows += compile_variant(*variant)
        of_variant = rows[-len(architectures_of(variant[0])) :]
        print(*variant, *(f"sm_{row['sm']}: {row['registers']}" for row in of_variant), flush=True)
    write_report(options.json, {"benchmark": "kernels", "rows": rows})


if __name__ == "__main__":
    main()
