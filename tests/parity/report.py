"""Collect how far nnturbo's results are from nnU-Net's, and show it after the tests."""

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityRow:
    """Agreement on one task.

    Attributes:
        name: Model kind and scan.
        voxels: Voxels of the scan.
        differ_from_stock: Voxels with another label than stock.
        differ_from_fp32_stock: Voxels with another label than stock with fp32 sums; None where that did not run.
        stock_differs_from_fp32_stock: The same between the two stocks: what stock's rounding alone does.
    """

    name: str
    voxels: int
    differ_from_stock: int
    differ_from_fp32_stock: int | None = None
    stock_differs_from_fp32_stock: int | None = None


def format_table(rows: Sequence[ParityRow]) -> str:
    """Lay out rows as text: voxels that differ, and their fraction."""
    header = f"{'model kind and scan':40} {'voxels':>9} {'stock':>20} {'fp32 stock':>20} {'stock, fp32 stock':>20}"
    return "\n".join([header, *(_format_row(row) for row in rows)])


def write_json(rows: Sequence[ParityRow], path: Path) -> None:
    """Write rows with the machine and the versions they were made with."""
    packages = ("nnturbo", "nnunetv2", "batchgenerators", "torch", "numpy", "scipy", "scikit-image", "SimpleITK")
    document = {
        "machine": platform.platform(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in packages},
        "rows": [asdict(row) for row in rows],
    }
    path.write_text(json.dumps(document, indent=2))


def _format_row(row: ParityRow) -> str:
    def cell(count: int | None) -> str:
        return f"{'-':>20}" if count is None else f"{count:9d} {count / row.voxels:10.1e}"

    counts = (row.differ_from_stock, row.differ_from_fp32_stock, row.stock_differs_from_fp32_stock)
    return f"{row.name:40} {row.voxels:9d} " + " ".join(cell(count) for count in counts)
