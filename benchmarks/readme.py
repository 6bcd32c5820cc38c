"""Fills the tables of README.md and docs/ from benchmarks/results, and draws the figures.

    python -m nnturbo.benchmarks.readme

A table stands between `<!-- table NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import re

from . import agreement_tables, gpu_tables, kernel_tables, performance_tables
from .figures import DRAWN, ROOT, draw

DOCUMENTS = (
    "README.md",
    "docs/backends.md",
    "docs/deployment.md",
    "docs/gpu.md",
    "docs/nnunet.md",
    "docs/parity.md",
    "docs/performance.md",
    "docs/training.md",
)
TABLE = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
TABLES = {**performance_tables.TABLES, **agreement_tables.TABLES, **gpu_tables.TABLES, **kernel_tables.TABLES}


def filled(document: str) -> str:
    """Fill the tables of a document from the results."""
    return TABLE.sub(lambda match: match.group(1) + TABLES[match.group(2)]() + match.group(3), document)


def main() -> None:
    """Fill every document, and draw every figure."""
    for name in DRAWN:
        draw(name)
    for name in DOCUMENTS:
        path = ROOT / name
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
