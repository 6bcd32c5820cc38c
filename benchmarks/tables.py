"""What tables are made of: stored results, and how numbers are written."""

from __future__ import annotations

import json
from typing import Any

from .figures import RESULTS


def load(name: str) -> dict[str, Any]:
    """Content of one stored result."""
    return json.loads((RESULTS / f"{name}.json").read_bytes())


def instructions(stored: dict[str, Any]) -> str:
    """Fast instructions of the processor of a measurement."""
    names = {"avx512f": "AVX-512", "avx512_bf16": "bf16", "avx512_vnni": "VNNI"}
    features = stored["machine"]["cpu features"].split(", ")
    return ", ".join(name for feature, name in names.items() if feature in features) or "AVX2"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """Lay out a table."""
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (header, ["---"] * len(header), *rows))


def times(ratio: float) -> str:
    """Write a ratio of times or of memory."""
    return f"{ratio:.2f} x" if ratio < 10 else f"{ratio:.1f} x"


def differing(count: int, voxels: int) -> str:
    """Write a number of voxels as a share of all."""
    return f"{100 * count / voxels:.2g} % ({count} of {voxels})"


def model_and_scans(result: dict[str, Any], row: dict[str, Any]) -> str:
    """Name a model and the scans that it was tried on."""
    what = row["what"].removesuffix("s") if row["scans"] == 1 else row["what"]
    return f"{result['model']}, {row['scans']} {what}"
