"""The table of the cases' classes: `Names,Subtype`, and the probability of each class where they are asked for."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..files import written_atomically


def write_class_table(
    path: Path,
    answers: Mapping[str, tuple[int, Sequence[float]]],
    class_names: Sequence[str],
    *,
    with_probabilities: bool,
) -> None:
    """Write a csv, sorted by name, complete or not at all.

    A class is written by its name where all names are numbers, which differ from the indices in a data set without the
    class 0; else by its index.

    Args:
        path: The file; one that is there is replaced.
        answers: By the name of each case's result file: index of the class, and probability of each class.
        class_names: Names of the classes, in the order of the probabilities.
        with_probabilities: Whether a column `Probability_<class>` for each class follows.
    """
    are_numbers = all(name.isdecimal() for name in class_names)
    with (
        written_atomically(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file,
    ):
        table = csv.writer(file, lineterminator="\n")
        more = [f"Probability_{name}" for name in class_names] if with_probabilities else []
        table.writerow(("Names", "Subtype", *more))
        for name, (label, probabilities) in sorted(answers.items()):
            shares = [f"{share:.6f}" for share in probabilities] if with_probabilities else []
            table.writerow((name, class_names[label] if are_numbers else label, *shares))
