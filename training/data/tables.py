"""Read tables of cases: csv, and xlsx if openpyxl is installed."""

from __future__ import annotations

import csv
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...engine.errors import EngineError

SUBTYPES = (0, 1, 2)
RESULTS_HEADER = ("Names", "Subtype")


class DatasetError(EngineError):
    """A data set or a folder of predictions cannot be used; the text has one problem a line, with the file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TableRow:
    """One row of a table: its number (the header is 1), and its stripped cells by column."""

    line: int
    cells: dict[str, str]


def raise_problems(what: str, problems: Sequence[str]) -> None:
    """Raise all problems as one error, if there are any.

    Raises:
        DatasetError: On one line if there is one problem; otherwise `what` on the first line, then a line for each.
    """
    if len(problems) == 1:
        raise DatasetError(f"{what}: {problems[0]}; nothing was written")
    if problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise DatasetError(f"{what}: {len(problems)} problem(s) must be corrected, nothing was written:\n{lines}")


def parse_subtype(text: str) -> int | None:
    """Read a subtype from a table ("1", or "1.0" from a spreadsheet); `None` if it is not 0, 1 or 2."""
    try:
        number = float(text)
    except ValueError:
        return None
    return int(number) if number in SUBTYPES else None


def read_table(
    path: str | os.PathLike[str],
    columns: Sequence[str],
    *,
    exact: bool = False,
    aliases: Mapping[str, str] | None = None,
) -> tuple[TableRow, ...]:
    """Read rows of a csv or of the first sheet of an xlsx; empty rows are left out.

    Args:
        path: File whose first row that is not empty is the header. A csv is UTF-8; its cells are separated by commas,
            semicolons or tabs, as spreadsheets write them.
        columns: Names that the header must hold, in upper or lower case.
        exact: Whether the header must be exactly these columns, separated by commas.
        aliases: Other names of columns, in lower case, and which column each means.

    Returns:
        The rows, with the cells of these columns.

    Raises:
        DatasetError: If the file cannot be read, or a column is missing or occurs twice.
    """
    path = Path(path)
    if path.suffix.lower() not in (".csv", ".xlsx"):
        raise DatasetError(f"{path}: a table must be a .csv or .xlsx file; save it as one of them")
    try:
        lines = _xlsx_lines(path) if path.suffix.lower() == ".xlsx" else _csv_lines(path, ",", "" if exact else ";\t")
    except OSError as error:
        raise DatasetError(f"{path}: the table cannot be read: {error.strerror or error}; check the path") from error
    except (ValueError, csv.Error) as error:
        raise DatasetError(
            f"{path}: the table cannot be read: {error}; save it again as csv in UTF-8 or as xlsx"
        ) from error
    stripped = [(number, [cell.strip() for cell in line]) for number, line in enumerate(lines, start=1)]
    filled = [(number, line) for number, line in stripped if any(line)]
    header = filled[0][1] if filled else []
    if exact and header != list(columns):
        raise DatasetError(
            f"{path}: the header must be exactly {','.join(columns)}, got {','.join(header) or 'nothing'}"
        )
    lowered = [(aliases or {}).get(cell.lower(), cell.lower()) for cell in header]
    if any(lowered.count(column.lower()) != 1 for column in columns):
        raise DatasetError(
            f"{path}: the first line must name the columns {', '.join(columns)}, each once, got "
            f"{', '.join(header) or 'nothing'}"
        )
    places = {column: lowered.index(column.lower()) for column in columns}
    rows = []
    for number, line in filled[1:]:
        padded = [*line, *[""] * len(header)]
        rows.append(TableRow(line=number, cells={name: padded[at] for name, at in places.items()}))
    return tuple(rows)


def _csv_lines(path: Path, delimiter: str, others: str) -> list[list[str]]:
    """Read cells separated by `delimiter`, or by one of `others` where the header holds only that one."""
    with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets begin with a byte order mark
        header = next((line for line in file if line.strip()), "")
        if delimiter not in header:
            delimiter = next((other for other in others if other in header), delimiter)
        file.seek(0)
        return list(csv.reader(file, delimiter=delimiter, strict=True))


def _xlsx_lines(path: Path) -> list[list[str]]:
    try:
        import openpyxl
    except ImportError:
        raise DatasetError(
            f"{path}: reading xlsx needs openpyxl, which is not installed: pip install openpyxl, or save as csv"
        ) from None
    with path.open("rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # openpyxl warns about styles, which do not change cells
        try:
            sheet = openpyxl.load_workbook(file, read_only=True, data_only=True).worksheets[0]
            sheet.reset_dimensions()  # some programs write a table size that is too small
            values = list(sheet.values)
        except Exception as error:  # openpyxl raises many types: KeyError, ParseError, zlib.error, ...
            raise ValueError(f"it is no workbook with a sheet of cells ({type(error).__name__}: {error})") from error
    return [["" if cell is None else str(cell) for cell in line] for line in values]


def read_subtype_results(path: str | os.PathLike[str]) -> dict[str, int]:
    """Read predicted subtypes, in the form of `nnturbo predict` and of the task's submission.

    Args:
        path: csv with the header `Names,Subtype` and names that end with .nii.gz.

    Returns:
        The subtype of each case, by its name without the ending.

    Raises:
        DatasetError: If the file cannot be read, a row is not such a pair, or a case occurs twice.
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
