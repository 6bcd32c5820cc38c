"""Find the cases of a data set: in folders of splits and classes, or by a table and a folder of files."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...engine.scans.image_header import IMAGE_ENDINGS
from .tables import DatasetError, TableRow, in_words, parse_class, read_table
from .task import Task

SPLITS = ("train", "validation", "test")
SPLITS_FILE = "splits_final.json"
LABELS_FILE = "classification_labels.csv"
TABLE_COLUMNS = ("filename", "subtype", "split")

logger = logging.getLogger(__name__)

_LABELLED_NAME = re.compile(r"quiz_(\d+)_\d+")
_TEST_NAME = re.compile(r"quiz_\d+")


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceCase:
    """Files of one case as they were found.

    Attributes:
        name: Without channel number and ending, such as "quiz_0_041".
        split: "train", "validation" or "test".
        subtype: Name of the class; `None` if a test case's class is not known.
        images: The scan, a file for each channel.
        mask: The labels; `None` for test cases.
    """

    name: str
    split: str
    subtype: str | None
    images: tuple[Path, ...]
    mask: Path | None


def find_cases(
    source: str | os.PathLike[str],
    task: Task,
    table: str | os.PathLike[str] | None = None,
    *,
    needed: Sequence[str] = ("train", "validation"),
) -> tuple[tuple[SourceCase, ...], tuple[str, ...]]:
    """Find the cases below a folder.

    Args:
        source: With `table`, a folder that holds images `<name>_0000<ending>`, further channels and masks
            `<name><ending>` at any depth (links to folders are not followed); else one with a folder for each class in
            `train` and `validation`, masks beside the images, and with images in `test`.
        task: Channels, classes and file ending.
        needed: Splits that must have cases.
        table: csv or xlsx with the columns filename, subtype and split (others are ignored); a filename may have the
            ending of the first image, of the mask, or none.

    Returns:
        The cases, split by split, and one line for each problem with missing files, names and folders.

    Raises:
        DatasetError: If `source` is not a folder, or the table cannot be read.
    """
    source = Path(source)
    if not source.is_dir():
        raise DatasetError(f"{source}: the source must be a folder with images: check the path")
    problems: list[str] = []
    if table is None:
        found = _cases_of_folders(source, task, needed, problems)
    else:
        found = _cases_of_table(source, task, Path(table), problems)
    cases = tuple(sorted(found, key=lambda case: (SPLITS.index(case.split), case.name)))
    for split in needed:
        if not problems and not any(case.split == split for case in cases):
            problems.append(f"{table or source / split}: there must be {split} cases, got none")
    if not problems:
        labels = {split: {case.subtype for case in cases if case.split == split} - {None} for split in SPLITS}
        problems += [
            f"{table or source / 'train'}: a class must have a training case, {label!r} of the {split} cases has none"
            for split in SPLITS[1:]
            for label in sorted(map(str, labels[split] - labels["train"]))
        ]
    return cases, tuple(problems)


def subtype_in_name(name: str) -> str | None:
    """Subtype in a name `quiz_<subtype>_<nnn>` of the pancreas task, or `None`."""
    match = _LABELLED_NAME.fullmatch(name)
    return str(int(match[1])) if match else None


def _cases_of_folders(source: Path, task: Task, needed: Sequence[str], problems: list[str]) -> Iterator[SourceCase]:
    seen: dict[str, Path] = {}
    for split in (split for split in SPLITS if split in needed or (source / split).is_dir()):
        for folder in _case_folders(source, task, split, problems):
            images, masks = task.files_by_case(_files_of(folder, task, problems))
            subtype = None if split == "test" else folder.name.removeprefix(task.class_folder)
            for name in sorted({*images, *masks}):
                files, mask = images.get(name, {}), masks.get(name, [None])[0]
                first = next((paths[0] for paths in files.values()), mask)
                if trouble := _name_trouble(name, task, split, subtype):
                    problems.append(f"{first}: {trouble}")
                elif lacking := _lacking(name, task, files, mask, with_mask=split != "test"):
                    problems.append(f"{first}: {lacking}")
                elif name in seen:
                    problems.append(f"{first}: a case must occur once, {seen[name]} has the same name")
                else:
                    scan = tuple(files[channel][0] for channel in sorted(files))
                    seen[name] = scan[0]
                    mask = None if split == "test" else mask
                    yield SourceCase(name=name, split=split, subtype=subtype, images=scan, mask=mask)


def _case_folders(source: Path, task: Task, split: str, problems: list[str]) -> list[Path]:
    """Folders of a split that hold files; problems name the others."""
    root = source / split
    if split == "test":
        return [root] if root.is_dir() else []
    wanted = [f"{task.class_folder}{name}" for name in task.class_names]
    hold = f"the folders {', '.join(wanted[:-1])} and {wanted[-1]}" if wanted else "a folder for each class"
    if not root.is_dir():
        problems.append(f"{root}: this folder must exist and hold {hold.removeprefix('the folders ')}")
        return []
    folders = []
    for path in sorted(path for path in root.iterdir() if not path.name.startswith(".")):
        if path.is_dir() and (path.name in wanted or not wanted):
            folders.append(path)
        elif path.is_dir() or path.name.lower().endswith(IMAGE_ENDINGS):
            problems.append(f"{path}: unknown subtype; {root} must hold {hold}")
    return folders


def _name_trouble(name: str, task: Task, split: str, subtype: str | None) -> str | None:
    """Say how the name of a case breaks the rules of the pancreas task."""
    if not task.quiz_names:
        return None
    if split == "test":
        return None if _TEST_NAME.fullmatch(name) else f"a test image must be named quiz_<number>{task.image_ending}"
    if subtype_in_name(name) is None:
        return f"the name must be quiz_{subtype}_<number>{task.image_ending} or, for masks, without _0000"
    if subtype_in_name(name) != subtype:
        return f"the name says subtype {subtype_in_name(name)}, the folder subtype {subtype}: they must agree"
    return None


def _lacking(
    name: str, task: Task, images: Mapping[int, list[Path]], mask: Path | None, *, with_mask: bool
) -> str | None:
    """Say which file of a case is missing beside the others."""
    for channel, ending in enumerate(task.image_endings()):
        if channel not in images:
            beside = "other channels" if images else "mask"
            return f"the image {name}{ending} must lie beside the {beside}, it is missing"
    if mask is None and with_mask:
        return f"the mask {name}{task.file_ending} must lie beside the image, it is missing"
    return None


def _cases_of_table(source: Path, task: Task, table: Path, problems: list[str]) -> Iterator[SourceCase]:
    found = (path for path in images_below(source) if path.name.endswith(task.file_ending))
    images, masks = task.files_by_case(path for path in found if path.is_file())
    seen: dict[str, TableRow] = {}
    for row in read_table(table, TABLE_COLUMNS):
        name, split = task.case_name(row.cells["filename"]), row.cells["split"].lower()
        wrong = _row_troubles(row, name, task, seen)
        wanted = [(f"image {name}{ending}", images.get(name, {}).get(channel, []))
                  for channel, ending in enumerate(task.image_endings())]  # fmt: skip
        if split != "test":
            wanted.append((f"mask {name}{task.file_ending}", masks.get(name, [])))
        wrong += [
            f"{source} must hold the {what} once, {len(paths) or 'none'} found"
            for what, paths in wanted
            if name and len(paths) != 1
        ]
        problems += [f"{table} line {row.line}: {line}" for line in wrong]
        seen.setdefault(name, row)
        if not wrong:
            yield SourceCase(
                name=name,
                split=split,
                subtype=parse_class(row.cells["subtype"]),
                images=tuple(images[name][channel][0] for channel in range(len(task.channel_names))),
                mask=None if split == "test" else masks[name][0],
            )
    if left_out := sorted(set(images) - set(seen)):
        logger.warning("%s has no row for %d images of %s: %s", table, len(left_out), source, ", ".join(left_out))


def _row_troubles(row: TableRow, name: str, task: Task, seen: Mapping[str, TableRow]) -> list[str]:
    """Say what is wrong with the cells of a row."""
    wrong = []
    split, subtype = row.cells["split"].lower(), parse_class(row.cells["subtype"])
    if not name:
        wrong.append("filename must not be empty")
    elif name in seen:
        wrong.append(f"{name} must occur once, line {seen[name].line} has it too (split {seen[name].cells['split']})")
    if split not in SPLITS:
        wrong.append(f"split must be one of {', '.join(SPLITS)}, got {row.cells['split']!r}")
    in_name = subtype_in_name(name) if task.quiz_names else None
    unlisted = subtype is not None and task.class_names and subtype not in task.class_names
    if unlisted or (subtype is None and split != "test"):
        wanted = in_words(task.class_names) or "a name or a number"
        wrong.append(f"unknown subtype {row.cells['subtype']!r} of {name}; it must be {wanted}")
    elif None not in (subtype, in_name) and subtype != in_name:
        wrong.append(f"the name {name} says subtype {in_name}, the row {subtype}: they must agree")
    return wrong


def images_below(folder: Path) -> list[Path]:
    """Files below a folder that have the name of an image and are not hidden, sorted.

    Raises:
        DatasetError: If a folder cannot be listed; `Path.rglob` would treat it as empty.
    """

    def refuse(error: OSError) -> None:
        raise DatasetError(f"{error.filename}: the folder cannot be listed: {error.strerror}") from error

    found = []
    for parent, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        names = [name for name in (*folders, *files) if name.lower().endswith(IMAGE_ENDINGS)]
        found += [Path(parent, name) for name in names if not name.startswith(".")]
    return sorted(found)


def _files_of(folder: Path, task: Task, problems: list[str]) -> list[Path]:
    """Images and masks in a folder; problems name files that look like one but are in a wrong place or no file."""
    files = []
    for path in images_below(folder):
        if path.parent != folder or not path.name.endswith(task.file_ending):
            problems.append(f"{path}: it must lie in {folder} itself, under a name that ends with {task.file_ending}")
        elif not path.is_file():
            problems.append(f"{path}: it must be a file, it is a folder or a link to nothing")
        else:
            files.append(path)
    return files
