"""Read tables of cases: csv, and xlsx if openpyxl is installed."""

from __future__ import annotations

import csv
import math
import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...engine.errors import EngineError

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


def parse_class(text: str) -> str | None:
    """Read a class from a table: "1", "1.0" from a spreadsheet, or a name; `None` for an empty cell."""
    return re.sub(r"^(-?\d+)\.0+$", r"\1", text) or None


def class_order(names: Iterable[str]) -> tuple[str, ...]:
    """Put different classes in the order of a network's outputs: numbers ascending, or texts in alphabetical order."""
    found = set(names)
    return tuple(sorted(found, key=int if all(name.isdecimal() for name in found) else None))


def in_words(names: Sequence[str]) -> str:
    """List names, such as "0, 1 or 2"."""
    return " or ".join(part for part in (", ".join(names[:-1]), *names[-1:]) if part)


def read_table(
    path: str | os.PathLike[str],
    columns: Sequence[str],
    *,
    exact: bool = False,
    more: Sequence[str] = (),
    aliases: Mapping[str, str] | None = None,
) -> tuple[TableRow, ...]:
    """Read rows of a csv or of the first sheet of an xlsx; empty rows are left out.

    Args:
        path: File whose first row that is not empty is the header. A csv is UTF-8; its cells are separated by commas,
            semicolons or tabs, as spreadsheets write them.
        columns: Names that the header must hold, in upper or lower case.
        exact: Whether the header must be exactly these columns, separated by commas.
        more: Columns of which all or none follow those of an exact header.
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
    if exact and header == [*columns, *more]:
        columns = header
    elif exact and header != list(columns):
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


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictedClasses:
    """Predicted classes by case, and probabilities of all classes where they are known.

    Attributes:
        subtypes: Name of the class.
        probabilities: One per class, in the order of `class_order`; they add up to 1.
    """

    subtypes: Mapping[str, str]
    probabilities: Mapping[str, tuple[float, ...]]


def read_subtype_results(
    path: str | os.PathLike[str], *, class_names: Sequence[str] = ("0", "1", "2"), file_ending: str = ".nii.gz"
) -> PredictedClasses:
    """Read predicted classes, in the form of `nnturbo predict` and of the pancreas task's submission.

    Args:
        path: csv with the header `Names,Subtype` and names that end with the file ending; a column
            `Probability_<class>` for each class may follow. Classes that are not all numbers may be given by their
            place, from 0, as `nnturbo predict` writes them; then a number is no name.
        class_names: The classes.
        file_ending: Of the masks.

    Raises:
        DatasetError: If the file cannot be read, a row is not such a pair, or a case occurs twice.
    """
    more = [f"Probability_{name}" for name in class_names]
    classes: dict[str, str] = {}
    probabilities: dict[str, tuple[float, ...]] = {}
    problems = []
    for row in read_table(path, RESULTS_HEADER, exact=True, more=more):
        filename, found = row.cells["Names"], _named_class(row.cells["Subtype"], class_names)
        name = filename.removesuffix(file_ending)
        shares = _shares([row.cells[column] for column in more if column in row.cells])
        if name == filename:
            problems.append(f"line {row.line}: names must end with {file_ending}, got {filename!r}")
        elif name in classes:
            problems.append(f"line {row.line}: {filename} must occur once")
        elif found is None:
            problems.append(
                f"line {row.line}: the subtype of {filename} must be {in_words(class_names)}, got "
                f"{row.cells['Subtype']!r}"
            )
        elif shares is None:
            problems.append(f"line {row.line}: the probabilities of {filename} must be numbers that add up to 1")
        else:
            classes[name] = found
            probabilities |= {name: shares} if shares else {}
    raise_problems(str(path), problems)
    return PredictedClasses(subtypes=classes, probabilities=probabilities)


def _shares(cells: Sequence[str]) -> tuple[float, ...] | None:
    """Read the probabilities of a row; `None` if they are none."""
    try:
        shares = tuple(map(float, cells))
    except ValueError:
        return None
    is_one = not shares or (min(shares) >= 0 and math.isclose(sum(shares), 1, abs_tol=1e-3))
    return shares if is_one else None


def _named_class(cell: str, class_names: Sequence[str]) -> str | None:
    """Find the class that a cell names or numbers; where names are numbers and others, a number is a place."""
    found = parse_class(cell)
    is_place = found is not None and found.isdecimal() and int(found) < len(class_names)
    if found is not None and is_place and not all(name.isdecimal() for name in class_names):
        return class_names[int(found)]
    return found if found in class_names else None
