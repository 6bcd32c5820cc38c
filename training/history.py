"""Writes the history of a training: a line per epoch, curves, and the same numbers for TensorBoard."""

from __future__ import annotations

import csv
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..engine.files import written_atomically

logger = logging.getLogger(__name__)

HISTORY_FILE, CURVES_FILE = "history.csv", "curves.png"

PANELS = (
    ("loss on patches", ("train_loss", "val_loss", "class_loss")),
    ("validation", ("pseudo_dice", "foreground_dsc", "focus_dsc", "macro_f1", "score")),
)


def write_history(lines: Sequence[Mapping[str, float]], folder: Path) -> None:
    """Write `history.csv` and, of the same numbers, `curves.png`.

    Args:
        lines: One per epoch, without values that were not measured in that epoch.
        folder: Folder for the files; files of these names are replaced.
    """
    names = list(dict.fromkeys(name for line in lines for name in line))
    with written_atomically(folder / HISTORY_FILE) as path, path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    draw_curves(lines, names, folder / CURVES_FILE)


def draw_curves(lines: Sequence[Mapping[str, float]], names: Sequence[str], path: Path) -> None:
    """Draw the values of these names over the epochs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.6), layout="constrained")
    panels = (*PANELS, ("DSC of whole cases by label", [name for name in names if name.startswith("dsc_")]))
    for axes, (title, shown) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for name in shown:
            points = [(line["epoch"], line[name]) for line in lines if name in line]
            if points:
                axes.plot(*zip(*points, strict=True), marker=".", label=name)
                axes.legend(fontsize=8)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("epoch")
    with written_atomically(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


def open_events(folder: Path, first_epoch: int) -> Any:
    """Open torch's writer of TensorBoard events, or return `None` where TensorBoard is not installed.

    Args:
        folder: Folder of the fold; events lie in its `tensorboard`.
        first_epoch: Epoch with which the training begins or goes on: later events of an earlier run are discarded.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        logger.info("no TensorBoard events, as it is not installed: pip install 'nnturbo[tensorboard]'")
        return None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=first_epoch)
