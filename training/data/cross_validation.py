"""Folds of a cross-validation: made by `prepare`, and read from the table of classes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from .tables import DatasetError, read_table

FOLD_COLUMN = "fold"


def stratified_folds(classes: Mapping[str, str], folds: int) -> dict[str, int]:
    """Spread the cases of each class evenly over folds.

    Args:
        classes: Class of each case.
        folds: Number of folds, at least 2.

    Returns:
        The fold in which each case is held out. The same cases give the same folds; any two folds differ by at most
        one case of each class, and by at most one case in all.

    Raises:
        ValueError: For fewer than two folds, or a class with fewer cases than folds.
    """
    if folds < 2:
        raise ValueError(f"folds must be at least 2, got {folds}")
    by_class: dict[str, list[str]] = {}
    for name in sorted(classes):
        by_class.setdefault(classes[name], []).append(name)
    if rare := {label: len(names) for label, names in by_class.items() if len(names) < folds}:
        counts = ", ".join(f"{label} has {count}" for label, count in sorted(rare.items()))
        raise ValueError(
            f"{folds} folds need at least {folds} training cases of each class; {counts}: take fewer folds"
        )
    random = np.random.default_rng(0)
    # One after the other over all classes, so that the remainders of the classes do not all fall to the first folds.
    dealt = [name for label in sorted(by_class) for name in random.permutation(by_class[label]).tolist()]
    return {name: place % folds for place, name in enumerate(dealt)}


def splits(folds: Mapping[str, int], train: Sequence[str], validation: Sequence[str]) -> list[dict[str, list[str]]]:
    """Make nnU-Net's `splits_final.json`.

    Args:
        folds: Fold of each training case; empty without a cross-validation.
        train: All training cases.
        validation: The validation cases of the data set, which are in none of the folds; a cross-validation needs none.

    Returns:
        The folds, and after them the data set's own split if it has one, which alone is there without a
        cross-validation.
    """
    own = [{"train": list(train), "val": list(validation)}] if validation or not folds else []
    numbers = sorted(set(folds.values()))
    parts = [[name for name in train if folds[name] == number] for number in numbers]
    return [*({"train": sorted(set(train) - set(part)), "val": part} for part in parts), *own]


def read_folds(table: Path) -> dict[str, int]:
    """Read in which fold each case is held out; empty for a data set without a cross-validation.

    Raises:
        DatasetError: Where a fold is no number.
    """
    with table.open(encoding="utf-8-sig") as file:
        header = re.split("[,;\t]", file.readline().lower())  # as `read_table` separates cells
    if FOLD_COLUMN not in [cell.strip(' "\n') for cell in header]:
        return {}
    rows = [row for row in read_table(table, ("case", FOLD_COLUMN)) if row.cells[FOLD_COLUMN]]
    if wrong := [row for row in rows if not row.cells[FOLD_COLUMN].isdecimal()]:
        raise DatasetError(f"{table} line {wrong[0].line}: fold must be a number, got {wrong[0].cells[FOLD_COLUMN]!r}")
    return {row.cells["case"]: int(row.cells[FOLD_COLUMN]) for row in rows}
