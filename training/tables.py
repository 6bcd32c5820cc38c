"""Read tables of cases: csv, and xlsx where openpyxl is installed."""

from __future__ import annotations

import csv
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..engine.errors import EngineError

SUBTYPES = (0, 1, 2)
RESULTS_HEADER = ("Names", "Subtype")


class DatasetError(EngineError):
    """A data set, or what is compared with it, cannot be used; the text names each file, one problem a line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TableRow:
    """One row of a table: its number, the header's being 1, and its cells by column, stripped."""

    line: int
    cells: dict[str, str]


def raise_problems(what: str, problems: Sequence[str]) -> None:
    """Raise all problems as one error, if there are any.

    Raises:
        DatasetError: With `what` on its first line and one problem on each of the others.
    """
    if problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise DatasetError(f"{what}: {len(problems)} problem(s) must be corrected, nothing was written:\n{lines}")


def parse_subtype(text: str) -> int | None:
    """Read a subtype as tables hold it ("1", or "1.0" from a spreadsheet); `None` if it is not 0, 1 or 2."""
    try:
        number = float(text)
    except ValueError:
        return None
    return int(number) if number in SUBTYPES else None


def read_table(path: str | os.PathLike[str], columns: Sequence[str], *, exact: bool = False) -> tuple[TableRow, ...]:
    """Read rows of a csv or of the first sheet of an xlsx; empty rows are left out.

    Args:
        path: File with a header on its first line.
        columns: Names that the header must hold, upper or lower case being the same.
        exact: Whether the header must be these columns, written so, and nothing else.

    Returns:
        The rows, with the cells of these columns.

    Raises:
        DatasetError: If it cannot be read, or a column is missing or occurs twice.
    """
    path = Path(path)
    if path.suffix.lower() not in (".csv", ".xlsx"):
        raise DatasetError(f"{path}: a table must be a .csv or .xlsx file; save it as one of them")
    try:
        lines = _xlsx_lines(path) if path.suffix.lower() == ".xlsx" else _csv_lines(path)
    except (OSError, ValueError, KeyError, csv.Error, zipfile.BadZipFile) as error:
        raise DatasetError(f"{path}: the table cannot be read: {error}; open and save it again") from error
    header = [cell.strip() for cell in lines[0]] if lines else []
    if exact and header != list(columns):
        raise DatasetError(
            f"{path}: the header must be exactly {','.join(columns)}, got {','.join(header) or 'nothing'}"
        )
    lowered = [cell.lower() for cell in header]
    if any(lowered.count(column.lower()) != 1 for column in columns):
        raise DatasetError(
            f"{path}: the first line must name the columns {', '.join(columns)}, each once, got "
            f"{', '.join(header) or 'nothing'}"
        )
    places = {column: lowered.index(column.lower()) for column in columns}
    rows = []
    for number, line in enumerate(lines[1:], start=2):
        padded = [*line, *[""] * len(header)]
        if any(cell.strip() for cell in line):
            rows.append(TableRow(line=number, cells={name: padded[at].strip() for name, at in places.items()}))
    return tuple(rows)


def _csv_lines(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets put a byte order mark in front
        return list(csv.reader(file, strict=True))


def _xlsx_lines(path: Path) -> list[list[str]]:
    try:
        import openpyxl
    except ImportError:
        raise DatasetError(
            f"{path}: reading xlsx needs openpyxl, which is not installed: pip install openpyxl, or save as csv"
        ) from None
    with path.open("rb") as file:
        workbook = openpyxl.load_workbook(file, read_only=True, data_only=True)
        values = list(workbook.worksheets[0].values)
        workbook.close()
    return [["" if cell is None else str(cell) for cell in line] for line in values]


def read_subtype_results(path: str | os.PathLike[str]) -> dict[str, int]:
    """Read predicted subtypes as `nnturbo predict` writes them and the task's submission demands.

    Args:
        path: csv with the header `Names,Subtype` and names that end with .nii.gz.

    Returns:
        The subtype of each case, by its name without the ending.

    Raises:
        DatasetError: If it cannot be read, or a row is no such pair or names a case again.
    """
    subtypes: dict[str, int] = {}
    problems = []
    for row in read_table(path, RESULTS_HEADER, exact=True):
        filename, subtype = row.cells["Names"], parse_subtype(row.cells["Subtype"])
        name = filename.removesuffix(".nii.gz")
        if name == filename:
            problems.append(f"line {row.line}: names must end with .nii.gz, got {filename!r}")
        elif name in subtypes:
            problems.append(f"line {row.line}: {filename} must occur once")
        elif subtype is None:
            problems.append(
                f"line {row.line}: the subtype of {filename} must be 0, 1 or 2, got {row.cells['Subtype']!r}"
            )
        else:
            subtypes[name] = subtype
    raise_problems(str(path), problems)
    return subtypes
