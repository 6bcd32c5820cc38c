"""How tables and their numbers are written."""

from __future__ import annotations


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """Lay out a table."""
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (header, ["---"] * len(header), *rows))


def times(ratio: float) -> str:
    """Write a ratio of times or of memory."""
    return f"{ratio:.2f} x" if ratio < 10 else f"{ratio:.1f} x"


def differing(count: int, voxels: int) -> str:
    """Write a number of voxels as a share of all."""
    return f"{100 * count / voxels:.2g} % ({count} of {voxels})"
