"""Draws the figures of docs/ from benchmarks/results; `python -m nnturbo.benchmarks.readme` does it with the tables.

Each figure is an SVG that names the data it was drawn from by their hash, so that a test can tell an old figure.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
RESULTS, FIGURES = ROOT / "benchmarks" / "results", ROOT / "docs" / "figures"
# Okabe and Ito's, which colour-blind readers tell apart.
STAGE_COLOURS = {
    "start": "#999999",
    "read": "#56B4E9",
    "preprocess": "#0072B2",
    "network": "#E69F00",
    "stitch": "#F0E442",
    "labels": "#009E73",
    "write": "#CC79A7",
}
SIDE_COLOURS, SIDE_NAMES = {"stock": "#D55E00", "nnturbo": "#0072B2"}, {"stock": "nnU-Net", "nnturbo": "nnturbo"}


def waterfall(result: dict[str, Any]) -> Figure:
    """Draw where the time goes after each technique, and the floor."""
    from matplotlib.figure import Figure

    rows, floor = result["rows"], result["floor"]["network_s"] + result["floor"]["rest_s"]
    longest = max(row["median_s"] for row in rows)
    figure = Figure(figsize=(8, 0.42 * len(rows) + 1.2), layout="constrained")
    axes = figure.subplots()
    for index, row in enumerate(rows):
        # Stages of a job overlap, so that its time has no parts.
        parts = {stage: row["stages_s"].get(stage, 0) for stage in STAGE_COLOURS} if row["stages_s"] else {}
        left = 0.0
        for stage, seconds in parts.items():
            axes.barh(index, seconds, left=left, color=STAGE_COLOURS[stage], label=stage if index == 0 else None)
            left += seconds
        if not parts:
            axes.barh(index, row["median_s"], color="white", edgecolor="#444444", hatch="//")
        answer = f"{row['median_s']:.1f} s, {row['ratio']:.1f} x"
        plain = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        axes.text(row["median_s"] + 0.01 * longest, index, answer, va="center", fontsize=8, bbox=plain)
    axes.axvline(floor, color="black", linestyle=":", linewidth=1)
    axes.text(floor, -0.75, f" floor {floor:.1f} s", fontsize=8)
    axes.set_yticks(range(len(rows)), [row["step"] for row in rows])
    axes.set_ylim(len(rows) - 0.5, -1.1)
    axes.set_xlim(0, 1.2 * longest)
    axes.set_xlabel("seconds per scan")
    axes.legend(loc="lower right", fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def growth(result: dict[str, Any]) -> Figure:
    """Draw time and memory against size, with the fitted lines."""
    import numpy as np
    from matplotlib.figure import Figure

    grows = list(result["lines"])
    figure = Figure(figsize=(2.6 * len(grows), 5), layout="constrained")
    panels = figure.subplots(2, len(grows))
    for column, what in enumerate(grows):
        rows = [row for row in result["rows"] if row["what"] == what]
        sizes = np.array([row[what] for row in rows])
        for axes, key, per, unit in zip(
            panels[:, column], ("seconds", "peak_bytes"), (1, 2**30), ("seconds", "peak memory, GiB"), strict=True
        ):
            for side, colour in SIDE_COLOURS.items():
                line = result["lines"][what][side][key]
                axes.plot(sizes, [row[side][key] / per for row in rows], "o", color=colour, label=SIDE_NAMES[side])
                axes.plot(sizes, (line["slope"] * sizes + line["intercept"]) / per, color=colour, linewidth=1)
            axes.set_ylim(bottom=0)
            axes.set_xlabel(what)
            axes.spines[["top", "right"]].set_visible(False)
            if column == 0:
                axes.set_ylabel(unit)
    panels[0, 0].legend(fontsize=8, frameon=False)
    return figure


DRAWN: dict[str, Callable[[dict[str, Any]], Figure]] = {"waterfall": waterfall, "growth": growth}


def source_of(name: str) -> str:
    """Hash of the data a figure shows."""
    return hashlib.sha256((RESULTS / f"{name}.json").read_bytes()).hexdigest()


def draw(name: str) -> None:
    """Draw one figure to docs/figures."""
    import matplotlib

    # Text stays text, and the same data give the same file.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "nnturbo"}):
        drawn = io.StringIO()
        figure = DRAWN[name](json.loads((RESULTS / f"{name}.json").read_bytes()))
        figure.savefig(drawn, format="svg", metadata={"Date": None, "Description": source_of(name)})
    FIGURES.mkdir(parents=True, exist_ok=True)
    lines = (line.rstrip() for line in drawn.getvalue().splitlines())
    (FIGURES / f"{name}.svg").write_text("\n".join(lines) + "\n", encoding="utf-8")
